"""How two tensors differ, in words: what was done to the one to make the other.

    how_they_differ(ours, theirs, "E D F").text     "experts 0 and 1 are exchanged"

Each answer is checked on every number before it is given: that one tensor *is* the other with its experts in another
order, transposed, rounded, times 8. Two tensors of which none of this is true differ for a reason that is not known,
and so it is said. Nothing is searched for: an order is read off the digests of the slices along an axis, and what a few
numbers rule out is not tried on all, so that the time is in proportion to the size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# Of the axes' letters in `weights.table`: (one, several)
AXES = {
    "E": ("expert", "experts"),
    "N": ("query head", "query heads"),
    "K": ("key/value head", "key/value heads"),
    "P": ("gate and up", "gate and up"),
    "H": ("element of each head", "elements of each head"),
    "D": ("channel", "channels of the embedding"),
    "F": ("hidden unit", "hidden units"),
    "V": ("word", "words of the vocabulary"),
}
_APART = "EPNK"  # axes of whose slices some may be at fault and others not, in the order in which that is looked at
_FEW = 8  # elements that differ, and are each named
_SAMPLE = 4096  # numbers by which most causes are ruled out
_FORMATS = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class TensorCause:
    """What makes one tensor of the other.

    - kind: "order", "transposed", "rounded", "scaled" … or "unknown"; what machines read
    - text: the same in words, of ours
    - order: of "order", (axis, for each slice of ours along it: which slice of the reference's it is)
    """

    kind: str
    text: str
    order: tuple[str, tuple[int, ...]] | None = None


UNKNOWN, SCATTERED = "unknown", "numbers in another order"


def how_they_differ(
    ours: np.ndarray, theirs: np.ndarray, axes: str, *, contracted: str = "", eps: float = 2.0**-23
) -> TensorCause | None:
    """The cause of their difference; None if all values are equal (where both are not a number, too).

    - ours, theirs: of the same shape and in float32
    - axes: a letter for each axis, as in `weights.table`: "D N H"
    - contracted: those of them that a product sums over, side by side; the others are its outputs
    - eps: of the coarser of the two number formats: how far factors may be off
    """
    names = axes.split()
    wrong = ~_equal(ours, theirs)
    if not wrong.any():
        return None
    if not np.isfinite(ours).all() and np.isfinite(theirs).all():
        return TensorCause("not finite", f"{_count(int((~np.isfinite(ours)).sum()), ours.size)} are not finite")
    found = _elements(ours, theirs, names, wrong) or _whole(ours, theirs, names, contracted.split(), eps)
    if found is not None:
        return found
    apart = _apart(ours, theirs, names, contracted, wrong, eps)
    if apart is not None and apart.kind not in (UNKNOWN, SCATTERED):
        return apart
    last = _mixed(ours, theirs, names, contracted.split()) or _by_slice(ours, theirs, names, eps)
    return last or apart or _scattered(ours, theirs) or _unknown(ours, theirs)


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _count(some: int, of: int) -> str:
    return f"all {of:,} numbers" if some == of else f"{some:,} of {of:,} numbers"


def _elements(ours: np.ndarray, theirs: np.ndarray, names: list[str], wrong: np.ndarray) -> TensorCause | None:
    """A few numbers, each named."""
    places = np.flatnonzero(wrong)
    if len(places) > min(_FEW, ours.size // 16):
        return None
    said = []
    for place in places[:3]:
        at = np.unravel_index(place, ours.shape)
        where = ", ".join(f"{name} {int(n)}" for name, n in zip(names, at, strict=True))
        said.append(f"at {where}: {ours[at]:.6g} instead of {theirs[at]:.6g}")
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    what = "one number differs" if len(places) == 1 else f"{len(places)} numbers differ"
    return TensorCause("elements", f"{what}, {'; '.join(said)}{more}")


def _whole(
    ours: np.ndarray, theirs: np.ndarray, names: list[str], contracted: list[str], eps: float
) -> TensorCause | None:
    """What was done to all of a tensor; None if nothing known was."""
    found = _constant(ours, theirs) or _rounded(ours, theirs) or _affine(ours, theirs, eps)
    if found is not None:
        return found
    # One of the two may have been rounded besides: then they are one only after both are.
    for seen, rounded in ((lambda x: x, ""), (lambda x: x.astype(ml_dtypes.bfloat16), ", and rounded to bfloat16")):
        a, b = np.ascontiguousarray(seen(ours)), np.ascontiguousarray(seen(theirs))
        if _sums(a) != _sums(b):
            continue
        found = _ordered(a, b, names) or _transposed(a, b, names, contracted)
        if found is not None:
            return TensorCause(found.kind, found.text + rounded, found.order)
    return None


def _sums(x: np.ndarray) -> tuple[int, int]:
    """Equal for the same numbers in whatever order, and hardly for others."""
    first = second = 0
    for part in _pieces(x + x.dtype.type(0)):
        bits = part.view(f"u{x.dtype.itemsize}").astype(np.uint64)
        first += int(bits.sum(dtype=np.uint64))
        second += int((bits * bits * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(17)).sum(dtype=np.uint64))
    return first, second


def _pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(x).reshape(-1)
    for start in range(0, flat.size, 2**20):
        yield flat[start : start + 2**20]


def _sample(*arrays: np.ndarray) -> list[np.ndarray]:
    """Some numbers of each array, at the same places."""
    flat = [array.reshape(-1) for array in arrays]
    return [x[:: max(1, x.size // _SAMPLE)] for x in flat]


def _constant(ours: np.ndarray, theirs: np.ndarray) -> TensorCause | None:
    for whose, array, other in (("", ours, theirs), ("of the reference ", theirs, ours)):
        value = array.flat[0]
        if array.size > 1 and np.all(array == value) and not np.all(other == other.flat[0]):
            if value == 0:
                return TensorCause("zero", f"{whose}all are 0")
            return TensorCause("constant", f"{whose}all are {value:.6g}")
    return None


def _rounded(ours: np.ndarray, theirs: np.ndarray) -> TensorCause | None:
    """Values of few bits, and those that they were made of."""
    with np.errstate(over="ignore", invalid="ignore"):
        for name, dtype in _FORMATS.items():
            ways = {"rounded": lambda x, dtype=dtype: x.astype(dtype).astype(np.float32)}
            ways |= {"cut off, not rounded,": _cut} if name == "bfloat16" else {}
            for what, a, b in (("ours is the reference's,", ours, theirs), ("the reference is ours,", theirs, ours)):
                for how, made in ways.items():
                    some_a, some_b = _sample(a, b)
                    if np.array_equal(made(some_b), some_a) and np.array_equal(made(b), a, equal_nan=True):
                        return TensorCause("rounded", f"{what} {how} to {name}")
    return None


def _cut(x: np.ndarray) -> np.ndarray:
    """Without the bits that bfloat16 lacks."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _affine(ours: np.ndarray, theirs: np.ndarray, eps: float) -> TensorCause | None:
    """ours = factor · theirs, or theirs + a number."""
    if theirs.size < 4 or not np.isfinite(theirs).all():
        return None
    a, b = (x.astype(np.float64) for x in _sample(ours, theirs))
    shift = float(np.median(a - b))
    if abs(shift) > 16 * eps * np.abs(b).max() and _plus(a, b, shift, eps) and _plus(ours, theirs, shift, eps):
        return TensorCause("shifted", f"ours is the reference's plus {shift:.6g}")
    power = float((b * b).sum())
    factor = float((a * b).sum()) / power if power else 0.0
    if factor and abs(factor - 1) > 16 * eps and _times(a, b, factor, eps) and _times(ours, theirs, factor, eps):
        if abs(factor + 1) <= 4 * eps:
            return TensorCause("scaled", "ours is the reference's with the other sign")
        return TensorCause("scaled", f"ours is the reference's times {factor:.6g}")
    return None


def _plus(a: np.ndarray, b: np.ndarray, shift: float, eps: float) -> bool:
    room = 4 * eps * np.maximum(np.abs(a), np.maximum(np.abs(b), abs(shift)))
    return bool((np.abs(a - b - a.dtype.type(shift)) <= room).all())


def _times(a: np.ndarray, b: np.ndarray, factor: Any, eps: float) -> bool:
    return bool((np.abs(a - np.asarray(factor, a.dtype) * b) <= 4 * eps * np.abs(a) + 1e-30).all())


def _by_slice(ours: np.ndarray, theirs: np.ndarray, names: list[str], eps: float) -> TensorCause | None:
    """Each slice along an axis times a factor of its own, as when a norm's scale was multiplied into a matrix."""
    for axis, name in enumerate(names):
        others = tuple(i for i in range(ours.ndim) if i != axis)
        if ours.shape[axis] < 2 or ours.size // ours.shape[axis] < 4:
            continue

        def factors(a: np.ndarray, b: np.ndarray, others=others) -> np.ndarray:
            power = (b * b).sum(axis=others, keepdims=True, dtype=np.float64)
            return (a * b).sum(axis=others, keepdims=True, dtype=np.float64) / np.where(power, power, 1)

        first = [x.take([0, ours.shape[axis] - 1], axis).astype(np.float64) for x in (ours, theirs)]
        if not _times(*first, factors(*first), eps):
            continue
        factor = factors(ours, theirs)
        if _times(ours, theirs, factor, eps):
            what = f"each of the {AXES.get(name, (name, name))[1]} times a factor of its own"
            low, high = float(factor.min()), float(factor.max())
            return TensorCause("scaled by axis", f"ours is the reference's, {what} ({low:.4g} to {high:.4g})")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def order_of(ours: list[bytes], theirs: list[bytes]) -> tuple[int, ...] | None:
    """For each digest of ours, which of the reference's it is; None if they are not the same ones, or in order. Equal
    ones keep their order."""
    if ours == theirs or sorted(ours) != sorted(theirs):
        return None
    places: dict[bytes, list[int]] = {}
    for i in reversed(range(len(theirs))):
        places.setdefault(theirs[i], []).append(i)
    fixed = {i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a == b}
    for i in fixed:  # of slices that are alike, those in their place stay there
        places[ours[i]].remove(i)
    return tuple(i if i in fixed else places[digest].pop() for i, digest in enumerate(ours))


def slice_digests(x: np.ndarray, axis: int) -> list[bytes]:
    """Of each slice along an axis."""
    rows = np.ascontiguousarray(np.moveaxis(x, axis, 0))
    return [digest(row) for row in rows]


def digest(x: np.ndarray) -> bytes:
    """Of an array's numbers, -0 and 0 alike."""
    return hashlib.blake2b(np.ascontiguousarray(x + x.dtype.type(0)).view(np.uint8), digest_size=12).digest()


def _ordered(a: np.ndarray, b: np.ndarray, names: list[str]) -> TensorCause | None:
    """The slices along one axis in another order."""
    for axis in sorted(range(a.ndim), key=lambda i: a.shape[i]):
        order = order_of(slice_digests(a, axis), slice_digests(b, axis))
        if order is not None:
            return TensorCause("order", say_order(names[axis], order), (names[axis], order))
    return None


def say_order(axis: str, order: tuple[int, ...]) -> str:
    """In words: of ours."""
    _, several = AXES.get(axis, (axis, f"slices along {axis}"))
    moved = [i for i, source in enumerate(order) if i != source]
    size = len(order)
    if axis == "P":
        return "gate and up are exchanged"
    if axis == "H" and size % 2 == 0 and size > 2:
        halves = (*range(0, size, 2), *range(1, size, 2))
        neighbours = tuple(i // 2 + (size // 2) * (i % 2) for i in range(size))
        if order == halves:
            return "each head is in RoPE's other order: ours by halves, where the reference has neighbours"
        if order == neighbours:
            return "each head is in RoPE's other order: ours by neighbours, where the reference has halves"
    if len(moved) == 2:
        return f"{several} {moved[0]} and {moved[1]} are exchanged"
    if order == tuple(reversed(range(size))):
        return f"the {several} are in reverse order"
    if all(source == (i + order[0]) % size for i, source in enumerate(order)):
        shift = -order[0] % size
        return f"the order of the {several} is shifted by {shift if shift <= size // 2 else shift - size}"
    shown = ", ".join(map(str, order[:8])) + (", …" if size > 8 else "")
    return f"the {several} are in another order, permuted: ours are the reference's {shown}"


def _transposed(a: np.ndarray, b: np.ndarray, names: list[str], contracted: list[str]) -> TensorCause | None:
    """A matrix, or each of several, stored with rows for columns: transposed, or only reshaped where it should be."""
    for fixed in _batches(names, contracted):
        mine, right = (_matrices(x, names, contracted, fixed) for x in (a, b))
        if 1 in mine.shape[1:]:
            continue
        if mine.shape[1] == mine.shape[2] and np.array_equal(mine, right.swapaxes(1, 2)):
            return TensorCause("transposed", "the matrix is transposed")
        count, rows, columns = mine.shape
        if rows != columns:
            # A file's matrix [columns, rows] that was read as [rows, columns], or the reverse.
            read = (right.reshape(count, columns, rows).swapaxes(1, 2), right.swapaxes(1, 2).reshape(mine.shape))
            if any(np.array_equal(mine, x) for x in read):
                return TensorCause("transposed", "the matrix is transposed, and reshaped to fit")
    return None


def _batches(names: list[str], contracted: list[str]) -> Iterator[list[str]]:
    """Axes of which each step is a matrix of its own in a file: none, gate and up, experts."""
    of_experts = [name for name in names if name == "E" and "E" not in contracted and len(names) > 2]
    yield of_experts
    if "P" in names:
        yield [*of_experts, "P"]


def _matrices(x: np.ndarray, names: list[str], contracted: list[str], fixed: list[str]) -> np.ndarray:
    """[matrices, inputs, outputs]"""
    inputs = [i for i, name in enumerate(names) if name in contracted]
    batch = [i for i, name in enumerate(names) if name in fixed]
    outputs = [i for i in range(x.ndim) if i not in inputs and i not in batch]
    sizes = [math.prod(x.shape[i] for i in some) for some in (batch, inputs, outputs)]
    return x.transpose(*batch, *inputs, *outputs).reshape(sizes)


def _mixed(a: np.ndarray, b: np.ndarray, names: list[str], contracted: list[str]) -> TensorCause | None:
    """Inputs or outputs in another order that is not one of a single axis."""
    if _sums(a) != _sums(b):
        return None
    mine, right = (_matrices(x, names, contracted, []) for x in (a, b))
    for axis, what in ((2, "outputs"), (1, "inputs")):
        letters = [n for n in names if (n in contracted) == (axis == 1)]
        if len(letters) < 2:
            continue
        found = order_of(slice_digests(mine, axis), slice_digests(right, axis))
        if found is not None:
            shown = ", ".join(map(str, found[:8]))
            return TensorCause("order", f"the {what} ({' '.join(letters)}) are in another order, permuted: {shown}, …")
    return None


def _scattered(ours: np.ndarray, theirs: np.ndarray) -> TensorCause | None:
    """All numbers in an order that none of the above is."""
    if _sums(ours) != _sums(theirs) or not np.array_equal(np.sort(ours, axis=None), np.sort(theirs, axis=None)):
        return None
    return TensorCause(SCATTERED, "the same numbers in another order, of no single axis")


def _apart(
    ours: np.ndarray, theirs: np.ndarray, names: list[str], contracted: str, wrong: np.ndarray, eps: float
) -> TensorCause | None:
    """Some slices along an axis are at fault, and the others are right."""
    for name in _APART:
        if name not in names or ours.shape[axis := names.index(name)] == 1:
            continue
        bad = np.flatnonzero(wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis)))
        # All of them may be at fault in a way of each slice.
        each = [
            how_they_differ(
                ours.take(i, axis), theirs.take(i, axis), " ".join(n for n in names if n != name),
                contracted=" ".join(n for n in contracted.split() if n != name), eps=eps,
            )
            for i in bad[:4]
        ]  # fmt: skip
        known = {cause.text for cause in each if cause is not None}
        if len(bad) == ours.shape[axis] and (len(known) != 1 or each[0].kind in (UNKNOWN, SCATTERED)):
            continue
        if name == "P":
            where = "gate and up each" if len(bad) == 2 else ("its gate", "its up")[bad[0]]
        else:
            where = _some(name, bad.tolist(), ours.shape[axis])
        if len(known) == 1:
            return TensorCause(each[0].kind, f"{where}: {each[0].text}")
        kinds = {cause.kind for cause in each}
        kind = each[0].kind if len(kinds) == 1 else UNKNOWN
        how = "no cause is known" if kind == UNKNOWN else "each in a way of its own, the first: " + each[0].text
        return TensorCause(kind, f"{where}: {how}")
    return None


def _some(axis: str, places: list[int], of: int) -> str:
    one, several = AXES[axis]
    if len(places) == 1:
        return f"{one} {places[0]} alone"
    if len(places) == of:
        return f"each of the {several}"
    return f"{several} {', '.join(map(str, places[:8]))}{' …' if len(places) > 8 else ''} alone"


def _unknown(ours: np.ndarray, theirs: np.ndarray) -> TensorCause:
    powers = np.zeros(3)
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b in zip(_pieces(ours), _pieces(theirs), strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            powers += (a @ b, a @ a, b @ b)
    dot, *sizes = powers
    likeness = float(dot / math.sqrt(math.prod(sizes))) if all(0 < size < math.inf for size in sizes) else 0.0
    what = "other numbers altogether" if abs(likeness) < 0.5 else "near to the reference's, as after training"
    return TensorCause(UNKNOWN, f"no cause is known: {what} (cosine {likeness:.6g})")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors together


def same_model(orders: Mapping[str, tuple[str, tuple[int, ...]]], *, has_bias: bool, group: int) -> str | None:
    """Whether the orders of a layer's tensors undo each other, so that it computes the same; in words, None if not.

    - orders: of tensors by their names within a layer, as `TensorCause.order` has them; none but these differ
    - has_bias: whether the router has one
    - group: query heads that share a key/value head
    """
    experts = {"moe.router.kernel", "moe.gate_up", "moe.down"} | ({"moe.bias"} if has_bias else set())
    heads = {"attention.q.kernel", "attention.o.kernel"}
    keys = {"attention.k.kernel", "attention.v.kernel"}
    said: Callable[[str], str] = lambda what: f"the {what} are in another order in all tensors alike"  # noqa: E731
    found, left = [], dict(orders)
    of_experts = {left.get(name) for name in experts}
    if len(of_experts) == 1 and None not in of_experts:
        found.append(said("experts"))
        left = {name: order for name, order in left.items() if name not in experts}
    of_heads, of_keys = {left.get(name) for name in heads}, {left.get(name) for name in keys}
    if len(of_heads) == 1 and None not in of_heads and len(of_keys) == 1:
        order, keys_order = next(iter(of_heads))[1], next(iter(of_keys))
        by_group = [{q // group for q in order[i : i + group]} for i in range(0, len(order), group)]
        wanted = tuple(next(iter(some)) for some in by_group) if all(len(some) == 1 for some in by_group) else None
        have = tuple(range(len(order) // group)) if keys_order is None else keys_order[1]
        if wanted == have:
            found.append(said("heads"))
            left = {name: order for name, order in left.items() if name not in heads | keys}
    return f"{' and '.join(found)}: it computes the same" if found and not left else None
