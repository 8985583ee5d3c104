"""Ctrl-C that is never lost, and stops what it should stop.

Python raises KeyboardInterrupt wherever it happens to be. That may be inside a finalizer or a callback of the garbage
collector (JAX has one), where exceptions are printed and dropped; or between two replies, where nobody catches it and
the whole program ends. So here a press is remembered, and raised only where someone is ready for it:

    with watched():                      # the whole conversation
        try:
            with stoppable():            # one reply: a press raises KeyboardInterrupt in here,
                for token in tokens:
                    check()              # or here, if it was dropped on the way
        except KeyboardInterrupt:
            …
        if pressed(): …                  # at any moment since; and forgets it

A press outside of `stoppable` waits for the next one, and stops it at once. The third in a row is raised wherever it
comes, so that whatever hangs can be ended. In other threads than the main one, and where somebody else handles SIGINT,
all of this does nothing, and Ctrl-C is what it was.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_MOST = 3  # presses that nobody took
_WAKE_SECONDS = 0.2


class _Presses:
    count = 0  # not yet taken
    stoppable = False


def _handle(number: int, frame: object) -> None:
    _Presses.count += 1
    if _Presses.stoppable or _Presses.count >= _MOST:
        _Presses.stoppable = False  # what is raised ends it, at whatever moment
        raise KeyboardInterrupt


@contextlib.contextmanager
def watched(*, always: bool = False) -> Iterator[None]:
    """Ctrl-C is remembered in here. `always`: also where SIGINT is ignored, as in what a script starts by `&`."""
    before = signal.getsignal(signal.SIGINT)
    theirs = before is not signal.default_int_handler and not (always and before is signal.SIG_IGN)
    if theirs or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Presses.count, _Presses.stoppable = 0, False
    signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed():  # after the last moment at which anybody asked
        raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A press, or one before that nobody took, raises KeyboardInterrupt in here: at the latest at the end."""
    outer, _Presses.stoppable = _Presses.stoppable, True
    try:
        check()
        yield
        check()
    finally:
        _Presses.stoppable = outer


@contextlib.contextmanager
def waking_readline() -> Iterator[None]:
    """For `input()`: a press is noticed within a fifth of a second, whenever it comes.

    The readline module runs no handler of a signal that comes just before it waits for a key, until the next key. So
    an alarm wakes it up. Where somebody else handles SIGALRM, or there is none, the next key it is."""
    alarm = getattr(signal, "SIGALRM", None)
    free = alarm is not None and signal.getsignal(alarm) is signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(alarm, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _WAKE_SECONDS, _WAKE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(alarm, signal.SIG_DFL)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed, and what Python raised then was dropped."""
    if _Presses.count:
        raise KeyboardInterrupt


def pressed() -> bool:
    """Whether it was, since this was last asked."""
    count, _Presses.count = _Presses.count, 0
    return count > 0
