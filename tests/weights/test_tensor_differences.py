"""Two tensors, one made of the other by a known mistake: it has the right name, and what is only like it has none."""

import ml_dtypes
import numpy as np
import pytest

from llama4_jax.weights.parity.tensors import UNKNOWN, how_they_differ, same_model

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 0.1, shape).astype(np.float32)


Q, OUT, K = normal(32, 4, 8), normal(4, 8, 32), normal(32, 2, 8)  # D N H, N H D, D K H
GATE_UP, DOWN = normal(4, 2, 32, 24), normal(4, 24, 32)  # E P D F, E F D
ROUTER, NORM, TABLE = normal(32, 4), 1 + normal(32), normal(64, 32)
HALVES = [0, 2, 4, 6, 1, 3, 5, 7]
OF_Q, OF_O, OF_K, OF_DOWN = ("D N H", "D"), ("N H D", "N H"), ("D K H", "D"), ("E F D", "F")


def changed(x: np.ndarray, change) -> np.ndarray:
    x = x.copy()
    change(x)
    return x


def element(x):
    x[1, 3, 5] += 0.5


def one_expert(x):
    x[2] = 0


def one_head(x):
    x[:, 3] = x[:, 3] * 2


FAULTS = {
    "an expert's row": (DOWN, lambda x: changed(x, element), OF_DOWN, "elements", "E 1, F 3, D 5"),
    "experts exchanged": (DOWN, lambda x: x[[1, 0, 2, 3]], OF_DOWN, "order", "experts 0 and 1 are exchanged"),
    "experts reversed": (DOWN, lambda x: x[::-1], OF_DOWN, "order", "experts are in reverse order"),
    "experts permuted": (DOWN, lambda x: x[[2, 0, 3, 1]], OF_DOWN, "order", "the reference's 2, 0, 3, 1"),
    "router's columns": (ROUTER, lambda x: x[:, [0, 3, 2, 1]], ("D E", "D"), "order", "experts 1 and 3 are exchanged"),
    "query heads": (Q, lambda x: x[:, [1, 0, 2, 3]], OF_Q, "order", "query heads 0 and 1 are exchanged"),
    "query heads by group": (OUT, lambda x: x[[0, 2, 1, 3]], OF_O, "order", "query heads 1 and 2 are exchanged"),
    "key heads": (K, lambda x: x[:, ::-1], OF_K, "order", "key/value heads 0 and 1 are exchanged"),
    "rope to halves": (Q, lambda x: x[..., HALVES], OF_Q, "order", "RoPE's other order: ours by halves"),
    "rope from halves": (K, lambda x: x[..., np.argsort(HALVES)], OF_K, "order", "ours by neighbours"),
    "rope of one head": (
        Q, lambda x: np.concatenate([x[:, :3], x[:, 3:, HALVES]], 1), OF_Q, "order", "query head 3 alone: each"),
    "rows across heads": (
        Q, lambda x: x.reshape(32, 32)[:, np.arange(32) ^ 9].reshape(x.shape), OF_Q, "order", "outputs (N H)"),
    "gate and up": (GATE_UP, lambda x: x[:, ::-1], ("E P D F", "D"), "order", "gate and up are exchanged"),
    "vocabulary": (TABLE, lambda x: np.roll(x, 1, 0), ("V D", ""), "order", "words of the vocabulary is shifted by 1"),
    "square transposed": (OUT, lambda x: x.reshape(32, 32).T.reshape(x.shape), OF_O, "transposed", "is transposed"),
    "experts transposed": (
        DOWN, lambda x: x.swapaxes(1, 2).reshape(x.shape), OF_DOWN, "transposed", "transposed, and reshaped"),
    "gate transposed": (
        GATE_UP[0], lambda x: np.stack([x[0].T.reshape(32, 24), x[1]]), ("P D F", "D"), "transposed", "its gate: "),
    "scaled": (TABLE, lambda x: x * np.float32(8), ("V D", ""), "scaled", "times 8"),
    "scaled by a tenth more": (ROUTER, lambda x: x * np.float32(1.1), ("D E", "D"), "scaled", "times 1.1"),
    "negated": (ROUTER, lambda x: -x, ("D E", "D"), "scaled", "the other sign"),
    "a head scaled": (Q, lambda x: changed(x, one_head), OF_Q, "scaled", "head 3 alone: ours is the reference's times"),
    "a norm multiplied in": (Q, lambda x: x * NORM[:, None, None], OF_Q, "scaled by axis", "channels of the embedding"),
    "norm plus one": (NORM, lambda x: x + 1, ("D", ""), "shifted", "plus 1"),
    "zeros": (Q, np.zeros_like, OF_Q, "zero", "all are 0"),
    "ones": (NORM, np.ones_like, ("D", ""), "constant", "all are 1"),
    "an expert of zeros": (DOWN, lambda x: changed(x, one_expert), OF_DOWN, "zero", "expert 2 alone: all are 0"),
    "not a number": (NORM, lambda x: np.where(np.arange(32) == 3, np.nan, x), ("D", ""), "not finite", "1 of 32"),
}  # fmt: skip
for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
    dtype = getattr(ml_dtypes, name, np.float16)
    FAULTS[name] = (Q, lambda x, d=dtype: x.astype(d).astype(np.float32), OF_Q, "rounded", f"rounded to {name}")
FAULTS["cut off"] = (
    Q, lambda x: (x.view(np.uint32) & 0xFFFF0000).view(np.float32), OF_Q, "rounded", "cut off, not rounded, to bfloat16"
)  # fmt: skip
FAULTS["rounded and permuted"] = (
    DOWN, lambda x: x[::-1].astype(ml_dtypes.bfloat16).astype(np.float32), OF_DOWN, "order",
    "reverse order, and rounded to bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_name(fault):
    right, change, (axes, contracted), kind, words = FAULTS[fault]
    cause = how_they_differ(np.ascontiguousarray(change(right), np.float32), right, axes, contracted=contracted)
    assert cause.kind == kind and words in cause.text, cause


def almost(x: np.ndarray) -> np.ndarray:
    """In another order, but for one number."""
    x = np.ascontiguousarray(x[[1, 0, 2, 3]])
    x[3, 0, 0] += 1e-3
    return x


@pytest.mark.parametrize(
    ("right", "ours", "axes"),
    [
        (Q, normal(32, 4, 8), "D N H"),
        (Q, np.sort(normal(32, 4, 8), axis=None).reshape(Q.shape), "D N H"),
        (NORM, 1 + normal(32), "D"),
        (DOWN, almost(DOWN), "E F D"),
        (OUT, OUT.reshape(32, 32).T.reshape(OUT.shape) + normal(4, 8, 32) * 1e-3, "N H D"),
        (TABLE, TABLE * (1 + normal(64, 32)), "V D"),
        (Q, np.float32(8) * Q + normal(32, 4, 8) * 1e-3, "D N H"),
        (Q, Q.astype(ml_dtypes.bfloat16).astype(np.float32) + np.float32(1e-5), "D N H"),
    ],
)
def test_what_is_only_like_a_fault_is_not_called_one(right, ours, axes):
    contracted = {"D N H": "D", "E F D": "F", "N H D": "N H"}.get(axes, "")
    cause = how_they_differ(ours, right, axes, contracted=contracted)
    assert cause.kind == UNKNOWN and "no cause is known" in cause.text, cause


def test_equal_tensors_do_not_differ():
    some = np.where(Q > 0.1, np.nan, Q)
    assert how_they_differ(some, some.copy(), "D N H", contracted="D") is None
    assert how_they_differ(np.zeros(4, np.float32), -np.zeros(4, np.float32), "D") is None


def test_factors_are_found_in_what_was_stored_in_bfloat16():
    right = Q.astype(ml_dtypes.bfloat16).astype(np.float32)
    ours = (right * np.float32(1.7)).astype(ml_dtypes.bfloat16).astype(np.float32)
    cause = how_they_differ(ours, right, "D N H", contracted="D", eps=2.0**-7)
    assert cause.kind == "scaled" and float(cause.text.rpartition(" ")[2]) == pytest.approx(1.7, rel=2e-3)


def test_orders_that_undo_each_other_are_the_same_model():
    experts, heads = ("E", (2, 0, 1)), ("N", (2, 3, 0, 1))
    moe = {"moe.router.kernel": experts, "moe.gate_up": experts, "moe.down": experts}
    assert "the experts are in another order" in same_model(moe, has_bias=False, group=2)
    assert same_model(moe, has_bias=True, group=2) is None  # the bias has not moved along
    assert same_model(moe | {"moe.down": ("E", (0, 2, 1))}, has_bias=False, group=2) is None
    attention = {"attention.q.kernel": heads, "attention.o.kernel": heads}
    keys = {"attention.k.kernel": ("K", (1, 0)), "attention.v.kernel": ("K", (1, 0))}
    assert "heads" in same_model(attention | keys, has_bias=False, group=2)
    assert same_model(attention, has_bias=False, group=2) is None  # their keys stay behind
    within = {name: ("N", (1, 0, 2, 3)) for name in attention}
    assert "heads" in same_model(within, has_bias=False, group=2)
    assert same_model(within, has_bias=False, group=1) is None
