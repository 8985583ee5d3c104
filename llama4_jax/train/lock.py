"""One training of a run at a time: two would mix their logs and checkpoints.

A lock of the operating system on `RUN/training.lock`. It is let go when its process ends, however it ends; a process
forked from it does not hold it. A run of several hosts is locked by its first process, for all of them.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator

import filelock
from etils import epath

from llama4_jax.atomic import in_bucket
from llama4_jax.train import hosts

LOCK = "training.lock"
# What file systems say that know no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def alone(run: epath.Path) -> Iterator[None]:
    """Within it, no other training than this one, on all its hosts, writes the run. Raises as `locked` does, on every
    host."""
    with contextlib.ExitStack() as stack:
        with hosts.together("locking the run"):
            if hosts.index() == 0:
                stack.enter_context(locked(run))
        yield


@contextlib.contextmanager
def locked(run: epath.Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Within it, no other process trains this run. The directory is made if it is not there.

    Raises ValueError, before anything else is written, if another process trains it. Buckets and file systems without
    locks cannot tell: `say` is told so by the latter, and training goes on.
    """
    if in_bucket(run):
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    path = os.fspath(run / LOCK)
    lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{run} is being trained already{_by(path)}. Two trainings would mix their logs and checkpoints: wait for "
            f"it, stop it, or give this one another --name."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        say(f"{run} is on a file system without locks: take care that nothing else trains this run ({error}).")
        yield
        return
    try:
        _write(path, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        _write(path, "")
        lock.release()


def _write(path: str, text: str) -> None:
    """Who holds the lock, for the message of others: with a full disk it stays unsaid."""
    with contextlib.suppress(OSError), open(path, "r+") as file:
        file.truncate()
        file.write(text)


def _by(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(path) as file:
            name = file.readline(200).strip()
        if name.isprintable() and name:
            return f", by {name}"
    return ""
