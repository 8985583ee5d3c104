"""Our side: the model's own modules, one layer at a time, compiled once for each kind of layer.

Quantized weights are multiplied as they are when one infers. Dequantized they are ordinary weights in float32, by which
it is told what their rounding does to the model from what our products with them do.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import llama4_jax.model.attention as attention_module
from llama4_jax.model.attention import Attention
from llama4_jax.model.cache import LayerCache, make_step
from llama4_jax.model.config import Precision
from llama4_jax.model.decoder import DecoderLayer
from llama4_jax.model.layers import Linear, RMSNorm, SwiGLU
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.moe import MoE
from llama4_jax.ops.cross_entropy import token_nll
from llama4_jax.weights.dequantize import dequantized, steps
from llama4_jax.weights.load import abstract_model
from llama4_jax.weights.parity.sides import CHOSEN, Stages, Tensors, watching
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.source import Weights
from llama4_jax.weights.table import SCALE, rows


class Ours:
    """Our model with the weights of a directory. See `sides.Side`.

    - dequantize: quantized weights are those numbers in float32 that they stand for
    - schemes: how each matrix that is quantized is, by its name
    """

    def __init__(self, weights: Weights, dtype: str, *, dequantize: bool = False):
        self.config = weights.config
        self.weights = weights
        self.precision = Precision(params=dtype, compute=dtype)
        self.parameters = Parameters(weights)
        self.quantized = {row.ours: row for row in rows(weights.config) if self.parameters.is_quantized(row.ours)}
        self.schemes = {name: self.parameters.scheme(name) for name in self.quantized}
        self.dequantize = dequantize
        kind = f" on weights of {self.scheme}{', dequantized' if dequantize else ''}" if self.quantized else ""
        self.label = f"ours in {dtype}{kind}: {weights.path}"
        # Shapes only: weights are read when their layer's turn comes.
        if self.quantized and not dequantize:
            self.model = abstract_model(weights, self.precision)
        else:
            self.model = nnx.eval_shape(lambda: Llama4(weights.config, precision=self.precision, scan_layers=False))
        # Compiled here, and not once for all: what is compared may have been changed since.
        self.compiled = {
            run: jax.jit(getattr(self, f"_{run}"), static_argnums=0)
            for run in ("layer", "step", "backward", "head", "head_backward")
        }

    @property
    def scheme(self) -> str:
        """How the weights are quantized, in words."""
        return " and ".join(sorted({str(scheme) for scheme in self.schemes.values()}))

    def embed(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        embed = nnx.merge(*self._read(self.model.embed, "embed"))
        return _numpy(embed(jnp.asarray(tokens, jnp.int32), self.precision.compute))

    def embed_gradients(self, tokens: Int[np.ndarray, "B T"], g: Float[np.ndarray, "B T D"]) -> Tensors:
        graphdef, state = self._read(self.model.embed, "embed")
        ids = jnp.asarray(tokens, jnp.int32)
        _, back = jax.vjp(lambda state: nnx.merge(graphdef, state)(ids, self.precision.compute), state)
        return _named("embed", back(jnp.asarray(g, self.precision.compute))[0])

    def layer(self, i: int) -> "OurLayer":
        prefix = f"layers.{i}"
        return OurLayer(self, prefix, *self._read(self.model.decoder.rest[i], prefix))

    def head(self) -> "OurHead":
        return OurHead(self, self._read(self.model.final_norm, "final_norm"), self._read(self.model.lm_head, "lm_head"))

    def tensors(self, prefix: str, state: nnx.State) -> Tensors:
        """The parameters of a part as the directory holds them, before any cast; quantized ones dequantized."""
        names = [".".join(map(str, (prefix, *path))) for path, _ in nnx.to_flat_state(state)]
        scales = {name + SCALE for name in self.quantized}
        return {name: self.tensor(name) for name in names if name not in scales}

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        row = self.quantized.get(name)
        return self.weights.read(name).astype(np.float32) if row is None else dequantized(row, self.weights)

    def step(self, name: str) -> Float[np.ndarray, "..."] | None:
        """How far each number of a quantized tensor is from the next; None of what is not quantized."""
        row = self.quantized.get(name)
        return None if row is None else steps(row, self.weights)

    def _read(self, module: nnx.Module, prefix: str) -> tuple[nnx.GraphDef, nnx.State]:
        graphdef, state = nnx.split(module)
        filled = {}  # new variables: the model keeps its shapes
        for path, variable in nnx.to_flat_state(state):
            name, expected = ".".join(map(str, (prefix, *path))), variable.get_value()
            array = self.tensor(name) if self.dequantize else self.parameters.read(name)
            if array.shape != expected.shape:
                raise ValueError(
                    f"{self.weights.path}: {name} is {list(array.shape)}, but the config makes it "
                    f"{list(expected.shape)}."
                )
            filled[path] = variable.replace(jnp.asarray(array.astype(expected.dtype)))
        return graphdef, nnx.from_flat_state(filled)

    # What is compiled. Modules come as nnx.split gives them; the graph definition is static.

    def _place(self, positions: Int[Array, "B T"]):
        return self.model._place(positions, None)

    def _positions(self, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
        return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

    def _layer(self, graphdef, state, x) -> dict[str, Array]:
        layer = nnx.merge(graphdef, state)
        with _recording(layer) as stages:
            stages["layer output"] = layer(x, self._place(self._positions(x)), None)[0]
        return stages

    def _step(self, graphdef, state, x, cache, length) -> tuple[dict[str, Array], LayerCache]:
        layer = nnx.merge(graphdef, state)
        lengths = jnp.full(x.shape[:1], length, jnp.int32)
        step = make_step(lengths, jnp.full_like(lengths, x.shape[1]), x.shape[1])
        with _recording(layer) as stages:
            stages["layer output"], _, cache = layer(x, self._place(step.positions), step.valid, (cache, step))
        return stages, cache

    def _backward(self, graphdef, state, x, g) -> tuple[nnx.State, Float[Array, "B T D"]]:
        place = self._place(self._positions(x))
        _, back = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x, place, None)[0], state, x)
        return back(g)

    def _head(self, graphdefs, states, x) -> Float[Array, "B T V"]:
        final_norm, lm_head = map(nnx.merge, graphdefs, states)
        return lm_head(final_norm(x)).astype(self.precision.logits)

    def _head_backward(self, graphdefs, states, x, targets):
        def loss(states, x):
            final_norm, lm_head = map(nnx.merge, graphdefs, states)
            return token_nll(final_norm(x), lm_head.kernel[...], targets).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(states, x)


class OurLayer:
    """See `sides.Layer`."""

    def __init__(self, side: Ours, prefix: str, graphdef: nnx.GraphDef, state: nnx.State):
        self.side, self.prefix, self.graphdef, self.state = side, prefix, graphdef, state
        self.chunk = side.config.layers[int(prefix.split(".")[1])].chunk

    def run(self, x: Float[np.ndarray, "B T D"]) -> Stages:
        return _stages(self.side.compiled["layer"](self.graphdef, self.state, self._cast(x)))

    def decode(self, x: Float[np.ndarray, "B T D"], steps: int) -> Stages:
        """The stages of the last `steps` positions when they come one by one, after a prefill of those before."""
        run, config, x = self.side.compiled["step"], self.side.config, self._cast(x)
        batch, length, _ = x.shape
        slots = length if self.chunk is None else min(self.chunk, length)
        empty = jnp.zeros((batch, config.num_kv_heads, slots, config.head_dim), x.dtype)
        _, cache = run(self.graphdef, self.state, x[:, : length - steps], LayerCache(empty, empty), 0)
        each = []
        for position in range(length - steps, length):
            stages, cache = run(self.graphdef, self.state, x[:, position : position + 1], cache, position)
            each.append(_stages(stages))
        return {name: np.concatenate([stages[name] for stages in each], axis=1) for name in each[0]}

    def tensors(self) -> Tensors:
        return self.side.tensors(self.prefix, self.state)

    def gradients(
        self, x: Float[np.ndarray, "B T D"], g: Float[np.ndarray, "B T D"]
    ) -> tuple[Float[np.ndarray, "B T D"], Tensors]:
        run = self.side.compiled["backward"]
        state, of_x = run(self.graphdef, self.state, self._cast(x), self._cast(g))
        return _numpy(of_x), _named(self.prefix, state)

    def _cast(self, x: Float[np.ndarray, "B T D"]) -> Float[Array, "B T D"]:
        return jnp.asarray(x, self.side.precision.compute)


class OurHead:
    """See `sides.Head`."""

    def __init__(self, side: Ours, *parts: tuple[nnx.GraphDef, nnx.State]):
        self.side = side
        self.graphdefs, self.states = (tuple(half) for half in zip(*parts, strict=True))

    def logits(self, x: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B T V"]:
        return _numpy(self.side.compiled["head"](self.graphdefs, self.states, self._cast(x)))

    def tensors(self) -> Tensors:
        norm, output = self.states
        return self.side.tensors("final_norm", norm) | self.side.tensors("lm_head", output)

    def gradients(
        self, x: Float[np.ndarray, "B T D"], targets: Int[np.ndarray, "B T"]
    ) -> tuple[float, Float[np.ndarray, "B T D"], Tensors]:
        run, targets = self.side.compiled["head_backward"], jnp.asarray(targets, jnp.int32)
        loss, (states, of_x) = run(self.graphdefs, self.states, self._cast(x), targets)
        return float(loss), _numpy(of_x), _named("final_norm", states[0]) | _named("lm_head", states[1])

    def _cast(self, x: Float[np.ndarray, "B T D"]) -> Float[Array, "B T D"]:
        return jnp.asarray(x, self.side.precision.compute)


@contextlib.contextmanager
def _recording(layer: DecoderLayer) -> Iterator[dict[str, Array]]:
    """While open, fills a dictionary with the stages of a call of `layer`, but its output."""
    stages: dict[str, Array] = {}
    attention = layer.attention
    feed_forward = layer.moe if layer.spec.moe else layer.mlp
    of_module = {
        id(layer.attention_norm): "attention norm",
        id(attention.q): "q projection",
        id(attention.k): "k projection",
        id(attention.v): "v projection",
        id(attention): "attention output",
        id(layer.mlp_norm): "feed-forward norm",
        id(feed_forward): "feed-forward output",
    }

    def module(args, result):
        if id(args[0]) in of_module:
            stages[of_module[id(args[0])]] = result[0] if isinstance(result, tuple) else result

    def rotated(_, result):  # the query first, then the key
        stages["k after RoPE" if "q after RoPE" in stages else "q after RoPE"] = result.swapaxes(1, 2)

    def attended(args, _):
        stages["q after qk-norm and temperature"] = args[0].swapaxes(1, 2)
        stages["k after qk-norm"] = args[1].swapaxes(1, 2)

    def chose(args, result):
        if layer.spec.moe and args[0] is layer.moe:
            stages["router logits"], stages[CHOSEN] = args[1], jnp.sort(result[0], axis=-1)

    with contextlib.ExitStack() as stack:
        for kind in (RMSNorm, Linear, Attention, MoE, SwiGLU):
            stack.enter_context(watching(kind, "__call__", module))
        stack.enter_context(watching(attention_module, "rotate", rotated))
        stack.enter_context(watching(attention_module, "attention", attended))
        stack.enter_context(watching(MoE, "choose", chose))
        yield stages


def _stages(stages: dict[str, Array]) -> Stages:
    batch, length, _ = stages["layer output"].shape
    return {
        name: np.asarray(value if name == CHOSEN else value.astype(jnp.float32)).reshape(batch, length, -1)
        for name, value in stages.items()
    }


def _named(prefix: str, state: nnx.State) -> Tensors:
    return {
        ".".join(map(str, (prefix, *path))): _numpy(variable.get_value())
        for path, variable in nnx.to_flat_state(state)
        if isinstance(variable, nnx.Param)
    }


def _numpy(array: Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32))
