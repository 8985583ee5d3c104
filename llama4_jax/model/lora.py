"""LoRA: a model of which only low-rank factors beside its matrices learn (arXiv 2106.09685).

    y = x · W + drop(x) · A · B · scale           A: [inputs, rank], B: [rank, outputs], which begins at 0

Every linear layer can have factors, and the routed experts of a layer have factors of each expert, which multiply the
tokens that chose it (`ops.expert_products.AdaptedProduct`); W + A · B is never made. They are ordinary parameters,
named after their layer:

    layers.3.attention.q.lora.a   layers.3.moe.shared.gate_up.lora.b   layers.3.moe.gate_up_lora.a

Each half of a SwiGLU's fused kernel has factors of its own, as the separate matrices of a published
checkpoint would; of routed experts, whose halves are one matrix there, the first factor is shared. The output head,
whose logits are never whole in training, has its factors added to its kernel (`Llama4.head`), without dropout.
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llama4_jax.model.arguments import random_key
from llama4_jax.model.config import LoraConfig, ModelConfig, selects
from llama4_jax.model.layers import Linear
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.moe import MoE
from llama4_jax.model.names import linear_layers, names_of, nearest
from llama4_jax.ops.dot_general import contract, linear
from llama4_jax.ops.expert_products import Adapted
from llama4_jax.ops.experts import DOWN_AXES, GATE_UP_AXES, factor_axes
from llama4_jax.sharding import for_use


class Factor(nnx.Param):
    """A parameter that LoRA adds: float32, whatever the model's."""


class Noise(nnx.Variable):
    """The random bits (uint32 [2], a key's) that decide what is dropped, new for every micro-batch."""


class Factors(nnx.Module):
    """The two factors of a matrix, or of all experts' matrices."""

    def __init__(self, a: Array, b: Array, a_axes: tuple[str, ...], b_axes: tuple[str, ...], lora: LoraConfig):
        self.a = Factor(a, axes=a_axes, eager_sharding=False)
        self.b = Factor(b, axes=b_axes, eager_sharding=False)
        self.scale = lora.scale
        self.rate = lora.dropout
        self.noise = None  # while it trains with dropout: `Noise`

    def dropped(self, x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """x without some of its numbers, chosen for an array of `shape` that is broadcast to it."""
        if self.noise is None:
            return x
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.noise[...]), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class LinearFactors(Factors):
    """The factors of a `Linear`. With "gate_up" among its outputs, each of the two has its own: a [*inputs, 2, r],
    b [2, r, F]."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        a_axes, b_axes = _axes(self.a), _axes(self.b)
        num_contract = a_axes.index("gate_up") if "gate_up" in a_axes else len(a_axes) - 1
        narrow = linear(self.dropped(x, x.shape), self.a[...], a_axes, num_contract, "default")
        b = for_use(self.b[...] * self.scale, x.dtype, *b_axes)
        if b_axes[0] != "gate_up":
            return contract(narrow, b)
        return jnp.stack([contract(narrow[..., i, :], b[i]) for i in range(b.shape[0])], axis=-2)

    def merged(self, kernel: Float[Array, "D V"]) -> Float[Array, "D V"]:
        """kernel + a · b · scale, for a matrix of one input axis and one output axis."""
        return kernel + (contract(self.a[...], self.b[...]) * self.scale).astype(kernel.dtype)


class ExpertFactors(Factors):
    """The factors of one of the two matrices of a layer's routed experts."""

    def beside(self, w) -> Adapted:
        """Dropout leaves out whole inputs of an expert, the same for all its tokens: they are on several devices."""
        a = self.a[...]
        return Adapted(w, self.dropped(a, (*a.shape[:-1], 1)), self.b[...] * self.scale)


def _axes(factor: Factor) -> tuple[str, ...]:
    """Within a scan, a step of which sees a layer, its axis is gone."""
    return tuple(axis for axis in factor.axes if axis != "layers")


def adapted(model: Llama4, lora: LoraConfig, *, seed=0, dropout: bool = False) -> Llama4:
    """The same model, in place, with factors beside the matrices that `lora.targets` choose, and all else fixed.

    Its numbers are those of the model without: B is 0, and A is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), for each
    layer by its name, so that neither depends on how layers are laid out.

    - seed: an integer or a key of `jax.random`
    - dropout: with `Noise`, which is then to be filled for every batch, where lora.dropout is not 0

    Raises ValueError for a pattern that chooses no layer, with the nearest names; for a rank above a matrix's smaller
    side; and for patterns that tell apart layers that are scanned together.
    """
    key, every, used = random_key(seed), [], set()
    for module, names in list(linear_layers(model)):
        module.learns = False
        every += names
        chosen = [[pattern for pattern in lora.targets if selects(pattern, name)] for name in names]
        used.update(pattern for patterns in chosen for pattern in patterns)
        if len(set(map(bool, chosen))) > 1:
            out, into = (
                next(n for n, c in zip(names, chosen, strict=True) if bool(c) is is_in) for is_in in (False, True)
            )
            raise ValueError(
                f"lora.targets tell apart layers that are scanned together ({into} is one and {out} is none): set "
                f"scan_layers to False, or write patterns that treat them alike."
            )
        if not chosen[0]:
            continue
        for attribute, factors in _factors(module, names, lora, key):
            if dropout and lora.dropout:
                stacked = () if len(factors.a.axes) == len(_axes(factors.a)) else (len(names),)
                noise = jnp.zeros((*stacked, 2), jnp.uint32)
                own = ("layers", "norm")[1 - len(stacked) :]
                factors.noise = nnx.data(Noise(noise, axes=own, eager_sharding=False))
            setattr(module, attribute, nnx.data(factors))  # where None was
    for pattern in lora.targets:
        if pattern not in used:
            raise ValueError(f"lora.targets: {pattern!r} chooses no layer. {nearest(pattern, every)}")
    return model


def _factors(module: Linear | MoE, names: list[str], lora: LoraConfig, key: Array):
    """The attribute of each set of factors of a linear layer or MoE, and these."""
    if isinstance(module, MoE):
        matrices = (("gate_up", GATE_UP_AXES), ("down", DOWN_AXES))
        for name, axes in matrices:
            shape, is_stacked = _of_a_layer(getattr(module, name), axes)
            a_shape = (shape[0], shape[-2], lora.rank)
            b_shape = (*shape[:-2], lora.rank, shape[-1])
            outputs = math.prod(shape[1:-2]) * shape[-1]
            of_each = [f"{each.removesuffix('experts')}{name}" for each in names]
            _check_rank(lora.rank, of_each[0], shape[-2], outputs)
            pair = _drawn(key, of_each, a_shape, b_shape, shape[-2], is_stacked)
            yield f"{name}_lora", ExpertFactors(*pair, *_stacked(is_stacked, *factor_axes(axes)), lora)
        return
    shape, is_stacked = _of_a_layer(module.kernel, module.axes)
    ins, outs = shape[: module.num_contract], shape[module.num_contract :]
    in_axes, out_axes = module.axes[: module.num_contract], module.axes[module.num_contract :]
    halves = 1 if out_axes[0] == "gate_up" else 0
    _check_rank(lora.rank, names[0], math.prod(ins), math.prod(outs[halves:]))
    a_shape, b_shape = (*ins, *outs[:halves], lora.rank), (*outs[:halves], lora.rank, *outs[halves:])
    axes = (*in_axes, *out_axes[:halves], "rank"), (*out_axes[:halves], "rank", *out_axes[halves:])
    pair = _drawn(key, names, a_shape, b_shape, math.prod(ins), is_stacked)
    yield "lora", LinearFactors(*pair, *_stacked(is_stacked, *axes), lora)


def _of_a_layer(parameter: nnx.Param, axes: tuple[str, ...]) -> tuple[tuple[int, ...], bool]:
    """The shape of one layer's parameter, and whether there is a stack of them."""
    shape = parameter.get_value().shape
    return shape[len(shape) - len(axes) :], len(shape) > len(axes)


def _stacked(is_stacked: bool, *axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [("layers", *own) if is_stacked else own for own in axes]


def _check_rank(rank: int, name: str, inputs: int, outputs: int) -> None:
    if rank > min(inputs, outputs):
        raise ValueError(
            f"lora.rank is {rank}, but {name} has {inputs} inputs and {outputs} outputs, and so the rank "
            f"{min(inputs, outputs)} at most. Choose a smaller rank, or leave the layer out of lora.targets."
        )


def _drawn(key: Array, names: list[str], a_shape, b_shape, inputs: int, is_stacked: bool) -> tuple[Array, Array]:
    def draw(name: str) -> Array:
        bound = 1 / math.sqrt(inputs)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, a_shape, jnp.float32, -bound, bound)

    a = jnp.stack([draw(name) for name in names]) if is_stacked else draw(names[0])
    return a, jnp.zeros((len(names), *b_shape) if is_stacked else b_shape, jnp.float32)


@functools.cache
def count_factors(config: ModelConfig, lora: LoraConfig) -> int:
    """How many numbers learn. Raises ValueError as `adapted` does."""
    model = nnx.eval_shape(lambda: adapted(Llama4(config), lora))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, Factor)))


def new_noise(model: Llama4, key: Array) -> None:
    """Fills every `Noise` of a model from a key, for each layer by its name."""
    for path, variable in nnx.to_flat_state(nnx.state(model, Noise)):
        keys = [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names_of(model, path)]
        bits = [jax.random.key_data(own) for own in keys]
        variable.set_value(jnp.stack(bits) if variable.get_value().ndim == 2 else bits[0])
