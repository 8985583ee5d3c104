"""START HERE. Llama 4's text model: embedding → decoder layers → norm → output head.

    model = Llama4(config, seed=0)
    logits = model(tokens)                      # int32 [B, T] → float32 [B, T, V]

What distinguishes it from other decoders, each in its own file:
- three layers in four attend within chunks of 8192 positions and use RoPE; every fourth attends to everything and has
  no positions at all (iRoPE)                                           → `config.LayerSpec`, `attention`, `rope`
- on those, queries are scaled up as the past grows                     → `query_scale`
- a sigmoid router scales the input of the one expert it chooses, and a shared expert always helps  → `moe`
- chunked layers cache one chunk, however long the context              → `cache`

Reference: `Llama4ForCausalLM` of transformers 5.23, `Transformer` of llama-models 0.3.0; the tests hold this model to
both, in prefill, decode and gradients.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.model.attention import Place
from llama4_jax.model.cache import Cache, empty_cache
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.decoder import Decoder
from llama4_jax.model.layers import Embedding, Linear, RMSNorm
from llama4_jax.model.moe import RouterStats
from llama4_jax.model.rope import frequencies, rotation
from sharding import constrain


class Llama4(nnx.Module):
    """The text model.

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
        embed_key, decoder_key, head_key = jax.random.split(jax.random.key(seed) if isinstance(seed, int) else seed, 3)
        make = {"std": config.init_std, "dtype": precision.params}
        self.embed = Embedding(config.vocab_size, config.embed_dim, **make, rngs=nnx.Rngs(params=embed_key))
        self.decoder = Decoder(config, precision, scan_layers=scan_layers, remat=remat, key=decoder_key)
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=precision.params)
        self.lm_head = Linear(
            {"embed": config.embed_dim}, {"vocab": config.vocab_size}, **make, rngs=nnx.Rngs(params=head_key)
        )
        self.config = config
        self.precision = precision

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, in `precision.logits`.

        - positions: of each token in its own document; 0, 1, 2 … if not given
        - segment_ids: document of each token, 0 for padding; one document a row if not given. Tokens see only their
          own document.
        """
        hidden, _ = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """The hidden states that the output head reads, and the router statistics of each expert layer."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self._embed(tokens)
        valid = None if segment_ids is None else segment_ids > 0
        x, stats = self.decoder(x, self._place(positions, segment_ids), valid)
        return self.final_norm(x), stats

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        out = self.lm_head(hidden).astype(self.precision.logits)
        return constrain(out, "batch", "seq", "vocab")

    def step(
        self, tokens: Int[Array, "B T"], cache: Cache, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Continues the rows of `cache` by their first counts[b] tokens (all if not given); the rest is padding.

        Serves prefill (T tokens, empty cache), decode (T = 1) and further turns alike. Returns the hidden states of
        the new tokens and the cache extended by them.
        """
        if counts is None:
            counts = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x, cache = self.decoder.step(self._embed(tokens), self._place(positions, None), cache, counts)
        return self.final_norm(x), cache

    def empty_cache(self, batch: int, max_length: int) -> Cache:
        return empty_cache(self.config, batch, max_length, self.precision.compute)

    def unscanned(self) -> "Llama4":
        """The same model with its layers one by one: what decoding wants."""
        if not self.decoder.repeats:
            return self
        graphdef, state = nnx.split(self)
        copy = nnx.merge(graphdef, state)
        copy.decoder = self.decoder.unscanned()
        return copy

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return constrain(self.embed(tokens, self.precision.compute), "batch", "seq", "embed")

    def _place(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Place:
        config = self.config
        frequency = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return Place(positions, segment_ids, rotation(positions, frequency))
