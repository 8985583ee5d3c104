"""Matrix products in 8-bit floats, for training: forward and both products of the gradient.

    dot_general = fp8_dot_general(granularity="row")
    nnx.Linear(512, 512, dot_general=dot_general, rngs=rngs)

Scales are dynamic: the largest magnitude of what is about to be rounded, divided by the format's. They are part of no
state, so the products work unchanged under scan, remat, vmap, on meshes, in checkpoints and in evaluation. (Delayed
scaling keeps a history of them instead, and saves reading an operand twice; but the step in which magnitudes grow
fourfold is then wrong by 30 %.) On a mesh a scale is that of the whole array, whatever its parts: the partitioner
takes the largest over all devices.

What shares a scale (`granularity`):

- "tensor": a whole operand. A float's error is relative, so this is as good as any until numbers fall below the
  format's subnormals: rows 2^15 times smaller than the largest are lost.
- "row": what is summed up in one result: rows of lhs, columns of rhs. Rescaling is by row and column of the result, so
  the product itself is still one of 8-bit floats.
- "block": DeepSeek-V3's recipe, 128 numbers of a row of lhs, 128 x 128 of rhs, as *numerics only*: operands are rounded
  to what the recipe would make of them and multiplied in float32. Scales within a sum need a kernel of their own.

Values that are not finite come out as such, and never as numbers: the training step then leaves the update out.

Sources: the XLA pass that rewrites scaled products for Hopper's tensor cores (openxla gemm_rewriter.cc) decides what
may stand where; DeepSeek-V3 (arXiv 2412.19437) section 3.3.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from llama4_jax.ops.dims import Dims, Numbers
from llama4_jax.sharding import brought, given_home, where_used

FORMATS = ("float8_e4m3fn", "float8_e5m2")
BLOCK = 128


class Scaled(NamedTuple):
    """values · scale, with float32 scales that broadcast."""

    values: Float[Array, "..."]
    scale: Float[Array, "..."]


@dataclass(frozen=True)
class Fp8DotGeneral:
    """A `dot_general` in 8-bit floats; see `fp8_dot_general`."""

    granularity: str = "tensor"
    forward: str = "float8_e4m3fn"
    gradient: str = "float8_e5m2"

    def __post_init__(self):
        if self.granularity not in ("tensor", "row", "block"):
            raise ValueError(f"fp8 granularity must be tensor, row or block, got {self.granularity!r}.")
        for name in ("forward", "gradient"):
            if getattr(self, name) not in FORMATS:
                raise ValueError(f"fp8 {name} must be one of {', '.join(FORMATS)}, got {getattr(self, name)!r}.")

    def __call__(
        self,
        lhs: Float[Array, "..."],
        rhs: Float[Array, "..."],
        dimension_numbers,
        precision=None,
        preferred_element_type=None,
        *,
        out_sharding=None,
    ) -> Float[Array, "..."]:
        out_dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
        return _dot_general(lhs, rhs, self, Dims.of(lhs, rhs, dimension_numbers), out_dtype, None)

    def linear(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."], axes: tuple[str, ...], num_contract: int
    ) -> Float[Array, "..."]:
        """x [..., in dims] · a parameter [in dims, out dims] whose axes have these names. Where the mesh splits it, it
        is rounded where it lives, so that what is gathered is 8 bits a number."""
        over = tuple(range(num_contract))
        dims = Dims.of(x, kernel, ((tuple(x.ndim - num_contract + d for d in over), over), ((), ())))
        return _dot_general(x, kernel, self, dims, x.dtype, where_used(kernel.shape, *axes))


def fp8_dot_general(
    granularity: str = "tensor", forward: str = "float8_e4m3fn", gradient: str = "float8_e5m2"
) -> Fp8DotGeneral:
    """A drop-in for `jax.lax.dot_general` whose three products multiply 8-bit floats and add up in float32.

    - granularity: what shares a scale, see above; "block" takes rhs for the weights
    - forward: of both operands, "float8_e4m3fn" or "float8_e5m2"; they are kept in it for the backward pass
    - gradient: of the cotangent

    Its result is of lhs's dtype, or `preferred_element_type`; gradients are of their operand's dtype. `precision` and
    `out_sharding` are accepted, as flax passes them, and change nothing. Raises ValueError for other values.
    """
    return Fp8DotGeneral(granularity, forward, gradient)


def largest(x: Float[Array, "..."], dims: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest magnitude, in float32: of all, a scalar, or over these dimensions, which stay with size 1."""
    return jnp.max(jnp.abs(x), axis=dims, keepdims=dims is not None, initial=0).astype(jnp.float32)


def scale_for(amax: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """What to divide by, so that the largest number of `dtype` stands for `amax`. Never 0."""
    return jnp.maximum(amax / float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32).tiny)


def rounded(x: Float[Array, "..."], scale: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """x / scale in `dtype`. What rounding makes too large becomes the largest: e4m3fn has no infinity but NaN."""
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -most, most).astype(dtype)


def quantize(x: Float[Array, "..."], dtype: str, dims: tuple[int, ...] | None = None) -> Scaled:
    """With one scale for all that these dimensions span (None: all)."""
    scale = scale_for(largest(x, dims), dtype)
    return Scaled(rounded(x, scale, dtype), scale)


def in_tiles(x: Float[Array, "... m n"], dtype: str, tile: tuple[int, int]) -> Float[Array, "... m n"]:
    """What is left of x, in float32, when each tile of the last two dimensions is rounded with a scale of its own. The
    last tiles may be smaller."""
    *_, rows, columns = x.shape
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -rows % tile[0]), (0, -columns % tile[1])]
    parts = {"m": tile[0], "n": tile[1]}
    tiles = rearrange(jnp.pad(x, padding), "... (rows m) (columns n) -> ... rows m columns n", **parts)
    values, scale = quantize(tiles, dtype, (tiles.ndim - 3, tiles.ndim - 1))
    whole = rearrange(values.astype(jnp.float32) * scale, "... rows m columns n -> ... (rows m) (columns n)")
    return whole[..., :rows, :columns]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _dot_general(lhs, rhs, recipe: Fp8DotGeneral, dims: Dims, out_dtype, places):
    return _forward(lhs, rhs, recipe, dims, out_dtype, places)[0]


def _forward(lhs, rhs, recipe: Fp8DotGeneral, dims: Dims, out_dtype, places):
    like = jnp.zeros((), lhs.dtype), jnp.zeros((), rhs.dtype)  # carry the dtypes to the backward pass
    if recipe.granularity == "block":
        rhs = rhs if places is None else brought(rhs, *places)
        x = in_tiles(dims.lhs_matrix(lhs), recipe.forward, (1, BLOCK))
        w = in_tiles(dims.rhs_matrix(rhs), recipe.forward, (BLOCK, BLOCK))
        return dims.from_result_matrix(_matmul(x, w)).astype(out_dtype), (lhs, rhs, like)
    (lhs_summed, rhs_summed), _ = dims.numbers if recipe.granularity == "row" else ((None, None), None)
    x, w = quantize(lhs, recipe.forward, lhs_summed), quantize(rhs, recipe.forward, rhs_summed)
    if places is not None:
        w = Scaled(brought(w.values, *places), w.scale)
    y = _product(x.values, w.values, dims.numbers) * (dims.beside_lhs(x.scale) * dims.beside_rhs(w.scale))
    return y.astype(out_dtype), (x, w, like)


def _backward(recipe: Fp8DotGeneral, dims: Dims, out_dtype, places, saved, g):
    x, w, like = saved
    gradients = {"tensor": _tensor_gradients, "row": _row_gradients, "block": _block_gradients}
    lhs_grad, rhs_grad = gradients[recipe.granularity](recipe, dims, x, w, g)
    if places is not None:
        rhs_grad = given_home(rhs_grad, *places)
    return lhs_grad.astype(like[0].dtype), rhs_grad.astype(like[1].dtype)


_dot_general.defvjp(_forward, _backward)


def _tensor_gradients(recipe: Fp8DotGeneral, dims: Dims, x: Scaled, w: Scaled, g):
    g = quantize(g, recipe.gradient)
    lhs_grad = dims.lhs_gradient(_product, g.values, w.values) * (g.scale * w.scale)
    return lhs_grad, dims.rhs_gradient(_product, x.values, g.values) * (x.scale * g.scale)


def _row_gradients(recipe: Fp8DotGeneral, dims: Dims, x: Scaled, w: Scaled, g):
    # In each product of the gradient the kept operand's scales lie along the sum. They go into the cotangent, before
    # it gets scales that do not.
    batch, of_lhs, of_rhs = dims.result
    for_lhs = quantize(g * dims.beside_rhs(w.scale), recipe.gradient, tuple(of_rhs))
    for_rhs = quantize(g * dims.beside_lhs(x.scale), recipe.gradient, tuple(of_lhs))

    def lhs_product(g, w, numbers):  # [batch, of_lhs, what was contracted]
        y, scale = _product(g, w, numbers), for_lhs.scale.squeeze(of_rhs)
        return y * lax.expand_dims(scale, range(scale.ndim, y.ndim))

    def rhs_product(x, g, numbers):  # [batch, what was contracted, of_rhs]
        y, scale = _product(x, g, numbers), for_rhs.scale.squeeze(of_lhs)
        return y * lax.expand_dims(scale, range(len(batch), len(batch) + y.ndim - scale.ndim))

    lhs_grad = dims.lhs_gradient(lhs_product, for_lhs.values, w.values)
    return lhs_grad, dims.rhs_gradient(rhs_product, x.values, for_rhs.values)


def _block_gradients(recipe: Fp8DotGeneral, dims: Dims, lhs, rhs, g):
    x, w, g = dims.lhs_matrix(lhs), dims.rhs_matrix(rhs), dims.result_matrix(g)
    along_columns = in_tiles(g, recipe.gradient, (1, BLOCK))
    lhs_grad = _matmul(along_columns, in_tiles(w, recipe.forward, (BLOCK, BLOCK)).mT)
    # The sum over rows wants tiles along them: operands are cut anew.
    down_rows = in_tiles(g, recipe.gradient, (BLOCK, 1))
    rhs_grad = _matmul(in_tiles(x, recipe.forward, (BLOCK, 1)).mT, down_rows)
    return dims.from_lhs_matrix(lhs_grad), dims.from_rhs_matrix(rhs_grad)


def _product(lhs, rhs, numbers: Numbers) -> Float[Array, "..."]:
    return lax.dot_general(lhs, rhs, numbers, preferred_element_type=jnp.float32)


def _matmul(x: Float[Array, "b m k"], w: Float[Array, "b k n"]) -> Float[Array, "b m n"]:
    return jnp.matmul(x, w, precision="highest")
