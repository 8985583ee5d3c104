"""The loader: batches for one process, the same whatever the number of processes, resumable at any batch.

Training. Row r of the global batch has streams of its own, `data.open_documents` of them, and takes them in turn, batch
by batch: the pieces of a long document are far apart, and the batches of a moment hold pieces of many. A stream reads
every n-th document of the shuffled, endless data, and packs them without gaps. So a process makes its own rows and
reads nothing for the others, and all processes' rows together are what one process would make. Where a stream has got
to is two numbers, the document and the token in it, and that is the whole state, whatever has been read ahead.

Evaluation. The held-out documents, each once, in an order that depends on no seed, are packed into one row after
another; row i belongs to batch i // B. Every process packs all of them and keeps its rows: held-out data is small, and
all processes then agree on the number of batches without a word. The last batch is filled up with padding.
"""

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import grain
import msgspec
from grain.experimental import ThreadPrefetchIterDataset

from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.data.documents import Documents
from llama4_jax.data.documents import split as split_documents
from llama4_jax.data.encode import Encoder
from llama4_jax.data.mixture import heldout_documents, training_streams
from llama4_jax.data.packing import PackedBatches
from llama4_jax.data.position import MANY, enough, split_few
from llama4_jax.data.sources import CONVERSATIONS, open_source, parse_source
from llama4_jax.data.watch import Watch
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import ImageConfig
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.untrusted_json import typed

Split = Literal["train", "heldout"]


class Loader(Iterator[Batch]):
    """`next` gives this process's rows of the next batch: numpy arrays [batch_size / process_count, seq_len].

    Training never ends. Held-out does, and begins anew at each `iter`: `for batch in loader` is one evaluation.
    """

    def __init__(self, batches: PackedBatches, *, restarts: bool, prefetch: int, identity: str, watch: Watch):
        self._streams = tuple(batches.documents)
        self._restarts = restarts
        self._identity = identity
        self._watch = watch
        self._batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
        self._start()

    def __iter__(self) -> "Loader":
        if self._restarts:
            self.close()
            self._start()
        return self

    def __next__(self) -> Batch:
        """Raises ValueError or FileNotFoundError soon after a file of the data was changed or removed."""
        self._watch.look()
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins: a small dictionary that JSON can hold."""
        return {"data": self._identity, **self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called, with the same batches bit for bit.

        The state may have more streams than this process: with `merge_states`, a run goes on with another number of
        processes. Raises ValueError, and stays where it is, for a state of other data, or without this process's own.
        """
        if state["data"] != self._identity:
            raise ValueError(
                f"the saved place in the data is of other data ({state['data']}) than this ({self._identity}): the "
                f"files, the tokenizer, and data.sources, heldout_sources, weights, seq_len, batch_size, "
                f"tiles_per_row, max_tiles, loss_on, heldout_fraction, shuffle_seed and open_documents must be as they "
                f"were."
            )
        missing = [name for name in self._streams if name not in state["streams"]]
        if missing:
            raise ValueError(
                f"the saved place in the data lacks the streams {', '.join(missing)} of this process, and has "
                f"{', '.join(state['streams'])}: merge what all processes have saved."
            )
        self._iterator.set_state({"batches": state["batches"], "streams": state["streams"]})

    def close(self) -> None:
        """End the background thread, as leaving the program does."""
        self._finalizer()

    def _start(self) -> None:
        self._running = [iter(self._batches)]
        # grain's iterators complain if the interpreter is taken apart around them: let go of it before.
        self._finalizer = weakref.finalize(self, _close, self._running)

    @property
    def _iterator(self) -> grain.DatasetIterator[Batch]:
        if not self._running:
            raise ValueError("this loader is closed: make a new one.")
        return self._running[0]


def _close(running: list[grain.DatasetIterator[Batch]]) -> None:
    running.pop().close()


class _Place(msgspec.Struct):
    data: Any
    batches: int
    streams: dict[str, Any]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state out of those of all processes, for a run that goes on with another number of them.

    Raises ValueError unless all were saved after the same batch of the same data, and for what is no such state.
    """
    first, *others = typed(states, list[dict[str, Any]], where="the saved place in the data")
    for place in (first, *others):
        typed(place, _Place, where="the saved place in the data")
    for other in others:
        if (other["data"], other["batches"]) != (first["data"], first["batches"]):
            raise ValueError(
                f"the saved places in the data are not of one moment: after batch {first['batches']} of "
                f"{first['data']}, and after batch {other['batches']} of {other['data']}."
            )
    streams = {name: place for state in (first, *others) for name, place in state["streams"].items()}
    return {**first, "streams": streams}


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    pictures: ImageConfig | None = None,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> Loader:
    """Open the sources, and make batches of one split of them.

    - pictures: how they are cut into tiles; None for a model that reads text alone
    - process_index, process_count: this process gives rows i B / n to (i + 1) B / n of each batch
    - max_batches: end after so many; for held-out only

    Few documents are cut by position (`data/position.py`): for a split that would have none, and for rows.

    Raises what `open_source` raises, and ValueError for a batch that the processes do not divide, for a split that has
    no documents, and for conversations that the tokenizer cannot express.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}.')
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}.")
    if config.batch_size % process_count:
        raise ValueError(
            f"data.batch_size must be a multiple of the number of processes, {process_count}, got {config.batch_size}."
        )
    if max_batches is not None and (split == "train" or max_batches < 1):
        raise ValueError(f"max_batches is for held-out data, and at least 1, got {max_batches} for {split}.")
    share = config.batch_size // process_count
    own = range(process_index * share, (process_index + 1) * share)
    _check_expressible(config, tokenizer)
    sources = _open(config, split, tokenizer)
    encoder = Encoder(tokenizer, pictures, config.loss_on)
    if split == "train":
        total = sum(map(len, sources))
        turns = max(1, min(config.open_documents, total // config.batch_size))
        streams = training_streams(sources, config.weights, config.shuffle_seed, turns * config.batch_size)
        names = [[f"{row}.{turn}" for row in own] for turn in range(turns)]
        documents = {name: streams[turn * config.batch_size + row] for turn in range(turns)
                     for row, name in zip(own, names[turn], strict=True)}  # fmt: skip
        batches = PackedBatches(
            documents, names, slice(None), encoder, config.seq_len, tiles_per_row=config.tiles_per_row
        )
    else:
        batches = PackedBatches(
            {"all": heldout_documents(sources)},
            [["all"] * config.batch_size],
            slice(own.start, own.stop),
            encoder,
            config.seq_len,
            tiles_per_row=config.tiles_per_row,
            max_batches=max_batches,
        )
    return Loader(
        batches,
        restarts=split == "heldout",
        prefetch=config.prefetch,
        identity=_identity(config, encoder, split, sources),
        watch=Watch(one for documents in sources for one in documents.stamps),
    )


def _check_expressible(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError for conversations in a vocabulary that cannot express them."""
    for spec in (*config.sources, *config.heldout_sources):
        if parse_source(spec).kind in CONVERSATIONS:
            try:
                ChatFormat(tokenizer).check()
            except ValueError as error:
                raise ValueError(f"data.sources: {spec} has conversations, but {error}") from error


def _open(config: DataConfig, split: Split, tokenizer: Tokenizer) -> Sequence[Documents]:
    """One split of each source; held-out, of each that has one."""
    if config.heldout_sources:
        specs = config.sources if split == "train" else config.heldout_sources
        opened = [open_source(spec, tokenizer) for spec in specs]
        return enough(opened, config.batch_size) if split == "train" else opened
    opened = [open_source(spec, tokenizer) for spec in config.sources]
    parts = [split_documents(documents, config.heldout_fraction) for documents in opened]
    if config.heldout_fraction:
        none_held = not any(len(heldout) for _, heldout in parts)
        for i, documents in enumerate(opened):
            if none_held or (not len(parts[i][0]) and len(documents) < MANY):
                parts[i] = split_few(documents, config.heldout_fraction)
    if split == "heldout":
        found = [heldout for _, heldout in parts if len(heldout)]
        if not found:
            raise ValueError(
                f"none of the {sum(map(len, opened))} documents of data.sources is held out: raise "
                f"data.heldout_fraction, which is {config.heldout_fraction}, use more documents, or name others in "
                f"data.heldout_sources."
            )
        return found
    for spec, (documents, _) in zip(config.sources, parts, strict=True):
        if not len(documents):
            raise ValueError(
                f"all documents of {spec} are held out: lower data.heldout_fraction, which is "
                f"{config.heldout_fraction}, use more documents, or name others in data.heldout_sources."
            )
    return enough([documents for documents, _ in parts], config.batch_size)


def _identity(config: DataConfig, encoder: Encoder, split: Split, sources: Sequence[Documents]) -> str:
    """Equal if and only if the batches are, of all processes together."""
    what = (
        *(split, config.seq_len, config.batch_size, config.tiles_per_row, encoder.fingerprint),
        [source.identity for source in sources],
    )
    if split == "train":
        what += (config.weights, config.shuffle_seed, config.open_documents)
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()
