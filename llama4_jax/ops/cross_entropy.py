"""Cross entropy of a linear head, a piece of the tokens at a time: the logits [B, T, V] never exist whole.

With a vocabulary of 202 048 the float32 logits of 8 rows of 8192 tokens take 53 GB; the hidden states they come from
take 0.6 GB. The loss is one number, so its cotangent only scales the gradients: they are computed together with the
loss while a piece's logits are at hand, and the backward pass recomputes nothing.

On a mesh each device works on its own tokens, in `shard_map`. Where the vocabulary is split (tensor), devices exchange
a few numbers a token: the greatest logit, the sum of the exponentials, the target's logit; never logits. The head is
gathered once, where its rows are split (fsdp), and its gradient summed once, after the last piece.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.ops.dot_general import exact
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.plain import gathered_for_use, own_gradient
from llama4_jax.sharding import activation_spec, axes_of, gathered, own_part, parameter_spec, platform

# Default size of a piece, a device: with fewer tokens, adding to the head's gradient costs more than the products do;
# with more, the logits only take more memory (128 MiB of float32 for 32 768 words and 1024 tokens).
PIECE_TOKENS = {"cpu": 1024}
PIECE_TOKENS_ELSEWHERE = 2048  # products are faster there, compared with memory

# XLA for TPUs scatters the head's gradient only if its columns fill such blocks. Else it sums all of it on all devices.
BLOCK_COLUMNS = {"tpu": 4096}
MOST_ADDED = 1 / 32  # of its columns; few columns are summed in a moment, anyway


def _num_pieces(pieces: int | None, rows: int, num_tokens: int) -> int:
    """Of [rows, num_tokens], those of one device."""
    if pieces is None:
        pieces = math.ceil(rows * num_tokens / PIECE_TOKENS.get(platform(), PIECE_TOKENS_ELSEWHERE))
    return min(pieces, num_tokens)


def _check_pieces(pieces: int | None, num_tokens: int) -> None:
    if pieces is not None and not 1 <= pieces <= num_tokens:
        raise ValueError(f"cross entropy: pieces must be between 1 and the {num_tokens} tokens of a row, got {pieces}.")


def _split(x: Array, pieces: int) -> Array:
    """[B, T, ...] -> [pieces, B, tokens, ...]; zeros fill the last tokens."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % pieces)
    return rearrange(jnp.pad(x, widths), "b (t p) ... -> p b t ...", p=pieces)


def _join(x: Array, num_tokens: int) -> Array:
    return rearrange(x, "p b t ... -> b (t p) ...")[:, :num_tokens]


def added_columns(words: int, platform: str) -> int:
    """Columns of zeros that fill a head of so many up to a whole number of blocks."""
    added = -words % BLOCK_COLUMNS.get(platform, 1)
    return added if added <= MOST_ADDED * words else 0


def _filled(head: Float[Array, "D V"]) -> Float[Array, "D W"]:
    return jnp.pad(head, ((0, 0), (0, added_columns(head.shape[1], platform()))))


def _logits(hidden: Float[Array, "... D"], head: Float[Array, "D W"], words: int) -> Float[Array, "... W"]:
    """Those after the `words` are of no word, and no token has them."""
    logits = jnp.einsum(
        "...d,dv->...v", hidden, head, precision=exact(hidden, head), preferred_element_type=jnp.float32
    )
    return logits if words == head.shape[1] else jnp.where(jnp.arange(head.shape[1]) < words, logits, -jnp.inf)


def _target_index(targets: Int[Array, "..."], words: int, vocab_axes: tuple[str, ...]) -> Int[Array, "..."]:
    """Where each target is among this device's words; out of [0, words) if it is another's."""
    return targets - lax.axis_index(vocab_axes) * words if vocab_axes else targets


def _nll(logits: Float[Array, "... W"], index: Int[Array, "..."], words: int, vocab_axes: tuple[str, ...]):
    """Negative log-likelihood, and this device's words of softmax as (numerator, denominator)."""
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    peak = lax.pmax(peak, vocab_axes) if vocab_axes else peak
    numerator = jnp.exp(logits - peak)
    denominator = numerator.sum(-1, keepdims=True)
    here = (index >= 0) & (index < words)
    chosen = jnp.take_along_axis(logits, jnp.where(here, index, 0)[..., None], axis=-1)
    chosen = jnp.where(here[..., None], chosen, 0)
    if vocab_axes:
        denominator, chosen = lax.psum((denominator, chosen), vocab_axes)
    return (jnp.log(denominator) + peak - chosen)[..., 0], numerator, denominator


class _Places(NamedTuple):
    """Where things are on the mesh in use."""

    tokens: PartitionSpec  # [B, T]
    head: PartitionSpec

    @property
    def token_axes(self) -> tuple[str, ...]:
        return (*axes_of(self.tokens[0]), *axes_of(self.tokens[1]))

    @property
    def embed_axes(self) -> tuple[str, ...]:
        return axes_of(self.head[0])

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        return axes_of(self.head[1])


def _places(targets: Int[Array, "B T"], head: Float[Array, "D V"]) -> _Places:
    return _Places(activation_spec(targets.shape, "rows", "seq"), parameter_spec(head.shape, "embed", "vocab"))


class TokenScores(NamedTuple):
    nll: Float[Array, "B T"]  # negative log-likelihood of each target in nats, float32
    likeliest: Bool[Array, "B T"]  # whether no token is likelier


def token_scores(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    pieces: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> TokenScores:
    """How each target fares under softmax(hidden @ head). Arguments as in `linear_cross_entropy`.

    The gradient of `nll` computes the logits of each piece a second time.
    """
    _check_pieces(pieces, targets.shape[1])
    compute_dtype = hidden.dtype if compute_dtype is None else compute_dtype
    places = _places(targets, head)

    def on_device(hidden, head, targets):
        words = head.shape[1]
        head = gathered_for_use(_filled(head), compute_dtype, places.embed_axes, 0)

        @jax.checkpoint
        def piece(_, x):
            hidden, targets = x
            logits = _logits(hidden.astype(compute_dtype), head, words)
            index = _target_index(targets, words, places.vocab_axes)
            nll, *_ = _nll(logits, index, words, places.vocab_axes)
            return None, TokenScores(nll, _is_likeliest(logits, index, places.vocab_axes))

        parts = _num_pieces(pieces, *targets.shape)
        _, scores = lax.scan(piece, None, (_split(hidden, parts), _split(targets, parts)))
        return TokenScores(*(_join(x, targets.shape[1]) for x in scores))

    in_specs = (PartitionSpec(*places.tokens, None), places.head, places.tokens)
    return on_mesh(on_device, in_specs, TokenScores(places.tokens, places.tokens))(hidden, head, targets)


def _is_likeliest(
    logits: Float[Array, "... V"], index: Int[Array, "..."], vocab_axes: tuple[str, ...]
) -> Bool[Array, "..."]:
    """Whether the target has the greatest logit, and of those that share it the smallest id."""
    logits = lax.stop_gradient(logits)
    greatest, at = logits.max(-1), jnp.argmax(logits, axis=-1)
    if not vocab_axes:
        return at == index
    # How far from the target the first greatest logit is, by those devices that have one.
    first = jnp.where(greatest == lax.pmax(greatest, vocab_axes), at - index, jnp.iinfo(jnp.int32).max)
    return lax.pmin(first, vocab_axes) == 0


def token_nll(hidden, head, targets, *, pieces=None, compute_dtype=None) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32: `token_scores(…).nll`."""
    return token_scores(hidden, head, targets, pieces=pieces, compute_dtype=compute_dtype).nll


@own_gradient(nondiff_argnums=(4, 5, 6))
def _weighted_sum(hidden, head, targets, weights, pieces, compute_dtype, head_learns):
    nll = token_nll(hidden, head, targets, pieces=pieces, compute_dtype=compute_dtype)
    return (nll * weights).sum()


def _weighted_sum_forward(hidden, head, targets, weights, pieces, compute_dtype, head_learns):
    places = _places(targets, head)
    vocab_axes = places.vocab_axes

    def on_device(hidden, head, targets, weights):
        words = head.shape[1]
        cast_head = gathered(_filled(head), compute_dtype, places.embed_axes, 0)

        def piece(d_head, x):
            hidden, targets, weights = x
            h = hidden.astype(compute_dtype)
            index = _target_index(targets, words, vocab_axes)
            nll, numerator, denominator = _nll(_logits(h, cast_head, words), index, words, vocab_axes)
            chosen = index[..., None] == jnp.arange(cast_head.shape[1])  # columns of no word are left out in the end
            d_logits = numerator * (weights[..., None] / denominator) - jnp.where(chosen, weights[..., None], 0)
            d_logits = d_logits.astype(compute_dtype)
            sums = {"precision": exact(d_logits, cast_head), "preferred_element_type": jnp.float32}
            d_hidden = jnp.einsum("btv,dv->btd", d_logits, cast_head, **sums)
            d_hidden = lax.psum(d_hidden, vocab_axes) if vocab_axes else d_hidden
            if d_head is not None:
                h, d_logits = (x.reshape(-1, x.shape[-1]) for x in (h, d_logits))
                # Transposed in memory, which the barrier insists on: XLA:CPU's product over leading axes is half as
                # fast.
                h = lax.optimization_barrier(h.T)
                d_head += jnp.einsum("dn,nv->dv", h, d_logits, **sums)
            return d_head, (nll, d_hidden.astype(hidden.dtype))

        parts = _num_pieces(pieces, *targets.shape)
        zeros = jnp.zeros(cast_head.shape, jnp.float32) if head_learns else None
        d_head, (nll, d_hidden) = lax.scan(piece, zeros, tuple(_split(x, parts) for x in (hidden, targets, weights)))
        nll, d_hidden = (_join(x, targets.shape[1]) for x in (nll, d_hidden))
        if d_head is not None:
            d_head = own_part(d_head, places.embed_axes, places.token_axes, 0)[:, :words]
        return nll, d_hidden, d_head

    hidden_spec = PartitionSpec(*places.tokens, None)
    in_specs = (hidden_spec, places.head, places.tokens, places.tokens)
    mapped = on_mesh(on_device, in_specs, (places.tokens, hidden_spec, places.head if head_learns else None))
    nll, d_hidden, d_head = mapped(hidden, head, targets, weights)
    # The empty slice carries the head's dtype to the backward pass.
    return (nll * weights).sum(), (d_hidden, d_head, nll, head[:0])


def _weighted_sum_backward(pieces, compute_dtype, head_learns, residuals, d_total):
    d_hidden, d_head, nll, like_head = residuals
    return (
        (d_hidden * d_total).astype(d_hidden.dtype),
        None if d_head is None else (d_head * d_total).astype(like_head.dtype),
        None,
        nll * d_total,
    )


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    pieces: int | None = None,
    compute_dtype: DTypeLike | None = None,
    head_learns: bool = True,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Σ weights · nll, Σ weights), float32, where nll is that of the targets under softmax(hidden @ head), in nats.

    The caller divides, after summing both over whatever the mean is to be taken over. Differentiable once (within
    `ops.plain()` any number of times), in `hidden`, `head` and `weights`; gradients have the dtypes of their arguments.
    A token of weight 0 adds nothing, whatever its target, as long as that is in [0, V).

    `pieces`: how many parts a device's tokens of a row are cut into; None: parts of one or two thousand tokens.
    `compute_dtype`: that of the factors of the products, which are summed in float32; None: that of `hidden`.
    `head_learns`: False leaves out the head's gradient, which is then 0. Raises ValueError for an impossible number of
    pieces.
    """
    _check_pieces(pieces, targets.shape[1])
    compute_dtype = hidden.dtype if compute_dtype is None else compute_dtype
    weights = weights.astype(jnp.float32)
    how = pieces, jnp.dtype(compute_dtype), head_learns
    return _weighted_sum(hidden, head, targets, weights, *how), weights.sum()
