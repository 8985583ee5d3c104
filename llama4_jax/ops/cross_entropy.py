"""Cross entropy of a linear head, a piece of the tokens at a time: the logits [B, T, V] never exist whole.

With a vocabulary of 202 048 the float32 logits of 8 rows of 8192 tokens take 53 GB; the hidden states they come from
take 0.6 GB. The loss is one number, so its cotangent only scales the gradients: they are computed together with the
loss while a piece's logits are at hand, and the backward pass recomputes nothing.

Pieces are interleaved, piece p holding tokens p, p + P, p + 2P, … of each row: a sequence that is sharded over
devices then has a share of every piece on each of them.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sharding import constrain, mesh_axes, ways

# Default size of a piece, a device: with fewer tokens, adding to the head's gradient costs more than the products do;
# with more, the logits only take more memory (128 MiB of float32 for 32 768 words).
PIECE_TOKENS = 1024


def _num_pieces(pieces: int | None, targets: Int[Array, "B T"]) -> int:
    rows, num_tokens = targets.shape
    if pieces is None:
        return min(num_tokens, math.ceil(rows // _batch_shards(rows) * num_tokens / PIECE_TOKENS))
    if not 1 <= pieces <= num_tokens:
        raise ValueError(f"cross entropy: pieces must be between 1 and the {num_tokens} tokens of a row, got {pieces}.")
    return pieces


def _split(x: Array, pieces: int) -> Array:
    """[B, T, ...] -> [pieces, B, tokens, ...]; zeros fill the last tokens."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % pieces)
    return rearrange(jnp.pad(x, widths), "b (t p) ... -> p b t ...", p=pieces)


def _join(x: Array, num_tokens: int) -> Array:
    return rearrange(x, "p b t ... -> b (t p) ...")[:, :num_tokens]


def _logits(hidden: Float[Array, "... D"], head: Float[Array, "D V"]) -> Float[Array, "... V"]:
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _prepare(head: Float[Array, "D V"], compute_dtype: DTypeLike) -> Float[Array, "D V"]:
    """Cast, and gathered along D where it is sharded so: once, not in every piece."""
    return constrain(head.astype(compute_dtype), "embed", "vocab")


def _nll(logits: Float[Array, "... V"], targets: Int[Array, "..."]):
    """Negative log-likelihood, and softmax as (numerator, denominator)."""
    peak = logits.max(-1, keepdims=True)
    numerator = jnp.exp(logits - peak)
    denominator = numerator.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (jnp.log(denominator) + peak - chosen)[..., 0], numerator, denominator


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
    pieces = _num_pieces(pieces, targets)
    compute_dtype = hidden.dtype if compute_dtype is None else compute_dtype
    head = _prepare(head, compute_dtype)

    @jax.checkpoint
    def piece(_, x):
        hidden, targets = x
        logits = _logits(hidden.astype(compute_dtype), head)
        return None, TokenScores(_nll(logits, targets)[0], jnp.argmax(logits, axis=-1) == targets)

    _, scores = lax.scan(piece, None, (_split(hidden, pieces), _split(targets, pieces)))
    return TokenScores(*(_join(x, targets.shape[1]) for x in scores))


def token_nll(hidden, head, targets, *, pieces=None, compute_dtype=None) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32: `token_scores(…).nll`."""
    return token_scores(hidden, head, targets, pieces=pieces, compute_dtype=compute_dtype).nll


def _batch_shards(batch: int) -> int:
    """Over how many devices the rows are spread by the mesh in use; 1 where they cannot be spread evenly."""
    shards = ways(mesh_axes("batch"))
    return shards if batch % shards == 0 else 1


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_sum(hidden, head, targets, weights, pieces, compute_dtype):
    nll = token_nll(hidden, head, targets, pieces=pieces, compute_dtype=compute_dtype)
    return (nll * weights).sum()


def _weighted_sum_forward(hidden, head, targets, weights, pieces, compute_dtype):
    cast_head = _prepare(head, compute_dtype)
    shards = _batch_shards(hidden.shape[0])

    def piece(d_head, x):
        hidden, targets, weights = x
        h = hidden.astype(compute_dtype)
        nll, numerator, denominator = _nll(_logits(h, cast_head), targets)
        chosen = targets[..., None] == jnp.arange(head.shape[1])
        d_logits = numerator * (weights[..., None] / denominator) - jnp.where(chosen, weights[..., None], 0)
        d_logits = d_logits.astype(compute_dtype)
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, cast_head, preferred_element_type=jnp.float32)
        # One sum per shard of the batch: devices add theirs up once, after the last piece, not in every one.
        h, d_logits = (x.reshape(shards, -1, x.shape[-1]) for x in (h, d_logits))
        # Transposed in memory, which the barrier insists on: XLA's product over leading axes on a CPU is half as fast.
        h = lax.optimization_barrier(h.swapaxes(1, 2))
        d_head += jnp.einsum("rdn,rnv->rdv", h, d_logits, preferred_element_type=jnp.float32)
        return constrain(d_head, "batch", "embed", "vocab"), (nll, d_hidden.astype(hidden.dtype))

    d_head = constrain(jnp.zeros((shards, *head.shape), jnp.float32), "batch", "embed", "vocab")
    d_head, (nll, d_hidden) = lax.scan(piece, d_head, tuple(_split(x, pieces) for x in (hidden, targets, weights)))
    nll, d_hidden = (_join(x, targets.shape[1]) for x in (nll, d_hidden))
    # The empty slice carries the head's dtype to the backward pass.
    return (nll * weights).sum(), (d_hidden, d_head.sum(0), nll, head[:0])


def _weighted_sum_backward(pieces, compute_dtype, residuals, d_total):
    d_hidden, d_head, nll, like_head = residuals
    return (
        (d_hidden * d_total).astype(d_hidden.dtype),
        (d_head * d_total).astype(like_head.dtype),
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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Σ weights · nll, Σ weights), float32, where nll is that of the targets under softmax(hidden @ head), in nats.

    The caller divides, after summing both over whatever the mean is to be taken over. Differentiable once, in
    `hidden`, `head` and `weights`; gradients have the dtypes of their arguments. A token of weight 0 adds nothing,
    whatever its target, as long as that is in [0, V).

    `pieces`: how many parts T is cut into; None: parts of about 1024 tokens a device. `compute_dtype`: that of the
    factors of the products, which are summed in float32; None: that of `hidden`. Raises ValueError for an impossible
    number of pieces.
    """
    pieces = _num_pieces(pieces, targets)
    compute_dtype = hidden.dtype if compute_dtype is None else compute_dtype
    weights = weights.astype(jnp.float32)
    return _weighted_sum(hidden, head, targets, weights, pieces, jnp.dtype(compute_dtype)), weights.sum()
