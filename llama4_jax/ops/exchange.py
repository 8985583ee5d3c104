"""Rows go to the devices of their experts, are computed there, and come back: expert parallelism without dropping.

How many rows a device gets is known at run time only, and may be all of them, but arrays have fixed shapes. So they
come in rounds: in each one every device takes the next rows meant for it, as many as it has room for, which is a
little more than its even share. Balanced experts need one round. Unbalanced ones cost more rounds, and neither memory
nor tokens.

Two transports, which move the same rows:

- "gather": all rows go to all devices of the axis once, and each picks its own; results are summed back, each row being
  0 but on one device. Runs everywhere.
- "ragged": each row goes to its device alone, by `lax.ragged_all_to_all`; an axis of P devices moves a P-th of the
  bytes. TPU (XLA has none on a CPU).

Of the last round, which is mostly the only one, the forward pass keeps what the backward pass needs. Earlier ones are
computed again there: how many there are is not known when memory is set aside.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.ops.dot_general import PRODUCT
from llama4_jax.ops.expert_feed_forward import ExpertWeights, FeedForward, scalars_like
from llama4_jax.sharding import platform, ways

# A device has room for so many times its even share: what one round takes of experts that are almost balanced.
ROOM = 1.25


class Window(NamedTuple):
    """The rows of one round, on this device. P devices; R rows each has to send; r rows it has room for."""

    # To each device: where its rows begin among mine, how many go, and where they are put there.
    send_from: Int[Array, " P"]
    send_size: Int[Array, " P"]
    send_to: Int[Array, " P"]
    # The same on the way back, of the rows that came from each device.
    return_from: Int[Array, " P"]
    return_size: Int[Array, " P"]
    return_to: Int[Array, " P"]
    order: Int[Array, " r"]  # sorts what came by expert
    source: Int[Array, " r"]  # of each row so sorted: its number among the P · R rows of all devices; P · R: none
    group_sizes: Int[Array, " E"]  # rows of each expert here


def _window(counts: Int[Array, "P E"], axes: tuple[str, ...], num_rows: int, room: int, lo: Int[Array, ""]) -> Window:
    """Every device sees itself as the owner of a sequence: the rows meant for it, by sender, then by expert. A round
    takes the places lo to lo + room of each."""
    me, devices = lax.axis_index(axes), counts.shape[0]
    mine = lax.dynamic_slice_in_dim(counts, me * (counts.shape[1] // devices), counts.shape[1] // devices, axis=1)
    blocks = counts.reshape(devices, devices, -1).sum(-1)  # [sender, receiver]
    start = jnp.cumsum(blocks, axis=0) - blocks  # of each block in the receiver's sequence
    base = jnp.cumsum(blocks, axis=1) - blocks  # of each block among the sender's rows
    first = jnp.clip(lo - start, 0, blocks)
    size = jnp.clip(lo + room - start, 0, blocks) - first
    place = jnp.maximum(start + first - lo, 0)

    at = lo + jnp.arange(room, dtype=jnp.int32)
    ends = jnp.cumsum(mine.reshape(-1))
    piece = jnp.searchsorted(ends, at, side="right", method="compare_all")  # which sender's rows of which expert
    sender, expert = jnp.minimum(piece // mine.shape[1], devices - 1), piece % mine.shape[1]
    there = at < ends[-1]
    order = jnp.argsort(jnp.where(there, expert, mine.shape[1]), stable=True)
    source = sender * num_rows + base[sender, me] + at - start[sender, me]
    inside = jnp.clip(ends - lo, 0, room) - jnp.clip(ends - mine.reshape(-1) - lo, 0, room)
    return Window(
        send_from=base[me] + first[me],
        send_size=size[me],
        send_to=place[me],
        return_from=place[:, me],
        return_size=size[:, me],
        return_to=(base + first)[:, me],
        order=order,
        source=jnp.where(there, source, devices * num_rows)[order],
        group_sizes=inside.reshape(mine.shape).sum(0),
    )


class _Gather:
    @staticmethod
    def hold(rows, axes):
        return lax.all_gather(rows, axes, tiled=True)

    @staticmethod
    def take(held, window: Window, axes):
        return held.at[window.source].get(mode="fill", fill_value=0, unique_indices=True)

    @staticmethod
    def put(out, rows, window: Window, axes):
        return out.at[window.source].set(rows, mode="drop", unique_indices=True)

    @staticmethod
    def finish(out, axes):
        return lax.psum_scatter(out, axes, tiled=True)


class _Ragged:
    @staticmethod
    def hold(rows, axes):
        return rows

    @staticmethod
    def take(held, window: Window, axes):
        empty = jnp.zeros((window.order.size, held.shape[1]), held.dtype)
        came = lax.ragged_all_to_all(
            held, empty, window.send_from, window.send_size, window.send_to, window.return_size, axis_name=axes
        )
        return came[window.order]

    @staticmethod
    def put(out, rows, window: Window, axes):
        as_they_came = jnp.zeros_like(rows).at[window.order].set(rows, unique_indices=True)
        return lax.ragged_all_to_all(
            as_they_came, out, window.return_from, window.return_size, window.return_to, window.send_size,
            axis_name=axes,
        )  # fmt: skip

    @staticmethod
    def finish(out, axes):
        return out


TRANSPORTS = {"gather": _Gather, "ragged": _Ragged}


def exchange(
    how: FeedForward,
    axes: tuple[str, ...],
    all_axes: tuple[str, ...],
    transport: str,
    rows: Float[Array, "R D"],
    counts: Int[Array, " E"],
    weights: ExpertWeights,
) -> Float[Array, "R D"]:
    """Within `shard_map`: each row through its expert, on the device of its expert. Differentiable in `rows` and
    `weights`.

    - how: what is computed there
    - axes: mesh axes that split the experts, in order
    - all_axes: those that split the tokens, `axes` among them
    - transport: a key of TRANSPORTS, or "auto": the best for the platform
    - rows: sorted by expert, of all experts; after the last one's, rows that are not sent and give 0
    - counts: how many rows of this device chose each expert
    - weights: of this device's experts, as it holds them

    Raises ValueError for an unknown transport.
    """
    if transport == "auto":
        transport = "ragged" if platform() == "tpu" else "gather"
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}: expected one of {', '.join(['auto', *TRANSPORTS])}.")
    return _exchange(how, _Way(axes, all_axes, transport), rows, counts, weights)


class _Way(NamedTuple):
    axes: tuple[str, ...]
    all_axes: tuple[str, ...]
    transport: str

    @property
    def move(self):
        return TRANSPORTS[self.transport]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(how: FeedForward, way: _Way, rows, counts, weights):
    used, held = how.prepare(weights, rows.dtype), way.move.hold(rows, way.axes)

    def one(window: Window, last, out):
        y, _ = how.forward(way.move.take(held, window, way.axes), window.group_sizes, used)
        return way.move.put(out, y, window, way.axes)

    return way.move.finish(_rounds(one, jnp.zeros_like(held), way, counts, len(rows)), way.axes)


def _forward(how: FeedForward, way: _Way, rows, counts, weights):
    used, held = how.prepare(weights, rows.dtype), way.move.hold(rows, way.axes)

    def one(window: Window, last, carry):
        out, _ = carry
        y, saved = how.forward(way.move.take(held, window, way.axes), window.group_sizes, used)
        return way.move.put(out, y, window, way.axes), saved

    room = _room(len(rows), way)
    shapes = jax.eval_shape(
        lambda x, used: how.forward(x, jnp.zeros(counts.size // ways(way.axes), jnp.int32), used)[1],
        jax.ShapeDtypeStruct((room, rows.shape[1]), rows.dtype),
        used,
    )
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    out, saved = _rounds(one, (jnp.zeros_like(held), nothing), way, counts, len(rows))
    saved = checkpoint_name(saved, PRODUCT)  # the rows, too: without them it would be the whole round again
    return way.move.finish(out, way.axes), (rows, counts, used, saved, scalars_like(weights))


def _backward(how: FeedForward, way: _Way, residuals, g):
    rows, counts, used, saved, like = residuals
    held_g = way.move.hold(g, way.axes)

    def one(window: Window, last: Bool[Array, ""], carry):
        d_rows, d_used = carry

        def again():
            x = way.move.take(way.move.hold(rows, way.axes), window, way.axes)
            return how.forward(x, window.group_sizes, used)[1]

        d_x, d_new = how.backward(
            lax.cond(last, lambda: saved, again),
            window.group_sizes,
            used,
            way.move.take(held_g, window, way.axes),
        )
        d_used = jax.tree.map(lambda total, d: total + d.astype(jnp.float32), d_used, d_new)
        return way.move.put(d_rows, d_x, window, way.axes), d_used

    nothing = jnp.zeros_like(held_g), how.gradients_like(used)
    d_rows, d_used = _rounds(one, nothing, way, counts, len(rows))
    return way.move.finish(d_rows, way.axes), None, how.give_back(d_used, like)


_exchange.defvjp(_forward, _backward)


def _rounds(one: Callable[[Window, Bool[Array, ""], Any], Any], carry, way: _Way, counts: Int[Array, " E"], num_rows):
    """carry = one(window, whether it is the last, carry) until all rows have come to their devices; once at least."""
    devices, room = ways(way.axes), _room(num_rows, way)
    counts = lax.all_gather(counts, way.axes)
    fullest = counts.sum(0).reshape(devices, -1).sum(1).max()
    # As many on every device of the mesh, since the devices of an axis wait for each other in each.
    turns = jnp.maximum(lax.pmax((fullest + room - 1) // room, way.all_axes), 1)

    def body(state):
        turn, carry = state
        return turn + 1, one(_window(counts, way.axes, num_rows, room, turn * room), turn == turns - 1, carry)

    return lax.while_loop(lambda state: state[0] < turns, body, (jnp.int32(0), carry))[1]


def _room(num_rows: int, way: _Way) -> int:
    """How many rows a device takes in a round."""
    return min(ways(way.axes) * num_rows, _rounded_up(int(ROOM * num_rows)))


def _rounded_up(rows: int) -> int:
    """To what kernels want to tile."""
    tile = 512 if rows > 2048 else 8
    return -(-rows // tile) * tile
