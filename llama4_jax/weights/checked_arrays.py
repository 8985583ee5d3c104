"""A checksum in every stored piece of an array, so that no damaged number is ever taken for a sound one.

It is the codec `crc32c` of Zarr 3: TensorStore writes a CRC-32C behind each chunk, and compares it whenever it reads
one, for a whole array or for a part, on whichever devices, in our code or in that of others. What OCDBT keeps outside
of chunks (its manifest, its tree, and arrays of less than a kilobyte within it) has checksums of its own. Arrays that
were written without are read as before.

Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/crc32c/v1.0.html
"""

import logging
import os
import re
import sys

import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils  # Orbax has no option for codecs

CHECKSUM = {"name": "crc32c"}
CODECS = [CHECKSUM]  # the last ones of every array that is written; benchmarks/checksums.py leaves them out


def _with_checksums(build):
    def build_array_write_spec(*args, **kwargs):
        made = build(*args, **kwargs)
        spec = made.json
        spec = spec["base"] if spec["driver"] == "cast" else spec
        if spec["driver"] == "zarr3":
            codecs = spec["metadata"]["codecs"]
            if codecs[0]["name"] == "sharding_indexed":  # chunks within a larger one
                codecs = codecs[0]["configuration"]["codecs"]
            for codec in codecs:
                if codec["name"] == "zstd":
                    codec["configuration"]["level"] = 1  # as Orbax has it for Zarr 2; weights hardly compress
            codecs.extend(CODECS)
        return made

    return build_array_write_spec


if not hasattr(tensorstore_utils.build_array_write_spec, "__wrapped__"):
    wrapped = _with_checksums(tensorstore_utils.build_array_write_spec)
    wrapped.__wrapped__ = tensorstore_utils.build_array_write_spec
    tensorstore_utils.build_array_write_spec = wrapped


def tree_handler(**options) -> ocp.PyTreeCheckpointHandler:
    """Writes trees whose arrays have checksums, with the limits of Orbax's StandardCheckpointHandler."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, save_concurrent_gb=96, restore_concurrent_gb=96, **options)


class _RaisedToo(logging.Filter):
    """Leaves out what is logged, with a traceback each, of errors in Orbax's threads that it also raises where they are
    awaited: a full disk would be said two dozen times."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        files, trace = [record.pathname], record.exc_info[2]
        while trace is not None:
            files.append(trace.tb_frame.f_code.co_filename)
            trace = trace.tb_next
        return not any("/orbax/checkpoint/" in file.replace(os.sep, "/") for file in files)


def say_errors_once() -> None:
    """From now on Orbax only raises the errors of its threads. For a program that writes checkpoints."""
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    if any(isinstance(each, _RaisedToo) for each in logs[0].filters):
        return
    for log in logs:
        log.addFilter(_RaisedToo())
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        # Writes that end after another has failed find that nobody waits for them: TensorStore would print that.
        closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        if not closed:
            before(unraisable)

    sys.unraisablehook = hook


def has_checksum(store: ts.TensorStore) -> bool:
    codecs = store.spec().to_json().get("metadata", {}).get("codecs", [])
    inner = [c for codec in codecs for c in codec.get("configuration", {}).get("codecs", [])]
    return CHECKSUM in codecs + inner


def reason_of(error: BaseException) -> str:
    """Why an array could not be read or written, in a line that begins with its name. Orbax prints pages, and
    TensorStore's own words are in the cause."""
    link: BaseException | None = error
    said = None
    for _ in range(8):  # of causes
        if link is None:
            break
        if re.match(r"[A-Z_]+: ", str(link)):  # a status of TensorStore
            said = str(link)
        link = link.__cause__ or link.__context__
    if said is None:
        text = str(error).strip()
        return text.splitlines()[0][:200] if text else type(error).__name__
    code, _, text = said.partition(": ")
    name = re.search(r'"(?:[^"]*?/)??([^/"]+)/(?:c[0-9/]*|zarr\.json|\.zarray|[0-9.]+)"', text)
    of_system = re.search(r"os_error_code='(\d+)'", text)
    if of_system and code != "NOT_FOUND":
        what = os.strerror(int(of_system[1]))
    elif "Digest mismatch" in text or "CRC" in text:
        what = "its bytes do not fit their checksum"
    elif code == "NOT_FOUND" or "size of 0 bytes" in text:
        what = "a part of it is not there"
    else:
        what = f"it cannot be decoded ({code}: …{text[-80:]})"
    if of_system and not name:
        return what
    return f"{name[1]}: {what}" if name else f"{code}: {text}"[:200]
