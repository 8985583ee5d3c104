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

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from llama4_jax.model.arguments import check_beside, check_tokens, random_key
from llama4_jax.model.attention import Attention, Place
from llama4_jax.model.cache import Cache, empty_cache
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.decoder import Decoder, LayerOutputs
from llama4_jax.model.layers import Embedding, Linear, RMSNorm
from llama4_jax.model.matmuls import choose_matmuls
from llama4_jax.model.moe import MoE, RouterChoices, RouterStats
from llama4_jax.model.rope import frequencies, rotation
from llama4_jax.model.signature import shows_signature
from llama4_jax.model.stack import Layers
from llama4_jax.model.vision import VisionEncoder, normalized
from llama4_jax.ops.attention import IMPLEMENTATIONS
from llama4_jax.ops.grouped_matmul import PRODUCTS
from llama4_jax.ops.order import ANY_ORDER, Order
from llama4_jax.ops.plain import explained, plain
from llama4_jax.ops.zigzag import can_zigzag, from_zigzag, to_zigzag
from llama4_jax.sharding import constrain

# Pixels (uint8), or numbers from -1 to 1; the tiles of each row's pictures in order, and then perhaps padding.
Images = UInt8[Array, "B tiles S S c"] | Float[Array, "B tiles S S c"]


class Outputs(NamedTuple):
    """What the model returns where more than logits is asked for. L layers, M of them with experts, both in order."""

    logits: Float[Array, "B T V"]
    # The embedding, then what each layer returns: L + 1, the last of them before the final norm.
    hidden: Float[Array, "layers B T D"] | None
    router: RouterChoices | None  # logits [M B T E], experts and gates [M B T top_k]; None without expert layers


@shows_signature
class Llama4(nnx.Module):
    """The model. With `config.vision` it has a vision encoder, and a projector of its features to `embed_dim`.

    - config: its sizes; `llama4_jax.model.presets` has the published ones
    - precision: number formats; float32 throughout if not given
    - scan_layers: compile the repeating group of layers once; its parameters are then stacked
    - remat: what the backward pass computes again: "none", "dots", "full" or "offload" (`stack.REMAT_POLICIES`)
    - seed: an integer or a key of `jax.random`. Traced ones serve, so `jax.vmap` over seeds makes stacked models
    - attention, experts: how they are computed, a name of `ops.attention.IMPLEMENTATIONS` (of whole sequences; with a
      cache it is chosen) and of `ops.grouped_matmul.PRODUCTS`; "auto" chooses by platform and length. With both
      "reference" everything is computed within `ops.plain()`: slow, and differentiable any number of times, forwards
      (`jax.jvp`) and backwards

    `scan_layers`, `remat`, `attention` and `experts` choose how it is compiled, not what it computes. The numbers of a
    seed depend on none of them, nor on the precision. Raises ValueError for a value that is not among these.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision | None = None,
        scan_layers: bool = True,
        remat: str = "none",
        seed: int | np.integer | Array = 0,
        attention: str = "auto",
        experts: str = "auto",
    ):
        if not isinstance(config, ModelConfig):
            raise ValueError(
                f"config must be a ModelConfig, got {config!r}. llama4_jax.model.presets.preset(name) gives published "
                f"ones, and llama4_jax.from_pretrained(path) a whole model."
            )
        precision = precision or Precision()
        key = random_key(seed)
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
        choose_implementations(self, attention, experts)
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
        return_hidden: bool = False,
        return_router: bool = False,
    ) -> Float[Array, "B T V"] | Outputs:
        """Logits of the next token at every position, in `precision.logits`.

        - tokens: ids in [0, vocab_size)
        - images: tiles of the pictures of each row, whose features take the places of its `<|patch|>` tokens in order
        - positions: of each token in its own document; 0, 1, 2 … if not given
        - segment_ids: document of each token, 0 for padding; one document a row if not given. Tokens see only their
          own document.
        - contiguous: a promise that the documents of a row stand one after another, and that the positions of each
          count up by one. It lets kernels skip what they need not read; without it any order is right.
        - return_hidden, return_router: return `Outputs` instead: the logits, and what layers and routers gave. The
          same numbers whether layers are scanned or recomputed, and on a mesh; what is not asked for is not kept.

        Raises ValueError for arguments of another shape or dtype; for images of another size than the encoder's, or
        given to a model without one; and, though not under `jit`, for ids outside the vocabulary and for more
        `<|patch|>` tokens than the tiles have features. (Nothing can be raised under `jit`: what such ids give means
        nothing there, and the logits of tokens without features are NaN.)
        """
        given = tokens, images, positions, segment_ids, contiguous
        with self._operations():
            x, _, kept = self._run(*given, hidden=return_hidden, choices=return_router)
            logits = self.logits(x)
        if not (return_hidden or return_router):
            return logits
        hidden = jnp.stack(kept.hidden) if return_hidden else None
        router = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept.choices) if kept.choices else None
        return Outputs(logits, hidden, router)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        images: Images | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        contiguous: bool = True,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """The hidden states that the output head reads, and the router statistics of each expert layer. Arguments and
        errors as of calling the model."""
        with self._operations():
            return self._run(tokens, images, positions, segment_ids, contiguous)[:2]

    def _run(
        self, tokens, images, positions, segment_ids, contiguous: bool, *, hidden: bool = False, choices: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, LayerOutputs]:
        """The hidden states that the head reads, the router statistics, and what of each layer is to be kept: hidden
        states, those of the embedding first, and router choices."""
        check_tokens(tokens, self.config.vocab_size)
        check_beside(tokens, positions, segment_ids, images)
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
        x = embedded = self._embed(tokens, None if features is None else _in_place(features, index))
        valid = None if segment_ids is None else segment_ids > 0
        place = self._place(positions, segment_ids, order)
        x, stats, kept = self.decoder(x, place, valid, keep_hidden=hidden, keep_choices=choices)
        x = self.final_norm(x)
        kept = kept._replace(hidden=[embedded, *kept.hidden] if hidden else [])
        if order.zigzag:
            x, kept = jax.tree.map(from_zigzag, (x, kept))
        return x, stats, kept

    def head(self) -> Float[Array, "D V"]:
        """The output head's matrix, for losses that make no logits: with low-rank factors, if it has any."""
        kernel = self.lm_head.kernel[...]
        return kernel if self.lm_head.lora is None else self.lm_head.lora.merged(kernel)

    @property
    def head_learns(self) -> bool:
        return self.lm_head.learns or self.lm_head.lora is not None

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        with self._operations():
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
        with self._operations():
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
        the new tokens and the cache extended by them. Raises ValueError as calling the model does.
        """
        check_tokens(tokens, self.config.vocab_size)
        if counts is None:
            counts = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        place = self._place(positions, None)
        with self._operations():
            x, cache = self.decoder.step(self._embed(tokens, features), place, cache, counts)
            return self.final_norm(x), cache

    def empty_cache(self, batch: int, max_length: int, dtype: str | None = None) -> Cache:
        """For `step`: of `batch` rows of at most `max_length` tokens. `dtype`: "int8", or None: that of computation."""
        return empty_cache(self.config, batch, max_length, dtype or self.precision.compute)

    @property
    def layers(self) -> Layers:
        """The decoder's layers, scanned or not: model.layers[3].attention.q.kernel is the parameter that `llama4
        inspect`, precision rules and freezing call layers.3.attention.q.kernel. Those of scanned layers can be looked
        at, and not set (see `stack.Layers`)."""
        return Layers(self.decoder)

    def unscanned(self) -> "Llama4":
        """The same model with its layers one by one: what decoding wants."""
        if not self.decoder.repeats:
            return self
        graphdef, state = nnx.split(self)
        copy = nnx.merge(graphdef, state)
        copy.decoder = self.decoder.unscanned()
        return copy

    @contextlib.contextmanager
    def _operations(self):
        """How operations are computed within it."""
        with explained(), plain() if self.plain else contextlib.nullcontext():
            yield

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


def choose_implementations(model: Llama4, attention: str, experts: str) -> Llama4:
    """Sets how its attention and its experts are computed, as `Llama4(attention=…, experts=…)` does."""
    check_implementations(attention, experts)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            module.implementation = attention
        elif isinstance(module, MoE):
            module.implementation = experts
    model.plain = attention == experts == "reference"
    return model


def check_implementations(attention: str, experts: str) -> None:
    """Raises ValueError for a name that is none of them."""
    for name, chosen, known in (("attention", attention, IMPLEMENTATIONS), ("experts", experts, PRODUCTS)):
        if chosen not in ("auto", *known):
            raise ValueError(f"{name} must be one of {', '.join(('auto', *known))}, got {chosen!r}.")


def _in_place(features: Float[Array, "B patches D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """features[b, index[b, t]]. A token without a feature gets NaN, so that the loss says it where nothing can be
    raised."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=jnp.nan))(features, index)
