"""Several processes, one run: they find each other, check that they mean the same, and never wait for one that is gone.

The same command runs on every host. JAX finds the others by itself on Cloud TPU, Slurm, Open MPI and in indexed jobs of
Kubernetes; anywhere else three variables say it (docs/clusters.md). A process that is alone starts nothing at all.

JAX's coordination service, which the first process runs, keeps a small table of strings and has barriers. Both work
before any device does, so what would make a collective hang for ever is found with them beforehand: a host with another
config, other code, other data, or an error of its own. Later a host that fails says why in that table, and all others
look there every few seconds. One that dies says nothing: it misses its heartbeats, and JAX ends all other processes.
"""

import atexit
import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax._src import clusters, distributed  # to ask, before joining; and the one way to the table

import llama4_jax
from llama4_jax import sharding
from llama4_jax.config import RunConfig

HEARTBEAT_SECONDS = 40  # without a sign of life from a process, after which JAX takes it for dead
_LOOK_SECONDS = 2.0  # between two looks for the failure of another host
_PATIENCE_SECONDS = 1800  # for a host that is alive, and not yet where the others wait for it
_SHOWN = 8  # differences and hosts in an error; there may be thousands
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_RESUME = "Nothing that was saved is lost: run the same command on every host to go on from the last checkpoint."

_names: list[str] = []  # "process 1 (its host)", of all processes, once they are connected
_exchanges = 0
_ending = threading.Lock()  # held by whoever ends this process, so that it says one thing


class OnEveryHost(ValueError):
    """An error that every host raises, at the same place and with the same words."""


def count() -> int:
    """Of the processes of this run. Asks for no device."""
    return distributed.global_state.num_processes


def index() -> int:
    """Of this process among them."""
    return distributed.global_state.process_id


def name() -> str:
    """Of this process and its host, if there are several."""
    return _names[index()]


def connect() -> None:
    """Join the other processes, if there are any. Call it before anything asks JAX for its devices.

    Raises OnEveryHost if the variables that name the others do not fit together. If one of them does not come within
    five minutes, JAX ends this process.
    """
    given = _named_by_variables()
    if given is None and not _in_a_cluster():
        return
    # Ctrl-C and SIGTERM are agreed upon in `train.stop`: this would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    _say_a_last_word()
    jax.distributed.initialize(**(given or {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if count() > 1:
        _names[:] = [f"process {i} ({name})" for i, name in enumerate(_exchange(socket.gethostname()))]
        ended = threading.Event()
        watch = threading.Thread(target=_watch, args=(ended,), name="other hosts", daemon=True)
        watch.start()
        atexit.register(lambda: (ended.set(), watch.join()))  # before JAX takes its client apart


def _named_by_variables() -> dict | None:
    address, number, own = (os.environ.get(name) for name in (_ADDRESS, _COUNT, _INDEX))
    if number is None and own is None:
        return None if address is None else {"coordinator_address": address}  # and the cluster knows the rest
    try:
        if address is None or not 0 <= int(own) < int(number):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise OnEveryHost(
            f"{_ADDRESS}, {_COUNT} and {_INDEX} belong together: HOST:PORT of the first process, the number of "
            f"processes, and which of them this is, from 0. They are {address!r}, {number!r} and {own!r}."
        ) from error
    return {
        "coordinator_address": address,
        "num_processes": int(number),
        "process_id": int(own),
        "cluster_detection_method": "deactivate",  # else it would deal out the devices of this host
    }


def _in_a_cluster() -> bool:
    """Whether JAX knows where the other processes are. A job of a single process is none: JAX would give it one of its
    GPUs only; nor is a pod that belongs to no job, about which it would ask Kubernetes in vain."""
    environ = os.environ
    if "1" in (environ.get("SLURM_NTASKS"), environ.get("OMPI_COMM_WORLD_SIZE")):
        return False
    pod_alone = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" not in environ
    if pod_alone and "TPU_WORKER_HOSTNAMES" not in environ:
        return False
    kinds = clusters.ClusterEnv._cluster_types
    return any(kind.is_env_present() for kind in kinds if not kind.opt_in_only_method)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All hosts leave this block, or all raise OnEveryHost: if any of them raises ValueError or OSError within it.

    Nothing within it may wait for another host. `what` says what is done in it, for the error.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if count() == 1:
        if error is not None:
            raise error
        return
    errors = _exchange("" if error is None else str(error) or type(error).__name__, what)
    if not any(errors):
        return
    hosts: dict[str, list[int]] = {}
    for process, text in enumerate(errors):
        if text:
            hosts.setdefault(text, []).append(process)
    if len(hosts) == 1 and all(errors):
        raise OnEveryHost(errors[0]) from error
    lines = [f"{what} failed on {_listed(processes)}: {text}" for text, processes in hosts.items()]
    raise OnEveryHost("\n".join([*lines[:_SHOWN], "So all hosts have stopped."])) from error


def check_same(what: str, facts: Mapping[str, str]) -> None:
    """Raises OnEveryHost, naming hosts and facts, unless all hosts call this with the same."""
    if count() == 1:
        return
    content = json.dumps(facts, sort_keys=True)
    # The facts themselves are asked for where they differ: with a thousand hosts they would be many.
    client, name = distributed.global_state.client, f"llama4/facts/{what}"
    client.key_value_set(f"{name}/{index()}", content, allow_overwrite=True)
    digests = _exchange(hashlib.sha256(content.encode()).hexdigest(), what)
    if len(set(digests)) == 1:
        return
    usual = collections.Counter(digests).most_common(1)[0][0]
    differing = [process for process, digest in enumerate(digests) if digest != usual]

    def facts_of(process: int) -> dict[str, str]:
        return json.loads(client.blocking_key_value_get(f"{name}/{process}", 60_000))

    reference, lines = facts_of(digests.index(usual)), []
    for process in differing[:_SHOWN]:
        theirs = facts_of(process)
        keys = [key for key in sorted(reference.keys() | theirs.keys()) if reference.get(key) != theirs.get(key)]
        changes = [f"{key}: {theirs.get(key, 'none')} instead of {reference.get(key, 'none')}" for key in keys[:_SHOWN]]
        more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
        lines.append(f"  {_names[process]}: {'; '.join(changes + more)}")
    if len(differing) > _SHOWN:
        lines.append(f"  and {len(differing) - _SHOWN} more processes")
    others = _listed([process for process, digest in enumerate(digests) if digest == usual])
    raise OnEveryHost(f"the hosts differ in {what}. From {others} differ:\n" + "\n".join(lines))


def config_and_code(config: RunConfig) -> dict[str, str]:
    """What must be the same everywhere before there are devices: each field, each file of the program, the versions."""
    fields, _ = jax.tree_util.tree_flatten_with_path(
        dataclasses.asdict(config), is_leaf=lambda x: not isinstance(x, dict)
    )
    facts = {jax.tree_util.keystr(path, simple=True, separator="."): repr(value) for path, value in fields}
    for package in (llama4_jax, sharding):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            facts[path.relative_to(root.parent).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        facts[f"version of {name}"] = importlib.metadata.version(name)
    facts["version of python"] = platform.python_version()
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):  # they change what is compiled
        facts[name] = os.environ.get(name, "")
    return facts


def leave(reason: str, code: int) -> None:
    """End this process with an exit code, because of an error of its own that it has printed; tell the others why.

    Returns only if there are no others.
    """
    if count() == 1:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(f"llama4/failed/{index()}", reason)
    _end(None, code)


def _exchange(text: str, what: str = "starting") -> list[str]:
    """What all processes say, in their order, once all have said it. Raises OnEveryHost if one is not there in time."""
    global _exchanges
    _exchanges += 1
    client, name = distributed.global_state.client, f"llama4/said/{_exchanges}"
    client.key_value_set(f"{name}/{index()}", text)
    try:
        client.wait_at_barrier(name, int(_PATIENCE_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        missing = [i for i in range(count()) if i not in _table(name)]
        raise OnEveryHost(
            f"waited {_PATIENCE_SECONDS / 60:.0f} minutes for {_listed(missing)} to get to {what}: {error}"
        ) from error
    said = _table(name)
    return [said[process] for process in range(count())]


def _table(name: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): text for key, text in distributed.global_state.client.key_value_dir_get(name)}


def _listed(processes: list[int]) -> str:
    names = [_names[i] if _names else f"process {i}" for i in processes[:_SHOWN]]
    more = [f"{len(processes) - _SHOWN} more"] if len(processes) > _SHOWN else []
    return ", ".join(names + more)


def _watch(ended: threading.Event) -> None:
    """In a thread of its own, since the others may be waiting within a collective for the host that failed."""
    while not ended.wait(_LOOK_SECONDS):
        try:
            failed = _table("llama4/failed")
        except jax.errors.JaxRuntimeError:  # the service is gone: JAX is about to end this process
            continue
        for process, reason in failed.items():
            if process != index():
                _end(f"{_names[process]} has stopped the run: {reason}\n{_RESUME}", 1)


def _end(line: str | None, code: int) -> None:
    """Leave at once, since the main thread may wait for ever. The first process keeps the table: it leaves last."""
    _ending.acquire()
    if line is not None:
        print(f"train.py: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(f"llama4/left/{index()}", "")
        deadline = time.monotonic() + 10 * _LOOK_SECONDS
        while index() == 0 and len(_table("llama4/left")) < count() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS / 10)
    os._exit(code)


def _say_a_last_word() -> None:
    """JAX ends a process whose peers are gone with abort(), from a thread of C++: no handler of Python's would run."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        if not _ending.acquire(blocking=False):
            return  # it is ending already, and has said why
        what = "another process of this run was killed, or can no longer be reached" if _names else (
            "not all processes of this run came within the time that they have to find each other"
        )  # fmt: skip
        os.write(2, f"train.py: {what}: see JAX's message above, which may name its task. {_RESUME}\n".encode())
        os._exit(1)

    global _last_word
    _last_word = aborted  # C does not keep it alive
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
