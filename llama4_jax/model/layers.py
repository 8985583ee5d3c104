"""The small layers everything else is made of. Every parameter names its axes (see `sharding.rules`)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.ops.dot_general import linear
from llama4_jax.ops.embedding import lookup
from llama4_jax.ops.plain import own_gradient
from llama4_jax.ops.quantization import Quantized
from llama4_jax.ops.quantized_matmul import quantized_linear
from llama4_jax.ops.swiglu import swiglu
from llama4_jax.sharding import constrain


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, dtype) -> nnx.Param:
    """A parameter drawn from N(0, std^2): how both references initialise every matrix."""
    # Drawn in float32 whatever the dtype, so that the numbers of a seed do not depend on it.
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes, eager_sharding=False)


class Linear(nnx.Module):
    """x [..., in dims] · kernel [in dims, out dims] (+ bias [out dims]) → [..., out dims].

    The kernel keeps its dimensions apart (heads and head_dim, gate and up), so that each can be split by name.
    """

    def __init__(
        self,
        in_dims: dict[str, int],
        out_dims: dict[str, int],
        *,
        std: float,
        dtype,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (*in_dims.values(), *out_dims.values())
        self.kernel = normal_param(rngs, shape, (*in_dims, *out_dims), std, dtype)
        zeros = jnp.zeros(tuple(out_dims.values()), dtype)
        self.bias = nnx.Param(zeros, axes=tuple(out_dims), eager_sharding=False) if bias else None
        self.axes = (*in_dims, *out_dims)
        self.num_contract = len(in_dims)
        self.matmul = "default"  # see `matmuls.choose_matmuls`
        self.kernel_scale = None  # of a quantized kernel: see `quantized`
        self.activations = "auto"  # that it multiplies
        self.lora = None  # low-rank factors beside the kernel: see `lora`
        self.learns = True  # whether kernel and bias do; see `lora`

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.kernel_scale is None:
            y = linear(x, self.kernel[...], self.axes, self.num_contract, self.matmul)
        else:
            kernel, how = Quantized(self.kernel[...], self.kernel_scale[...]), self.activations
            y = quantized_linear(x, kernel, self.axes, num_contract=self.num_contract, activations=how)
        if self.lora is not None:
            y += self.lora(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale. float32 inside; cast back *before* the scale, as both references do."""

    def __init__(self, dim: int, *, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=("norm",), eager_sharding=False)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalize(x, self.eps) * self.scale[...].astype(x.dtype)


# The backward pass is written out: it keeps the input alone, where autodiff keeps several arrays of its size, and
# makes its gradient in one pass.
@own_gradient(nondiff_argnums=(1,))
def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) in float32, returned in x's dtype. Weightless: it is also Llama 4's qk-norm."""
    return _rms_forward(x, eps)[0]


def _rms_forward(x, eps):
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms).astype(x.dtype), (x, inverse_rms)


def _rms_backward(eps, saved, g):
    x, inverse_rms = saved
    y, g32 = x.astype(jnp.float32) * inverse_rms, g.astype(jnp.float32)
    # The part of g along y only changes the length of x, which the norm takes away.
    along = y * jnp.mean(g32 * y, axis=-1, keepdims=True)
    return ((inverse_rms * (g32 - along)).astype(x.dtype),)


rms_normalize.defvjp(_rms_forward, _rms_backward)


class LayerNorm(nnx.Module):
    """(x - mean) / standard deviation · scale + bias, all in float32; the vision encoder's norm."""

    def __init__(self, dim: int, *, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=("norm",), eager_sharding=False)
        self.bias = nnx.Param(jnp.zeros((dim,), dtype), axes=("norm",), eager_sharding=False)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        normal = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (normal * scale + bias).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids → rows of a table. Unscaled, and not tied to the output head."""

    def __init__(self, vocab_size: int, dim: int, *, std: float, dtype, rngs: nnx.Rngs):
        self.embedding = normal_param(rngs, (vocab_size, dim), ("vocab", "embed"), std, dtype)

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        return lookup(self.embedding[...], tokens, dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)). gate and up are one product: kernel [D, 2, F], index 0 the gate."""

    def __init__(self, dim: int, width: int, *, std: float, dtype, rngs: nnx.Rngs):
        make = {"std": std, "dtype": dtype, "rngs": rngs}
        self.gate_up = Linear({"embed": dim}, {"gate_up": 2, "mlp": width}, **make)
        self.down = Linear({"mlp": width}, {"embed": dim}, **make)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = self.gate_up(constrain(x, "rows", "seq", "embed"))
        return self.down(swiglu(constrain(gate_up, "rows", "seq", "gate_up", "mlp")))
