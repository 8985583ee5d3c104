"""The scheduler against what it promises, over random events."""

import random
from dataclasses import dataclass, field

import pytest

from llama4_jax.infer.scheduler import Arrived, Gone, Limits, Request, State, step

LIMITS = Limits(slots=3, context=64, piece=8, budget=16, waiting=4)


@dataclass
class Seen:
    """What a request has had so far."""

    request: Request
    slot: int | None = None
    read: int = 0
    decoding: bool = False


@dataclass
class World:
    """Carries out plans, and holds each to the rules."""

    limits: Limits
    state: State = field(default_factory=State)
    alive: dict[int, Seen] = field(default_factory=dict)

    def do(self, events, found=0, later=None):
        for event in events:
            if isinstance(event, Arrived):
                self.alive[event.request.id] = Seen(event.request)
            else:
                self.alive.pop(event.id, None)

        def place(request, free):
            if request.id == later:
                return None
            assert free and not set(free) & {seen.slot for seen in self.alive.values()} - {None}
            slot = free[found % len(free)]
            self.alive[request.id].slot = slot  # so that the next one in this plan is not given it, too
            return slot, min(found, request.length - 1) // self.limits.piece * self.limits.piece

        self.state, plan = step(self.limits, self.state, events, place)
        for refused in plan.refused:
            del self.alive[refused]
        admitted = [one.request.id for one in plan.admitted]
        waited = [id for id, seen in self.alive.items() if seen.slot is None or id in admitted]
        assert waited[: len(admitted)] == admitted  # first come, first served
        for one in plan.admitted:
            self.alive[one.request.id].read = one.read
        budget = self.limits.budget
        for n, piece in enumerate(plan.pieces):
            seen = self.alive[piece.id]
            assert piece.slot == seen.slot and piece.start == seen.read < piece.stop <= seen.request.length
            assert piece.start // self.limits.piece == (piece.stop - 1) // self.limits.piece  # within one
            assert piece.last == (piece.stop == seen.request.length)
            assert n == 0 or budget > 0
            budget -= piece.stop - piece.start
            seen.read = piece.stop
        expected = {
            seen.slot for seen in self.alive.values() if seen.slot is not None and seen.read == seen.request.length
        }
        assert set(plan.decoding) == expected and len(plan.decoding) == len(expected)
        running = [seen for seen in self.alive.values() if seen.slot is not None]
        assert len(running) <= self.limits.slots and len({seen.slot for seen in running}) == len(running)
        first = self.state.waiting[0].id if self.state.waiting else None
        if later is None or first != later:  # nobody waits beside a free slot, but who is better served later
            assert len(running) == min(len(self.alive), self.limits.slots)
        assert len(self.alive) <= self.limits.slots + self.limits.waiting
        return plan


@pytest.mark.parametrize("seed", range(4))
def test_over_random_events_it_keeps_its_promises(seed):
    draw = random.Random(seed)
    limits = Limits(draw.randint(1, 5), 64, draw.choice([1, 4, 8]), draw.choice([1, 8, 20]), draw.randint(0, 6))
    world, ids = World(limits), 0
    for _ in range(2500):
        events = []
        for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
            if draw.random() < 0.5 and world.alive:
                events.append(Gone(draw.choice([*world.alive, 10**9])))
            else:
                events.append(Arrived(Request(ids, draw.randint(1, 40), draw.randint(1, 24))))
                ids += 1
        gone = {event.id for event in events if isinstance(event, Gone)}
        events = [event for event in events if not (isinstance(event, Arrived) and event.request.id in gone)]
        waiting = world.state.waiting
        world.do(events, draw.choice([0, 3, 8, 24]), waiting[0].id if waiting and draw.random() < 0.3 else None)
    while world.alive:  # everyone who stays is served in the end
        plan = world.do([])
        done = [id for id, seen in world.alive.items() if seen.slot in plan.decoding]
        assert plan.pieces or done
        world.do([Gone(id) for id in done])


def test_a_long_prompt_does_not_hold_up_replies():
    world = World(LIMITS)
    assert world.do([Arrived(Request(0, 5, 8))]).decoding == (0,)
    plan = world.do([Arrived(Request(1, 40, 8))])
    assert [piece.stop for piece in plan.pieces] == [8, 16] and plan.decoding == (0,)
    assert [piece.stop for piece in world.do([]).pieces] == [24, 32]
    assert world.do([]).decoding == (0, 1)


def test_one_that_is_too_long_for_a_slot_waits_and_so_do_those_behind_it():
    state, plan = step(LIMITS, State(), [Arrived(Request(0, 60, 5)), Arrived(Request(1, 4, 4))])
    assert plan.admitted == () and [request.id for request in state.waiting] == [0, 1]
    longer = Limits(**{**vars(LIMITS), "context": 65})
    assert [one.request.id for one in step(longer, state, [])[1].admitted] == [0, 1]


def test_pieces_are_cut_at_multiples_whatever_was_found():
    for found, stops in ((0, [8, 16, 21]), (8, [16, 21]), (16, [21])):
        world = World(Limits(1, 64, 8, 100, 1))
        assert [piece.stop for piece in world.do([Arrived(Request(0, 21, 8))], found).pieces] == stops


def test_a_full_queue_says_so_at_once():
    world = World(Limits(1, 64, 8, 8, 2))
    plan = world.do([Arrived(Request(id, 4, 4)) for id in range(5)])
    assert plan.refused == (3, 4) and [one.request.id for one in plan.admitted] == [0]
    assert world.do([Gone(1), Arrived(Request(5, 4, 4))]).refused == ()
