"""START HERE. Llama 4: embedding → decoder layers → norm → output head; and pictures, put in after the embedding.

    model = Llama4(config, seed=0)
    logits = model(tokens)                      # int32 [B, T] → float32 [B, T, V]
    logits = model(tokens, images=tiles)        # uint8 [B, tiles, S, S, 3]: early fusion

What distinguishes it from other decoders, each in its own file:
- three layers in four attend within chunks of 8192 positions and use RoPE; every fourth attends to everything and has
  no positions at all (iRoPE)                                           → `config.LayerSpec`, `attention`, `rope`
- on those, queries are scaled up as the past grows                     → `query_scale`
- a sigmoid router scales the input of the one expert it chooses, and a shared expert always helps  → `moe`
- chunked layers cache one chunk, however long the context              → `cache`
- pictures are tokens: features of their patches take the places of `<|patch|>` tokens      → `vision`

On a mesh that splits the sequence, layers see it in another order, which balances their work     → `ops.zigzag`

Reference: `Llama4ForConditionalGeneration` of transformers 5.23, `Transformer` of llama-models 0.3.0; the tests hold
this model to both, in prefill, decode and gradients.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from llama4_jax.model.attention import Place
from llama4_jax.model.cache import Cache, empty_cache
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.decoder import Decoder
from llama4_jax.model.layers import Embedding, Linear, RMSNorm
from llama4_jax.model.matmuls import choose_matmuls
from llama4_jax.model.moe import RouterStats
from llama4_jax.model.rope import frequencies, rotation
from llama4_jax.model.vision import VisionEncoder, normalized
from llama4_jax.ops.order import ANY_ORDER, Order
from llama4_jax.ops.zigzag import can_zigzag, from_zigzag, to_zigzag
from llama4_jax.sharding import constrain

# Pixels (uint8), or numbers from -1 to 1; the tiles of each row's pictures in order, and then perhaps padding.
Images = UInt8[Array, "B tiles S S c"] | Float[Array, "B tiles S S c"]


class Llama4(nnx.Module):
    """The model. With `config.vision` it has a vision encoder, and a projector of its features to `embed_dim`.

    `scan_layers` and `remat` choose how it is compiled, not what it computes. The numbers of a seed depend on
    neither, nor on the precision.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision | None = None,
        scan_layers: bool = True,
        remat: str = "none",
        seed: int | Array = 0,
    ):
        precision = precision or Precision()
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        embed_key, decoder_key, head_key = jax.random.split(key, 3)
        make = {"std": config.init_std, "dtype": precision.params}
        self.embed = Embedding(config.vocab_size, config.embed_dim, **make, rngs=nnx.Rngs(params=embed_key))
        self.decoder = Decoder(config, precision, scan_layers=scan_layers, remat=remat, key=decoder_key)
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=precision.params)
        self.lm_head = Linear(
            {"embed": config.embed_dim}, {"vocab": config.vocab_size}, **make, rngs=nnx.Rngs(params=head_key)
        )
        if config.vision is not None:
            # A key of its own, so that the numbers of the text model do not depend on whether there is an encoder.
            vision_key, projector_key = jax.random.split(jax.random.fold_in(key, 1))
            how = {"init_std": config.init_std, "scan_layers": scan_layers, "remat": remat}
            self.vision = VisionEncoder(config.vision, precision, **how, key=vision_key)
            features, embed = {"mlp": config.vision.output_dim}, {"embed": config.embed_dim}
            rngs = nnx.Rngs(params=projector_key)
            self.projector = Linear(features, embed, **make, rngs=rngs)
        choose_matmuls(self, precision)
        self.config = config
        self.precision = precision

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        images: Images | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        contiguous: bool = True,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, in `precision.logits`.

        - images: tiles of the pictures of each row, whose features take the places of its `<|patch|>` tokens in order
        - positions: of each token in its own document; 0, 1, 2 … if not given
        - segment_ids: document of each token, 0 for padding; one document a row if not given. Tokens see only their
          own document.
        - contiguous: a promise that the documents of a row stand one after another, and that the positions of each
          count up by one. It lets kernels skip what they need not read; without it any order is right.

        Raises ValueError for images of another size than the encoder's, or given to a model without one, and for more
        `<|patch|>` tokens than the tiles have features (not under `jit`, where the logits are then NaN).
        """
        hidden, _ = self.hidden(
            tokens, images=images, positions=positions, segment_ids=segment_ids, contiguous=contiguous
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        images: Images | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        contiguous: bool = True,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """The hidden states that the output head reads, and the router statistics of each expert layer."""
        aligned = positions is None and segment_ids is None
        order = Order(contiguous=contiguous, aligned=aligned, zigzag=can_zigzag(tokens.shape[1]))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        features, index = None, None
        if images is not None:
            features = self.encode_images(images)
            index = self._feature_index(tokens, features)
        if order.zigzag:
            per_token = tokens, positions, segment_ids, index
            tokens, positions, segment_ids, index = jax.tree.map(to_zigzag, per_token)
        x = self._embed(tokens, None if features is None else _in_place(features, index))
        valid = None if segment_ids is None else segment_ids > 0
        x, stats = self.decoder(x, self._place(positions, segment_ids, order), valid)
        x = self.final_norm(x)
        return from_zigzag(x) if order.zigzag else x, stats

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        out = self.lm_head(hidden).astype(self.precision.logits)
        return constrain(out, "rows", "seq", "vocab")

    def encode_images(self, images: Images) -> Float[Array, "B patches D"]:
        """The features of the tiles' patches, as wide as the text model: `config.vision.tokens_per_tile` a tile.

        Raises ValueError as calling the model does.
        """
        vision = self.config.vision
        if vision is None:
            raise ValueError("images were given, but this model has no vision encoder: it reads text alone.")
        size = (vision.image_size, vision.image_size, vision.num_channels)
        if images.shape[2:] != size:
            raise ValueError(f"images must be tiles of {list(size)}, got {list(images.shape[2:])}.")
        rows, tiles = images.shape[:2]
        flat = constrain(images.reshape(rows * tiles, *size), "batch", "pixels", "pixels", None)
        features = self.projector(self.vision(normalized(flat)))
        return constrain(features.reshape(rows, -1, features.shape[-1]), "batch", "patch", "embed")

    def step(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        counts: Int[Array, " B"] | None = None,
        features: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Continues the rows of `cache` by their first counts[b] tokens (all if not given); the rest is padding.

        - features: what stands at the places of `<|patch|>` tokens, from `encode_images`

        Serves prefill (T tokens, empty cache), decode (T = 1) and further turns alike. Returns the hidden states of
        the new tokens and the cache extended by them.
        """
        if counts is None:
            counts = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        place = self._place(positions, None)
        x, cache = self.decoder.step(self._embed(tokens, features), place, cache, counts)
        return self.final_norm(x), cache

    def empty_cache(self, batch: int, max_length: int, dtype: str | None = None) -> Cache:
        """For `step`: of `batch` rows of at most `max_length` tokens. `dtype`: "int8", or None: that of computation."""
        return empty_cache(self.config, batch, max_length, dtype or self.precision.compute)

    def unscanned(self) -> "Llama4":
        """The same model with its layers one by one: what decoding wants."""
        if not self.decoder.repeats:
            return self
        graphdef, state = nnx.split(self)
        copy = nnx.merge(graphdef, state)
        copy.decoder = self.decoder.unscanned()
        return copy

    def _embed(self, tokens: Int[Array, "B T"], features: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
        x = self.embed(tokens, self.precision.compute)
        if features is not None:
            is_patch = tokens == self.config.vision.patch_token_id
            x = jnp.where(is_patch[..., None], features.astype(x.dtype), x)
        return constrain(x, "batch", "seq", "embed")

    def _feature_index(self, tokens: Int[Array, "B T"], features: Float[Array, "B patches D"]) -> Int[Array, "B T"]:
        """Which of its row's features each `<|patch|>` token takes: the first the first. Of others it is any number."""
        index = jnp.cumsum(tokens == self.config.vision.patch_token_id, axis=1) - 1
        if not isinstance(index, jax.core.Tracer) and index.size and (most := int(index.max()) + 1) > features.shape[1]:
            raise ValueError(
                f"a row of tokens has {most} <|patch|> tokens, but the images have features for {features.shape[1]}: "
                f"give the tiles of all its pictures."
            )
        return index

    def _place(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, order: Order = ANY_ORDER
    ) -> Place:
        config = self.config
        frequency = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return Place(positions, segment_ids, rotation(positions, frequency), order)


def _in_place(features: Float[Array, "B patches D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """features[b, index[b, t]]. A token without a feature gets NaN, so that the loss says it where nothing can be
    raised."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=jnp.nan))(features, index)
