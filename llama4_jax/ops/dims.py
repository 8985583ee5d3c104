"""The dimensions of a product of two arrays, and of the two products that are its gradient.

A product's result has the dimensions [batch, lhs kept, rhs kept], each in the order of its operand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

# (lhs, rhs, dimension numbers) -> their product
Multiply = Callable[[Array, Array, Numbers], Array]


class Dims(NamedTuple):
    """Of a product of arrays of these shapes. Hashable."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    numbers: Numbers

    @classmethod
    def of(cls, lhs: Array, rhs: Array, dimension_numbers) -> "Dims":
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
        contract, batch = (tuple(lhs_contract), tuple(rhs_contract)), (tuple(lhs_batch), tuple(rhs_batch))
        return cls(tuple(lhs.shape), tuple(rhs.shape), (contract, batch))

    @property
    def lhs_kept(self) -> list[int]:
        (contract, _), (batch, _) = self.numbers
        return [d for d in range(len(self.lhs)) if d not in (*contract, *batch)]

    @property
    def rhs_kept(self) -> list[int]:
        (_, contract), (_, batch) = self.numbers
        return [d for d in range(len(self.rhs)) if d not in (*contract, *batch)]

    @property
    def result(self) -> tuple[list[int], list[int], list[int]]:
        """Which of the result's dimensions are batch, lhs's and rhs's."""
        batch, lhs, rhs = len(self.numbers[1][0]), len(self.lhs_kept), len(self.rhs_kept)
        return list(range(batch)), list(range(batch, batch + lhs)), list(range(batch + lhs, batch + lhs + rhs))

    def lhs_gradient(self, multiply: Multiply, g: Float[Array, "..."], rhs: Array) -> Float[Array, "..."]:
        """Of the cotangent g, as lhs has its dimensions."""
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = self.numbers
        batch, _, g_rhs = self.result
        product = multiply(g, rhs, ((tuple(g_rhs), tuple(self.rhs_kept)), (tuple(batch), rhs_batch)))
        # [batch, lhs_kept, lhs_contract]: a product leaves the other side's dimensions in their own order, so the
        # contracted ones come out sorted as rhs has them.
        dims = [*lhs_batch, *self.lhs_kept, *(c for _, c in sorted(zip(rhs_contract, lhs_contract, strict=True)))]
        return _put_back(product, dims)

    def rhs_gradient(self, multiply: Multiply, lhs: Array, g: Float[Array, "..."]) -> Float[Array, "..."]:
        """Of the cotangent g, as rhs has its dimensions."""
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = self.numbers
        batch, g_lhs, _ = self.result
        # lhs first, so that the gradient of weights [in, out] needs no transpose: [batch, rhs_contract, rhs_kept].
        product = multiply(lhs, g, ((tuple(self.lhs_kept), tuple(g_lhs)), (lhs_batch, tuple(batch))))
        dims = [*rhs_batch, *(c for _, c in sorted(zip(lhs_contract, rhs_contract, strict=True))), *self.rhs_kept]
        return _put_back(product, dims)

    def beside_lhs(self, of_lhs: Float[Array, "..."]) -> Float[Array, "..."]:
        """What lhs has one of for each row (its contracted dimensions have size 1), to be broadcast over the result.
        A scalar stays one."""
        if of_lhs.ndim == 0:
            return of_lhs
        (contract, _), (batch, _) = self.numbers
        moved = of_lhs.squeeze(contract).transpose(_ranks([*batch, *self.lhs_kept]))
        return moved.reshape(*moved.shape, *[1] * len(self.rhs_kept))

    def beside_rhs(self, of_rhs: Float[Array, "..."]) -> Float[Array, "..."]:
        """The same for rhs and its columns."""
        if of_rhs.ndim == 0:
            return of_rhs
        (_, contract), (_, batch) = self.numbers
        moved = of_rhs.squeeze(contract).transpose(_ranks([*batch, *self.rhs_kept]))
        places = len(batch)
        return moved.reshape(*moved.shape[:places], *[1] * len(self.lhs_kept), *moved.shape[places:])

    def lhs_matrix(self, lhs: Float[Array, "..."]) -> Float[Array, "b m k"]:
        """lhs with each kind of dimension in one: batch, kept, contracted."""
        (contract, _), (batch, _) = self.numbers
        return _merged(lhs, batch, self.lhs_kept, contract)

    def rhs_matrix(self, rhs: Float[Array, "..."]) -> Float[Array, "b k n"]:
        """rhs likewise: batch, contracted, kept."""
        (_, contract), (_, batch) = self.numbers
        return _merged(rhs, batch, contract, self.rhs_kept)

    def result_matrix(self, y: Float[Array, "..."]) -> Float[Array, "b m n"]:
        return _merged(y, *self.result)

    def from_result_matrix(self, y: Float[Array, "b m n"]) -> Float[Array, "..."]:
        batch = [self.lhs[d] for d in self.numbers[1][0]]
        return y.reshape(*batch, *(self.lhs[d] for d in self.lhs_kept), *(self.rhs[d] for d in self.rhs_kept))

    def from_lhs_matrix(self, x: Float[Array, "b m k"]) -> Float[Array, "..."]:
        (contract, _), (batch, _) = self.numbers
        dims = [*batch, *self.lhs_kept, *contract]
        return _put_back(x.reshape([self.lhs[d] for d in dims]), dims)

    def from_rhs_matrix(self, w: Float[Array, "b k n"]) -> Float[Array, "..."]:
        (_, contract), (_, batch) = self.numbers
        dims = [*batch, *contract, *self.rhs_kept]
        return _put_back(w.reshape([self.rhs[d] for d in dims]), dims)


def _put_back(x: Float[Array, "..."], dims: list[int]) -> Float[Array, "..."]:
    """Moves dimension i of x to dims[i]."""
    return jnp.transpose(x, [dims.index(d) for d in range(x.ndim)])


def _ranks(dims: list[int]) -> list[int]:
    """Each one's place among the sorted."""
    return [sorted(dims).index(d) for d in dims]


def _merged(x: Float[Array, "..."], *kinds) -> Float[Array, "_ _ _"]:
    moved = jnp.transpose(x, [d for dims in kinds for d in dims])
    return moved.reshape([math.prod(x.shape[d] for d in dims) for dims in kinds])
