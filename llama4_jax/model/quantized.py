"""A model whose matrices are quantized, for inference: values in `kernel`, scales in `kernel_scale`; of routed experts
`gate_up` and `gate_up_scale`, `down` and `down_scale`. All else of the model is as it was.

Quantized are the matrices of the decoder: attention's projections and the feed-forwards', experts and shared experts
included. What decides which expert and which token, router and output head, is kept, as are the embedding, norms,
biases, the vision encoder and the projector.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from flax import nnx

from llama4_jax.model.layers import Linear
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.moe import MoE
from llama4_jax.model.names import names_of
from llama4_jax.ops.quantization import Scheme, quantize, scale_axes
from llama4_jax.ops.quantized_matmul import check_activations


class Matrix(NamedTuple):
    """A parameter that can be quantized."""

    names: list[str]  # layers.3.attention.q.kernel; of scanned layers, which are a stack of matrices, several
    module: nnx.Module
    attribute: str
    start: int  # the first of its dimensions that are inputs
    num_contract: int

    @property
    def name(self) -> str:
        return self.names[0]


def quantized(
    model: Llama4,
    scheme: Scheme | Callable[[str], Scheme | None],
    *,
    activations: str = "auto",
    keep_scanned: bool = False,
) -> Llama4:
    """The model with quantized matrices, its layers one by one. The model that is given stays as it is.

    - scheme: for all matrices of the decoder; or of each the scheme, given its name, or None to keep it
    - activations: what they are multiplied with: "auto", "float" or "int8" (see `ops.quantized_matmul`)
    - keep_scanned: layers that are scanned stay so, for training beside them

    Of shapes alone: nnx.eval_shape(lambda: quantized(Llama4(config, precision=precision), Scheme("int4", 128))).

    Raises ValueError for a group that does not divide a matrix, naming it, for a model that is quantized already, for
    activations that are unknown or that a matrix cannot be multiplied with, and for layers that are scanned together
    and quantized differently.
    """
    model = model if keep_scanned else model.unscanned()
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    for matrix in list(matrices(model)):
        schemes = {scheme(n) if callable(scheme) else scheme if is_of_decoder(n) else None for n in matrix.names}
        if len(schemes) > 1:
            raise ValueError(
                f"{matrix.names[0]} and {matrix.names[-1]}, or layers between, are quantized differently and scanned "
                f"together: set scan_layers to False."
            )
        (own,) = schemes
        if own is None:
            continue
        if getattr(matrix.module, f"{matrix.attribute}_scale") is not None:
            raise ValueError(f"{matrix.name} is quantized already.")
        check_activations(activations, own.number.dtype, matrix.name)
        parameter = getattr(matrix.module, matrix.attribute)
        inputs = {"start": matrix.start, "num_contract": matrix.num_contract}
        q = quantize(parameter[...], own, **inputs, what=matrix.name)
        of_scale = scale_axes(parameter.axes, q.scale.shape[matrix.start], **inputs)
        setattr(matrix.module, matrix.attribute, nnx.Param(q.values, axes=parameter.axes, eager_sharding=False))
        scale = nnx.Param(q.scale, axes=of_scale, eager_sharding=False)
        setattr(matrix.module, f"{matrix.attribute}_scale", nnx.data(scale))  # where None was
        matrix.module.activations = activations
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MoE) and (module.gate_up_scale is None) != (module.down_scale is None):
            (name, *_) = names_of(model, path)
            raise ValueError(f"of {name}.gate_up and {name}.down one is quantized: quantize both, or neither.")
    return model


def is_of_decoder(name: str) -> bool:
    """Whether a matrix of this name is one that `quantized` and `llama4 quantize` quantize."""
    return name.startswith("layers.") and ".router." not in name


def matrices(model: Llama4) -> Iterator[Matrix]:
    def matrix(module: nnx.Module, names: list[str], attribute: str, start: int, num_contract: int) -> Matrix:
        stacked = getattr(module, attribute).axes[0] == "layers"
        own = [f"{name}.{attribute}" for name in names]
        return Matrix(own, module, attribute, start + stacked, num_contract)

    for path, module in nnx.iter_modules(model):
        names = names_of(model, path)
        if isinstance(module, Linear):
            yield matrix(module, names, "kernel", 0, module.num_contract)
        elif isinstance(module, MoE):
            yield matrix(module, names, "gate_up", 2, 1)
            yield matrix(module, names, "down", 1, 1)
