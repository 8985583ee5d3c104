"""One of the two products of the routed experts, plain or in 8-bit floats, with its gradient written out.

It runs in `shard_map`, on rows sorted by expert. A device's part of the matrices [E *P I O] lacks some of the inputs or
outputs, which are gathered before the product (fsdp), and some of the other, which stay apart (tensor).

In 8-bit floats, scales never cross experts: the tokens of one do not lose their bits to an outlier among another's.
"tensor" gives each expert's rows one scale, and its matrices one; "row" each row, and each column of each matrix;
"block" is DeepSeek-V3's recipe as numerics only, whose tiles of rows are cut anew for each expert. An expert's rows,
inputs and outputs may be on several devices: scales are taken over the mesh axes that split what shares one, so that
the numbers are those of one device. (Tiles of "block" are those of a device's part.)

Matrices may stay as they are while something else learns (`learns`): then no gradient of theirs is computed. They may
be quantized (`QuantizedProduct`), and have low-rank factors beside them (`AdaptedProduct`).

Only the loop over blocks takes operands of 8 bits. A kernel gets them, exactly, in the dtype of the result: on a TPU
they save memory, and what is sent, and no time.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_jax.ops.fp8 import BLOCK, Fp8DotGeneral, Scaled, in_tiles, largest, rounded, scale_for
from llama4_jax.ops.grouped_matmul import PRODUCTS
from llama4_jax.ops.plain import gathered_for_use
from llama4_jax.ops.quantization import Quantized
from llama4_jax.ops.quantized_matmul import quantized_grouped_matmul, quantized_grouped_row_gradient
from llama4_jax.ops.row_blocks import largest_of_groups
from llama4_jax.sharding import gathered, given_back


class Adapted(NamedTuple):
    """Matrices with low-rank factors: w + a · b of each expert, which is never made."""

    w: Float[Array, "E *P I O"] | Quantized
    a: Float[Array, "E I r"]
    b: Float[Array, "E *P r O"]


@dataclass(frozen=True)
class Split:
    """How the mesh splits a product. Each field names mesh axes.

    - gathered: split the matrices along dimension `dimension` (-2: inputs, -1: outputs) where they live
    - inner, outer: split the inputs, the outputs, of matrices and rows; they are not gathered
    - rows: split the rows of one expert
    """

    gathered: tuple[str, ...] = ()
    dimension: int = -2
    inner: tuple[str, ...] = ()
    outer: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Product:
    """Rows · the matrices of their experts, in the dtype of the rows.

    - prepare: a device's part of the matrices → what it multiplies with (`used`)
    - keep: rows → what the product, and later its gradient, takes of them (`kept`)
    - forward: kept, used → [R *P O]; backward: the gradients of rows and matrices, [R I] and [E *P I O]
    - give_back: the gradient of what was used → that of a device's part; `like` has the dtypes of that

    `dtype` is that of the rows, which results and gradients take. implementation: a key of `grouped_matmul.PRODUCTS`.
    learns: whether the matrices do; where not, their gradients are None everywhere.
    """

    implementation: str
    split: Split = field(default_factory=Split)
    learns: bool = True

    def dtypes(self, dtype) -> tuple:
        """The dtypes of the two gradients; None for one that is not computed."""
        return dtype, dtype if self.learns else None

    def prepare(self, w, dtype):
        return gathered_for_use(w, dtype, self.split.gathered, w.ndim + self.split.dimension)

    def keep(self, x, group_sizes):
        return x

    def forward(self, kept, used, group_sizes, dtype):
        return PRODUCTS[self.implementation].forward(kept, used, group_sizes, dtype)

    def backward(self, kept, used, group_sizes, g, dtype):
        return PRODUCTS[self.implementation].backward(kept, used, g, g, group_sizes, self.dtypes(dtype))

    def gradient_like(self, used):
        return jnp.zeros(used.shape, jnp.float32) if self.learns else None

    def give_back(self, d_w, like):
        if d_w is None:
            return None
        return given_back(d_w, like.dtype, self.split.gathered, d_w.ndim + self.split.dimension)


@dataclass(frozen=True)
class BlockFp8Product(Product):
    """Operands rounded to what the recipe makes of them, and multiplied in float32."""

    recipe: Fp8DotGeneral = field(default_factory=Fp8DotGeneral)

    def forward(self, kept, used, group_sizes, dtype):
        x, w = in_tiles(kept, self.recipe.forward, (1, BLOCK)), in_tiles(used, self.recipe.forward, (BLOCK, BLOCK))
        return super().forward(x, w, group_sizes, dtype)

    def backward(self, kept, used, group_sizes, g, dtype):
        along = in_tiles(g, self.recipe.gradient, (1, BLOCK))
        down = _in_tiles_of_rows(g, group_sizes, self.recipe.gradient)
        x = _in_tiles_of_rows(kept, group_sizes, self.recipe.forward)
        w = in_tiles(used, self.recipe.forward, (BLOCK, BLOCK))
        return PRODUCTS[self.implementation].backward(x, w, along, down, group_sizes, self.dtypes(dtype))


@dataclass(frozen=True)
class Fp8Product(Product):
    """Operands in 8 bits, with a scale an expert or, by the recipe, a row and a column."""

    recipe: Fp8DotGeneral = field(default_factory=Fp8DotGeneral)

    @property
    def by_row(self) -> bool:
        return self.recipe.granularity == "row"

    def prepare(self, w, dtype) -> Scaled:
        split, dimension = self.split, w.ndim + self.split.dimension
        whole = tuple(range(1, w.ndim))
        spanned = (w.ndim - 2,) if self.by_row else whole
        over = split.inner if self.by_row else (*split.inner, *split.outer)
        if not self.by_row or split.dimension == -2:
            over = (*over, *split.gathered)
        scale = scale_for(_over(largest(w, spanned), over), self.recipe.forward)
        values = rounded(w, scale, self.recipe.forward)
        if scale.shape[dimension] > 1:  # a part of the columns
            scale = gathered(scale, scale.dtype, split.gathered, dimension)
        return Scaled(gathered(values, values.dtype, split.gathered, dimension), scale)

    def gradient_like(self, used: Scaled):
        return super().gradient_like(used.values)

    def keep(self, x, group_sizes) -> Scaled:
        amax = _over(largest(x, (1,)), self.split.inner)
        if not self.by_row:
            amax = _of_rows(_over(largest_of_groups(amax, group_sizes), self.split.rows), group_sizes, len(x))
        scale = scale_for(amax, self.recipe.forward)
        return Scaled(rounded(x, scale, self.recipe.forward), scale)

    def forward(self, kept: Scaled, used: Scaled, group_sizes, dtype):
        if self.by_row:
            rows, columns = kept.scale, used.scale
        else:
            rows, columns = kept.scale * _of_rows(_flat(used.scale), group_sizes, len(kept.values)), None
        multiply = PRODUCTS[self.implementation].forward
        if self.implementation == "blocks":
            return multiply(kept.values, used.values, group_sizes, dtype, (rows, columns))
        y = multiply(kept.values.astype(dtype), used.values.astype(dtype), group_sizes, jnp.float32)
        y *= lax.expand_dims(rows[:, 0], range(1, y.ndim))
        return (y if columns is None else y * _of_rows(columns.squeeze(-2), group_sizes, len(y))).astype(dtype)

    def backward(self, kept: Scaled, used: Scaled, group_sizes, g, dtype):
        gradients = self._row_gradients if self.by_row else self._expert_gradients
        for_x, for_w, rows, columns = gradients(kept, used, group_sizes, g)
        multiply = PRODUCTS[self.implementation].backward
        if self.implementation == "blocks":
            return multiply(kept.values, used.values, for_x, for_w, group_sizes, self.dtypes(dtype), (rows, columns))
        operands = (y.astype(dtype) for y in (kept.values, used.values, for_x, for_w))
        d_x, d_w = multiply(*operands, group_sizes, self.dtypes(jnp.float32))
        return (d_x * rows).astype(dtype), None if d_w is None else (d_w * columns).astype(dtype)

    def _expert_gradients(self, kept, used, group_sizes, g):
        """g for both products, and the scales of both."""
        split, num_rows = self.split, len(g)
        amax = largest_of_groups(largest(g.reshape(num_rows, -1), (1,)), group_sizes)
        of_g = scale_for(_over(amax, (*split.rows, *split.outer)), self.recipe.gradient)
        of_rows = _of_rows(of_g, group_sizes, num_rows)
        values = rounded(g, _beside(of_rows, g), self.recipe.gradient)
        # An expert without rows has no gradient, and needs no scale.
        columns = largest_of_groups(kept.scale, group_sizes) * of_g
        return (
            values,
            values,
            of_rows * _of_rows(_flat(used.scale), group_sizes, num_rows),
            columns.reshape(used.scale.shape),
        )

    def _row_gradients(self, kept, used, group_sizes, g):
        """g for each product, times the other operand's scales, which lie along its sum; and the scales of both."""
        g, num_rows = g.astype(jnp.float32), len(g)
        for_x = g * _of_rows(used.scale.squeeze(-2), group_sizes, num_rows)
        for_w = g * _beside(kept.scale, g)
        rows = scale_for(_over(largest(for_x.reshape(num_rows, -1), (1,)), self.split.outer), self.recipe.gradient)
        amax = _over(largest_of_groups(for_w, group_sizes), self.split.rows)
        columns = scale_for(amax, self.recipe.gradient)
        return (
            rounded(for_x, _beside(rows, g), self.recipe.gradient),
            rounded(for_w, _of_rows(columns, group_sizes, num_rows), self.recipe.gradient),
            rows,
            jnp.expand_dims(columns, -2),
        )


@dataclass(frozen=True)
class QuantizedProduct(Product):
    """Products with quantized matrices, which do not learn: the gradient flows through the dequantized product to the
    rows.

    - of_scales: mesh axes that split the scales along the dimension that is gathered
    - activations: of `quantized_matmul`
    """

    learns: bool = False
    of_scales: tuple[str, ...] = ()
    activations: str = "float"

    def prepare(self, w: Quantized, dtype) -> Quantized:
        axes, dimension = (self.split.gathered, self.of_scales), w.values.ndim + self.split.dimension
        return Quantized(*(gathered(part, part.dtype, own, dimension) for part, own in zip(w, axes, strict=True)))

    def forward(self, kept, used: Quantized, group_sizes, dtype):
        how = {"activations": self.activations, "axes": self.split.inner}
        return quantized_grouped_matmul(kept, used, group_sizes, **how)

    def backward(self, kept, used: Quantized, group_sizes, g, dtype):
        return quantized_grouped_row_gradient(g, used, group_sizes, dtype), None


@dataclass(frozen=True)
class AdaptedProduct:
    """x · w + (x · a) · b of each row's expert, as grouped products: nothing of w's size is made. A `Product` of
    `Adapted` matrices."""

    base: Product
    first: Product  # with a
    second: Product  # with b

    def prepare(self, w: Adapted, dtype) -> Adapted:
        return Adapted(self.base.prepare(w.w, dtype), self.first.prepare(w.a, dtype), self.second.prepare(w.b, dtype))

    def keep(self, x, group_sizes):
        return self.base.keep(x, group_sizes), x

    def forward(self, kept, used: Adapted, group_sizes, dtype):
        of_base, x = kept
        y = self.base.forward(of_base, used.w, group_sizes, dtype)
        return y + self.second.forward(self._narrow(x, used, group_sizes), used.b, group_sizes, dtype)

    def backward(self, kept, used: Adapted, group_sizes, g, dtype):
        of_base, x = kept
        d_x, d_w = self.base.backward(of_base, used.w, group_sizes, g, dtype)
        d_narrow, d_b = self.second.backward(self._narrow(x, used, group_sizes), used.b, group_sizes, g, dtype)
        more, d_a = self.first.backward(x, used.a, group_sizes, d_narrow, dtype)
        return d_x + more, Adapted(d_w, d_a, d_b)

    def gradient_like(self, used: Adapted) -> Adapted:
        products = self.base, self.first, self.second
        return Adapted(*(product.gradient_like(part) for product, part in zip(products, used, strict=True)))

    def give_back(self, d: Adapted, like: Adapted) -> Adapted:
        products = self.base, self.first, self.second
        return Adapted(*(p.give_back(part, own) for p, part, own in zip(products, d, like, strict=True)))

    def _narrow(self, x, used: Adapted, group_sizes) -> Float[Array, "R r"]:
        return self.first.forward(x, used.a, group_sizes, x.dtype)


def make_product(implementation: str, recipe: Fp8DotGeneral | None, split: Split, *, learns: bool = True) -> Product:
    """recipe: None multiplies in the dtype of the rows."""
    if recipe is None:
        return Product(implementation, split, learns)
    kind = BlockFp8Product if recipe.granularity == "block" else Fp8Product
    return kind(implementation, split, learns, recipe)


def _over(amax: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    return lax.pmax(amax, axes) if axes else amax


def _flat(scale: Float[Array, "E ..."]) -> Float[Array, "E 1"]:
    return scale.reshape(len(scale), 1)


def _beside(of_rows: Float[Array, "R 1"], x: Float[Array, "R *N"]) -> Float[Array, "R *_"]:
    return lax.expand_dims(of_rows[:, 0], range(1, x.ndim))


def _expert_of_rows(group_sizes: Int[Array, " E"], num_rows: int) -> Int[Array, " R"]:
    """E for rows of none."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right", method="compare_all")


def _of_rows(of_experts: Float[Array, "E *N"], group_sizes: Int[Array, " E"], num_rows: int) -> Float[Array, "R *N"]:
    """What each row's expert has; for rows of none, what the last has."""
    return of_experts[jnp.minimum(_expert_of_rows(group_sizes, num_rows), len(of_experts) - 1)]


def _in_tiles_of_rows(x: Float[Array, "R *N"], group_sizes: Int[Array, " E"], dtype: str) -> Float[Array, "R *N"]:
    """What is left of x, in float32, with a scale for every `BLOCK` rows of an expert in each column."""
    num_rows, experts = len(x), len(group_sizes)
    expert = _expert_of_rows(group_sizes, num_rows)
    first = jnp.append(jnp.cumsum(group_sizes) - group_sizes, 0)[expert]
    tiles = -(-num_rows // BLOCK)
    tile = expert * tiles + (jnp.arange(num_rows) - first) // BLOCK
    amax = jax.ops.segment_max(jnp.abs(x).astype(jnp.float32), tile, (experts + 1) * tiles)
    scale = scale_for(amax, dtype)[tile]
    return rounded(x, scale, dtype).astype(jnp.float32) * scale
