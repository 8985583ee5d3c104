"""What the first of several processes is told, told to all, so that each takes the same turns.

Computations over devices of several processes must be started by all of them, in the same order. So only the first one
takes requests; before a turn it writes what came into the table of JAX's coordination service, and the others take
their turns as they read there. A process that has nothing to do waits there, and not in a collective, which would end
by a timeout.
"""

import itertools
from typing import Any

import jax
import msgspec
import numpy as np
from jax._src import distributed  # the one way to the table

_KEPT = 256  # turns: the others are hardly behind, since the devices wait for one another
_WAIT_SECONDS = 60
_engines = itertools.count()  # all processes make theirs in the same order


class MessagesToAll:
    """Lists of messages (JSON's values, bytes and numpy's arrays), one a turn."""

    def __init__(self):
        self.leads = jax.process_index() == 0
        self._client, self._name, self._turn = distributed.global_state.client, f"llama4_engine_{next(_engines)}", 0

    def send(self, messages: list[Any] | None) -> None:
        """By the first process. None: there will be no more."""
        self._client.key_value_set_bytes(self._key(self._turn), msgspec.msgpack.encode(messages, enc_hook=_plain))
        if self._turn >= _KEPT:
            self._client.key_value_delete(self._key(self._turn - _KEPT))
        self._turn += 1

    def receive(self) -> list[Any] | None:
        """By the others. Waits for it as long as it takes."""
        while True:
            try:
                data = self._client.blocking_key_value_get_bytes(self._key(self._turn), _WAIT_SECONDS * 1000)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        self._turn += 1
        return msgspec.msgpack.decode(data)

    def _key(self, turn: int) -> str:
        return f"{self._name}/{turn}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "shape": value.shape, "data": value.tobytes()}
    return value.item()  # of numpy's numbers


def as_array(said: Any) -> np.ndarray | None:
    """What was an array before it was sent."""
    if said is None:
        return None
    return np.frombuffer(said["data"], said["dtype"]).reshape(said["shape"])
