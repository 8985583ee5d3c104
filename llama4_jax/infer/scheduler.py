"""Which request runs when: a pure function of what is known and of what happened, without jax.

    state, plan = step(limits, State(), [Arrived(Request(id=0, length=300, new=64))])

A request waits, is admitted to a free slot of the cache, has its prompt read in pieces, and is decoded until it is
gone. First come, first served: one that is too long for a slot waits for longer ones, and so do those behind it.
Between two calls that decode, a bounded number of a prompt's tokens is read, so that a long prompt holds up nobody's
reply for long; and while prompts are read, replies go on.

Pieces are cut at multiples of their size, counted from the start of the prompt, so that what is computed together does
not depend on what was found in a cache, or on who else was there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """- slots: requests that run at the same time
    - context: tokens that a slot holds, prompt and reply
    - piece: tokens of a prompt that are read at once, at most
    - budget: tokens of prompts that are read between two calls that decode; a piece is read in any case
    - waiting: requests that may wait
    """

    slots: int
    context: int
    piece: int
    budget: int
    waiting: int


@dataclass(frozen=True)
class Request:
    id: int
    length: int  # tokens of its prompt
    new: int  # tokens of its reply, at most


@dataclass(frozen=True)
class Arrived:
    request: Request


@dataclass(frozen=True)
class Gone:
    """The request has its reply, or nobody wants it any more."""

    id: int


@dataclass(frozen=True)
class Running:
    request: Request
    slot: int
    read: int  # tokens of its prompt that are in the cache, or will be when what was planned is done


@dataclass(frozen=True)
class State:
    waiting: tuple[Request, ...] = ()
    running: tuple[Running, ...] = ()  # in the order of their arrival


class Piece(NamedTuple):
    """Tokens start … stop - 1 of a request's prompt. After the last piece it is decoded."""

    id: int
    slot: int
    start: int
    stop: int
    last: bool


class Plan(NamedTuple):
    """What to do next, in this order."""

    refused: tuple[int, ...]  # requests that found the queue full
    admitted: tuple[Running, ...]  # `read` as it was found in a cache
    pieces: tuple[Piece, ...]
    decoding: tuple[int, ...]  # slots


# A request and the free slots → which of them it gets, and how much of its prompt need not be read again. None: it is
# better served a little later, when what it shares with one that is being read is there.
Place = Callable[[Request, tuple[int, ...]], tuple[int, int] | None]


def first_free(request: Request, free: tuple[int, ...]) -> tuple[int, int]:
    return free[0], 0


def step(
    limits: Limits, state: State, events: Sequence[Arrived | Gone], place: Place = first_free
) -> tuple[State, Plan]:
    """What follows from these events, in their order. The new state counts on the plan being carried out."""
    waiting, running, refused = list(state.waiting), list(state.running), []
    for event in events:
        if isinstance(event, Gone):
            waiting = [request for request in waiting if request.id != event.id]
            running = [one for one in running if one.request.id != event.id]
        elif len(waiting) - max(0, limits.slots - len(running)) >= limits.waiting:
            refused.append(event.request.id)
        else:
            waiting.append(event.request)
    admitted = []
    while waiting and len(running) < limits.slots and waiting[0].length + waiting[0].new <= limits.context:
        taken = {one.slot for one in running}
        free = tuple(slot for slot in range(limits.slots) if slot not in taken)
        placed = place(waiting[0], free)
        if placed is None:
            break
        slot, read = placed
        admitted.append(Running(waiting.pop(0), slot, read))
        running.append(admitted[-1])
    pieces, left = [], limits.budget
    for i, one in enumerate(running):
        start = one.read
        while start < one.request.length and (left > 0 or not pieces):
            stop = min((start // limits.piece + 1) * limits.piece, one.request.length)
            pieces.append(Piece(one.request.id, one.slot, start, stop, stop == one.request.length))
            left -= stop - start
            start = stop
        running[i] = replace(one, read=start)
    decoding = tuple(one.slot for one in running if one.read == one.request.length)
    return State(tuple(waiting), tuple(running)), Plan(tuple(refused), tuple(admitted), tuple(pieces), decoding)
