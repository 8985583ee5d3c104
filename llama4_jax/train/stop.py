"""When a run is asked to end, by SIGTERM (as a preempted machine gets) or Ctrl-C: all hosts end after the same step.

The signal may reach one host alone, and another may be a step ahead. So that they agree, each step asks all devices
whether any host was told to stop. The question waits in the queue behind the step before, and its answer is read one
step later, when it is there already: no device ever waits for the console.
"""

import contextlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.train.step import TrainState


class Stop:
    """Whether the run should end. All hosts give the same answers, if they ask before every step."""

    def __init__(self, mesh: Mesh, received: list[int]):
        self._received = received
        self._alone = len({device.process_index for device in mesh.devices.flat}) == 1
        self._flag = NamedSharding(mesh, PartitionSpec(mesh.axis_names))  # one for each device
        self._size = mesh.size
        self._asked: jax.Array | None = None

        # The step's counter goes through, so that the question comes after one step and before the next on every
        # device: collectives that two programs run at the same time could meet in another order on another host.
        @jax.jit
        def ask(step, flags):
            return step + jnp.zeros_like(step), jnp.any(flags)

        self._ask = ask

    def now(self, state: TrainState) -> tuple[TrainState, bool]:
        """The state, whose buffers may be new, and whether to end instead of taking another step."""
        if self._alone:
            return state, bool(self._received)
        told = np.full(self._size, bool(self._received))
        flags = jax.make_array_from_callback(told.shape, self._flag, lambda index: told[index])
        asked_before, (step, self._asked) = self._asked, self._ask(state.step, flags)
        return state._replace(step=step), asked_before is not None and bool(asked_before)


@contextlib.contextmanager
def stop_signals(mesh: Mesh) -> Iterator[Stop]:
    """Within it, SIGTERM and the first Ctrl-C ask the run to save and end."""
    received: list[int] = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, previous[number])  # a second one is taken at its word

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield Stop(mesh, received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
