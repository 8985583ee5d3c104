"""One update, as a pure function of the state: gradients, accumulation, AdamW, balancing. A bad batch does no harm."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.config import RunConfig
from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.lora import Factor, Noise, adapted, new_noise
from llama4_jax.model.moe import BalanceBias
from llama4_jax.model.quantized import matrices, quantized
from llama4_jax.sharding import activation_sharding, parameter_sharding
from llama4_jax.train.balance import BalanceMetrics, balance_loss, balance_metrics, moved_bias
from llama4_jax.train.freeze import changes, frozen_at, restored, without_gradient
from llama4_jax.train.optimizer import at_step, learning_rate, make_optimizer
from llama4_jax.train.stage import Loss, LossOutput
from llama4_jax.weights.load import QuantizedMatrices
from llama4_jax.weights.table import SCALE


class TrainState(NamedTuple):
    """Everything that changes from step to step, and the parameters that never do."""

    step: Int[Array, ""]  # steps taken, those left out included: what the learning rate and the data go by
    params: nnx.State  # that learn: all, or with LoRA its factors
    bias: nnx.State  # of loss-free balancing; empty without
    optimizer: optax.OptState
    skipped: Int[Array, ""]  # updates left out so far, since the loss or a gradient was not finite
    bad_steps: Int[Array, ""]  # how many of them in a row, just now
    fixed: nnx.State = nnx.State({})  # parameters that do not learn, with neither gradients nor moments: LoRA's base


class StepMetrics(NamedTuple):
    loss: Float[Array, ""]  # nats a token, without balance losses
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]  # of this update
    tokens: Float[Array, ""]  # with a weight in the loss
    target_bytes: Float[Array, ""]
    skipped: Int[Array, ""]
    bad_steps: Int[Array, ""]
    balance: BalanceMetrics | None


def make_model(
    config: RunConfig, seed: int | Array, base: QuantizedMatrices | None = None, *, dropout: bool = False
) -> Llama4:
    """The model of a run.

    - base: how the matrices of LoRA's base are quantized; None: they are not
    - dropout: with the noise of LoRA's dropout, which `new_noise` fills
    """
    model = Llama4(
        config.model, precision=config.precision, scan_layers=config.scan_layers, remat=config.remat, seed=seed
    )
    if base is not None:
        model = quantized(model, base.scheme, activations="float", keep_scanned=True)
        for matrix in matrices(model):
            scale = getattr(matrix.module, f"{matrix.attribute}{SCALE}")
            if scale is not None:  # as precise as they are stored
                scale.set_value(scale.get_value().astype(base.scale_dtype(matrix.name + SCALE)))
    return adapted(model, config.lora, seed=seed, dropout=dropout) if config.lora.rank else model


def split_model(model: Llama4) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The structure, the parameters, and the balance biases that gradients do not move."""
    return nnx.split(model, nnx.Param, BalanceBias)


def first_state(model: Llama4, optimizer: optax.GradientTransformation) -> TrainState:
    """What training this model starts from."""
    _, factors, params, bias, _ = nnx.split(model, Factor, nnx.Param, BalanceBias, ...)
    learned, fixed = (factors, params) if jax.tree.leaves(factors) else (params, factors)
    step, skipped, bad_steps = (jnp.zeros((), jnp.int32) for _ in range(3))  # each its own, as each is donated
    return TrainState(step, learned, bias, optimizer.init(_float32(learned)), skipped, bad_steps, fixed)


def model_of(graphdef: nnx.GraphDef, state: TrainState) -> Llama4:
    """The model of a state, whose structure is given."""
    return nnx.merge(graphdef, state.params, state.fixed, state.bias)


Step = Callable[[TrainState, Batch, Any], tuple[TrainState, StepMetrics]]  # donates the state


class Trainer(NamedTuple):
    """The compiled parts of a run on a mesh."""

    graphdef: nnx.GraphDef
    mesh: Mesh | AbstractMesh
    abstract: TrainState  # shapes, dtypes and shardings
    init: Callable[[], TrainState]
    # The same without what LoRA takes from its base, parameters and biases that do not learn, of which there are none.
    init_learned: Callable[[], TrainState]
    step_at: Callable[[int], Step]  # which update follows so many others: they differ in what is frozen

    @property
    def step(self) -> Step:
        """The first update."""
        return self.step_at(0)


def make_trainer(
    config: RunConfig, mesh: Mesh | AbstractMesh, loss: Loss, base: QuantizedMatrices | None = None
) -> Trainer:
    """Nothing is compiled or allocated yet; on an AbstractMesh nothing can be, and the run is only described.

    - base: how the matrices of LoRA's base are quantized; None: they are not

    Raises ValueError if the mesh does not divide a parameter, for a config that freezes what is not there, and for
    LoRA's targets and rank as `adapted` does.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef, _, _ = split_model(nnx.eval_shape(lambda: make_model(config, config.seed, base)))
    training = _Structure(graphdef, nnx.State({}))
    if config.lora.dropout:
        noisy = nnx.eval_shape(lambda: make_model(config, config.seed, base, dropout=True))
        noisy_graphdef, noise, _ = nnx.split(noisy, Noise, ...)
        training = _Structure(noisy_graphdef, noise)

    def init() -> TrainState:
        return first_state(make_model(config, config.seed, base), optimizer)

    def init_learned() -> TrainState:
        return _without_base(init())

    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    frozen_sets = {step: frozen_at(config.freeze, step, shapes.params) for step in changes(config.freeze)}

    @functools.cache
    def compiled(still: frozenset[str]) -> Step:
        def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, StepMetrics]:
            return update(config, training, optimizer, loss, state, batch, frozen, still)

        return jax.jit(
            step,
            in_shardings=(shardings, batch_shardings(mesh, images=config.data.tiles_per_row > 0), None),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )

    def step_at(step: int) -> Step:
        return compiled(frozen_sets[max(since for since in frozen_sets if since <= step)])

    first = jax.jit(init, out_shardings=shardings)
    first_learned = jax.jit(init_learned, out_shardings=_without_base(shardings)) if config.lora.rank else first
    return Trainer(graphdef, mesh, abstract, first, first_learned, step_at)


def _without_base(state: TrainState) -> TrainState:
    return state._replace(fixed=nnx.State({}), bias=nnx.State({}))


def batch_shardings(mesh: Mesh | AbstractMesh, *, images: bool) -> Batch:
    """Where each array of a batch lives: rows by the batch axes, tokens by the sequence's."""
    tokens = activation_sharding(("batch", "seq"), mesh)
    tiles = activation_sharding(("batch", "tiles", "pixels", "pixels", None), mesh)
    return Batch(*[tokens] * (len(Batch._fields) - 1), images=tiles if images else None)


def state_shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Parameters, and what the optimizer keeps of each, by the parameter table; all else on every device."""

    def place(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.replace(parameter_sharding(leaf.get_value().shape, leaf.axes, mesh, name))

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def update(
    config: RunConfig,
    structure: "_Structure",
    optimizer: optax.GradientTransformation,
    loss: Loss,
    state: TrainState,
    batch: Batch,
    frozen: Any,
    still: frozenset[str] = frozenset(),
) -> tuple[TrainState, StepMetrics]:
    """The state after one batch. A loss or gradient that is not finite changes nothing but the counters.

    `still`: names of the parameters that are left as they are.
    """

    def objective(params: nnx.State, batch: Batch, part: Int[Array, ""] | int):
        now = state._replace(params=without_gradient(params, still))
        out = loss(structure.model(now, config.seed, part), batch, frozen)
        aux = 0.0 if out.router is None else balance_loss(out.router, config.balance)
        return out.total + out.weight * aux, out

    grad = jax.grad(objective, has_aux=True)
    if config.grad_accumulation == 1:
        grads, out = grad(state.params, batch, 0)
    else:
        grads, out = _accumulate(grad, state.params, batch, config.grad_accumulation)
    weight = jnp.maximum(out.weight, 1)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
    mean_loss = out.total / weight
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)

    params = _float32(state.params)
    updates, new_optimizer = optimizer.update(grads, at_step(state.optimizer, state.step), params)
    new_params = jax.tree.map(lambda p, u, old: (p + u).astype(old.dtype), params, updates, state.params)
    new_params = restored(new_params, state.params, still)
    new_optimizer = restored(new_optimizer, state.optimizer, still)
    new_bias = state.bias
    if out.router is not None and config.balance.bias_rate:
        new_bias = _move_biases(structure.graphdef, state, out.router.counts, config.balance.bias_rate)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=keep(new_params, state.params),
        bias=keep(new_bias, state.bias),
        optimizer=keep(new_optimizer, state.optimizer),
        skipped=state.skipped + ~good,
        bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        fixed=state.fixed,
    )
    metrics = StepMetrics(
        loss=mean_loss,
        grad_norm=grad_norm,
        learning_rate=jnp.asarray(learning_rate(config.optimizer, config.steps)(state.step), jnp.float32),
        tokens=out.weight,
        target_bytes=jnp.sum(batch.target_bytes).astype(jnp.float32),
        skipped=new_state.skipped,
        bad_steps=new_state.bad_steps,
        balance=None if out.router is None else balance_metrics(out.router.counts, out.router.gate),
    )
    return new_state, metrics


class _Structure(NamedTuple):
    """The model in training."""

    graphdef: nnx.GraphDef
    noise: nnx.State  # shapes of LoRA's dropout; empty without

    def model(self, state: TrainState, seed: int, part: Int[Array, ""] | int) -> Llama4:
        """For a micro-batch of this number in a step."""
        if not jax.tree.leaves(self.noise):
            return model_of(self.graphdef, state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.noise)
        model = nnx.merge(self.graphdef, state.params, state.fixed, state.bias, zeros)
        new_noise(model, jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), part))
        return model


def _accumulate(grad: Callable, params: nnx.State, batch: Batch, parts: int):
    """Sums of gradients and losses over micro-batches, in float32, one after another."""
    # Every part takes rows from all over the batch, so that each device keeps its own.
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def sums(params: nnx.State, part: Batch, number: Int[Array, ""]):
        grads, out = grad(params, part, number)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, _times_counts(out, 1)))

    numbered = split, jnp.arange(parts)
    shapes = jax.eval_shape(sums, params, *jax.tree.map(lambda x: x[0], numbered))
    zeros = jax.tree.map(jnp.zeros_like, shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, sums(params, *part)), None

    (grads, out), _ = jax.lax.scan(add, zeros, numbered)
    return grads, _times_counts(out, -1)


def _times_counts(out: LossOutput, power: Literal[1, -1]) -> LossOutput:
    """The router's means over tokens as sums (1), which add up, or such sums as means (-1). Its counts are sums."""
    if out.router is None:
        return out
    count = jnp.maximum(out.router.counts.sum(-1), 1) ** power
    means = {"probabilities": out.router.probabilities * count[:, None], "z": out.router.z * count,
             "gate": out.router.gate * count}  # fmt: skip
    return out._replace(router=out.router._replace(**means))


def _move_biases(graphdef: nnx.GraphDef, state: TrainState, counts: Float[Array, "layers E"], rate: float) -> nnx.State:
    model = nnx.merge(graphdef, state.params, state.fixed, state.bias, copy=True)  # else the old biases would move too
    model.decoder.map_balance_biases(lambda bias, counts: moved_bias(bias, counts, rate), counts)
    return split_model(model)[2]


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
