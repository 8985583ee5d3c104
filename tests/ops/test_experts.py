"""Experts on any mesh, by any transport and however unevenly loaded: outputs and gradients of one device."""

import functools
import re

import jax
import numpy as np
import pytest
from expert_cases import (
    EVEN,
    MESHES,
    ONE,
    SKEWED,
    assert_equal,
    example,
    on_mesh,
    ragged_all_to_all,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.ops import exchange as exchange_module
from llama4_jax.ops.experts import experts
from llama4_jax.sharding import SERVING, make_mesh


@pytest.fixture(autouse=True, scope="module")
def a_cpu_that_can():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
        yield


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("transport", "load", "top_k"),
    [("gather", EVEN, 1), ("gather", ONE, 1), ("ragged", SKEWED, 1), ("ragged", ONE, 2), ("gather", SKEWED, 2)],
)
def test_a_mesh_computes_what_one_device_does(mesh, transport, load, top_k):
    arguments = example(load, top_k)
    assert_equal(on_mesh(arguments, make_mesh(MESHES[mesh]), transport), value_and_gradients(*arguments))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("mesh", ["expert 4, tensor 2", "data 2, expert 2, tensor 2"])
def test_tokens_that_all_devices_hold_stay_where_they_are(mesh, batch):
    arguments = example(SKEWED, batch=batch, seq=1)
    got = on_mesh(arguments, make_mesh(MESHES[mesh]), "auto", SERVING)
    assert_equal(got, value_and_gradients(*arguments))


@settings(max_examples=12, deadline=None)
@given(
    load=st.sampled_from([EVEN, SKEWED, ONE]), transport=st.sampled_from(["gather", "ragged"]),
    seed=st.integers(0, 99), top_k=st.integers(1, 3), seq=st.sampled_from([1, 3]), num_experts=st.sampled_from([4, 8]),
)  # fmt: skip
def test_whoever_is_chosen_nothing_is_dropped(load, transport, seed, top_k, seq, num_experts):
    arguments = example(load, top_k, seq=seq, seed=seed, num_experts=num_experts)
    got = on_mesh(arguments, make_mesh(MESHES["expert 4, tensor 2"]), transport)
    assert_equal(got, value_and_gradients(*arguments))


def test_balanced_experts_take_one_round_and_a_single_one_takes_as_many_as_it_needs(monkeypatch):
    turns = []

    def counting(condition, body, state):
        jax.debug.callback(lambda n: turns.append(int(n)), jax.lax.while_loop(condition, body, state)[0])
        return jax.lax.while_loop(condition, body, state)

    class Lax:
        while_loop = staticmethod(counting)

        def __getattr__(self, name):
            return getattr(jax.lax, name)

    monkeypatch.setattr(exchange_module, "lax", Lax())
    mesh = make_mesh(MESHES["expert 8"])
    for load, expected in ((EVEN, {1}), (ONE, {6})):
        x, expert, gate, weights = example(load, seq=32)
        if load == EVEN:
            expert = np.broadcast_to(np.arange(32) % 8, (8, 32))[..., None].astype(np.int32)
        turns.clear()
        with jax.set_mesh(mesh):
            jax.block_until_ready(jax.jit(functools.partial(experts, transport="gather"))(x, expert, gate, weights))
        jax.effects_barrier()
        assert turns and set(turns) <= expected


def test_experts_stay_where_they_are():
    """With experts split over all devices, no weight is moved, and no gradient of one."""
    arguments = example(EVEN)
    mesh = make_mesh(MESHES["expert 8"])
    with jax.set_mesh(mesh):
        text = value_and_gradients.lower(*arguments, transport="gather", mesh=mesh).compile().as_text()
    moved = re.findall(r" = \(?\w+\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text)
    assert ("48,16", "all-gather") in moved  # the tokens of all eight devices: rows of 16 numbers
    assert all(shape.count(",") < 2 for shape, _ in moved)  # weights have three axes and four


def test_a_kernel_gives_what_the_portable_product_does():
    arguments = example(SKEWED, top_k=2)
    mesh = make_mesh(MESHES["fsdp 2, expert 4"])
    expected = jax.jit(functools.partial(experts, implementation="blocks"))(*arguments)
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(experts, implementation="megablox"))(*arguments)
    assert_equal(got, expected)


def test_an_unknown_transport_is_named():
    with jax.set_mesh(make_mesh(MESHES["expert 8"])), pytest.raises(ValueError, match="transport 'mail': expected one"):
        jax.jit(functools.partial(experts, transport="mail"))(*example(EVEN))
