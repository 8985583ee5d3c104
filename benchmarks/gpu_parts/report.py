"""How a part reports: one record a case, sent as soon as it is known, so that a part that is killed loses nothing.

A case that fails says so and the next one runs; a case for which no time is left says that. Programs are compiled
several at once, before the cases that need them are timed: compiling takes longer than all else, and the device must be
idle but for what is timed.
"""

import concurrent.futures
import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Figures = dict[str, Any]


class Case(NamedTuple):
    """- trace: gives a `jax.stages.Traced`, from shapes alone
    - measure: takes the compiled program, gives figures"""

    name: str
    trace: Callable[[], Any]
    measure: Callable[[Any], Figures]


class Out:
    """- send: takes a record, a dict of JSON
    - deadline: of the part, in the time of `time.monotonic`; no case begins after it
    - given: figures of earlier parts, by part and case
    - pattern: cases in whose name it is not found are left out, and not compiled"""

    def __init__(
        self,
        send: Callable[[dict], None],
        deadline: float,
        given: dict[str, dict[str, Figures]] | None = None,
        pattern: str = "",
    ):
        self._send, self.deadline, self.given, self._pattern = send, deadline, given or {}, re.compile(pattern)
        self.measured: dict[str, Figures] = {}  # by case

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wanted(self, name: str) -> bool:
        return self._pattern.search(name) is not None

    def case(self, name: str, measure: Callable[[], Figures], **more) -> bool:
        """Whether it gave figures. `ok` among them, if there, says whether they are right."""
        if not self.wanted(name):
            return False
        record: dict[str, Any] = {"case": name, **more}
        start = time.monotonic()
        try:
            record["figures"] = _finite(measure()) if self.left > 0 else None
        except Exception as error:  # whatever it is, the next case runs
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        else:
            if record["figures"] is None:
                record["skipped"] = "no time left"
        record["seconds"] = round(time.monotonic() - start, 3)
        gc.collect()  # what a failed case held
        self._send(record)
        if record.get("figures"):
            self.measured[name] = record["figures"]
        return name in self.measured

    def cases(self, cases: Sequence[Case]) -> None:
        """In waves: those of a wave are compiled side by side, then timed one after another."""
        cases = [case for case in cases if self.wanted(case.name)]
        at_once = max(1, (os.cpu_count() or 1) // 2)
        for first in range(0, len(cases), at_once):
            wave = cases[first : first + at_once]
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:  # each begins when it is traced
                compiling = [pool.submit(self._compiled, *self._lowered(case)) for case in wave]
            for case, program in zip(wave, compiling, strict=True):

                def measure(case=case, program=program):
                    return case.measure(program.result()[0])

                seconds = {} if program.exception() else program.result()[1]
                self.case(case.name, measure, **seconds)
            del compiling, program, measure

    def _lowered(self, case: Case) -> tuple[Any, Exception | None, float]:
        start = time.monotonic()
        if self.left <= 0:
            return None, None, start  # `case` skips it
        try:
            return case.trace().lower(), None, start
        except Exception as error:
            return None, error, start

    def _compiled(self, lowered: Any, error: Exception | None, start: float) -> tuple[Any, dict[str, float]]:
        """And the seconds of tracing, lowering and compiling, a program beside others."""
        if error is not None:
            raise error
        if lowered is None or self.left <= 0:
            return None, {}
        program = lowered.compile()
        return program, {"compile_seconds": round(time.monotonic() - start, 2)}


def _finite(figures: Figures) -> Figures:
    """JSON has no NaN: it becomes "nan"."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


class Timing(NamedTuple):
    """Seconds of one run."""

    median: float
    low: float
    high: float
    runs: int

    def figures(self, unit: float = 1e3, name: str = "ms") -> Figures:
        return {name: self.median * unit, f"{name} low": self.low * unit, f"{name} high": self.high * unit}


def timed(run: Callable[[], Any], *, seconds: float = 0.5, batches: int = 5) -> Timing:
    """Times `run`, whose results are waited for, after two runs that do not count. Several runs are queued before each
    wait, as many as take a few hundredths of a second, so that the host's part does not count."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = max(time.perf_counter() - start, 1e-6)
    at_once = max(1, min(100, int(min(0.05, seconds / batches) / once)))
    batches = max(3, min(batches, int(seconds / (once * at_once))))
    found = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(at_once):
            result = run()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / at_once)
    return Timing(statistics.median(found), min(found), max(found), batches * at_once)


def program_bytes(program: jax.stages.Compiled) -> Figures:
    """What the compiler says that a program needs of the device's memory, in GiB."""
    used = program.memory_analysis()
    if used is None:
        return {}
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    parts = {"arguments": used.argument_size_in_bytes, "temporaries": used.temp_size_in_bytes, "results": new}
    return {f"{name} GiB": size / 2**30 for name, size in parts.items()}
