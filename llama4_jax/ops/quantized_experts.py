"""The routed experts of a layer with quantized matrices, on one device or on a mesh; for inference.

As `experts` of tokens that stay: each device of `expert` computes those that chose its experts, `tensor` splits the
width of every expert, and the results are summed. Values are gathered, where `fsdp` splits them, as they are: in few
bits. Rows that are rounded to int8 have one scale wherever their parts are.
"""

from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.ops.experts import DOWN_AXES, GATE_UP_AXES, combine, dispatch, sort_by_expert
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.quantization import Quantized, scale_axes
from llama4_jax.ops.quantized_matmul import quantized_grouped_matmul
from llama4_jax.ops.swiglu import swiglu
from llama4_jax.sharding import activation_spec, axes_of, gathered, parameter_spec


def quantized_experts(
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T top_k"],
    gate: Float[Array, "B T top_k"],
    gate_up: Quantized,
    down: Quantized,
    *,
    activations: str = "auto",
) -> Float[Array, "B T D"]:
    """`experts` with values [E, 2, D, F] and [E, F, D], scales [E, 2, G, F] and [E, G, D].

    - activations: of `quantized_matmul`

    Raises ValueError as `quantized_dot` does, and where a mesh splits the inputs of `down` otherwise than its groups.
    """
    gate_up_home, down_home = _home(gate_up, GATE_UP_AXES, 2), _home(down, DOWN_AXES, 1)
    expert_axes, width_axes = axes_of(down_home.values[0]), axes_of(down_home.values[1])
    if down.scale.shape[1] > 1 and axes_of(down_home.scale[1]) != width_axes:
        raise ValueError(
            f"the mesh splits the {down.values.shape[1]} inputs of the experts' down over {', '.join(width_axes)}, "
            f"which do not divide their {down.scale.shape[1]} groups: choose a smaller mesh.tensor, or smaller groups."
        )
    tokens = activation_spec(x.shape, "rows", "seq", "embed")
    # Each expert's device sees all tokens that may have chosen it.
    tokens = PartitionSpec(*(_without(part, (*expert_axes, *width_axes)) for part in tokens[:2]), None)

    def on_device(x, expert, gate, gate_up, down):
        gate_up = _whole(gate_up, gate_up_home, 2)  # along the inputs
        down = _whole(down, down_home, 2)  # along the outputs
        rows, expert, gate = (rearrange(y, "B T n -> (B T) n") for y in (x, expert, gate))
        expert -= lax.axis_index(expert_axes) * len(down.values) if expert_axes else 0
        routing = sort_by_expert(expert, gate, len(down.values))
        how = {"group_sizes": routing.group_sizes, "activations": activations}
        sent = dispatch(rows, routing) * routing.gate.astype(x.dtype)[:, None]
        hidden = swiglu(quantized_grouped_matmul(sent, gate_up, **how))
        y = combine(quantized_grouped_matmul(hidden, down, **how, axes=width_axes), routing)
        summed = (*expert_axes, *width_axes)
        return (lax.psum(y, summed) if summed else y).reshape(x.shape)

    specs = (tokens, tokens, tokens, gate_up_home, down_home)
    return on_mesh(on_device, specs, tokens)(x, expert, gate, gate_up, down)


def _home(q: Quantized, axes: tuple[str, ...], start: int) -> Quantized:
    """Where values and scales live."""
    of_scale = scale_axes(axes, q.scale.shape[start], start=start)
    return Quantized(parameter_spec(q.values.shape, *axes), parameter_spec(q.scale.shape, *of_scale))


def _without(part: str | tuple[str, ...] | None, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    return tuple(axis for axis in axes_of(part) if axis not in axes) or None


def _whole(q: Quantized, home: Quantized, dimension: int) -> Quantized:
    """With all parts along the dimension that `fsdp` splits."""

    def whole(part, spec):
        return gathered(part, part.dtype, axes_of(spec[dimension]), dimension)

    return Quantized(*(whole(part, spec) for part, spec in zip(q, home, strict=True)))
