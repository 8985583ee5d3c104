"""Several sources as one sequence of documents: endless for training, each document once for evaluation."""

from collections.abc import Sequence

import grain
import numpy as np

from llama4_jax.data.documents import Document, Documents
from llama4_jax.data.shuffle import Shuffled

_HELDOUT_SEED = -1  # not the run's: whatever a run's seed, the same documents are evaluated


def training_streams(
    sources: Sequence[Documents], weights: Sequence[float], seed: int, count: int
) -> list[grain.MapDataset[Document]]:
    """So many endless sequences of documents, which together read every document of a source once an epoch.

    Stream i reads documents i, i + count, i + 2 count, … of each source's shuffled epochs. It draws from the sources by
    `weights`, documents and not tokens being counted; without weights, by how many documents they have.
    """
    endless = [Shuffled(documents, (seed, i)).repeat() for i, documents in enumerate(sources)]
    shares = list(weights) or [len(documents) for documents in sources]
    return [
        grain.MapDataset.mix([documents[stream::count] for documents in endless], shares) for stream in range(count)
    ]


def heldout_documents(sources: Sequence[Documents]) -> grain.MapDataset[Document]:
    """Every document of every source once, shuffled, the sources evenly spread: any beginning is a fair sample."""
    shuffled = grain.MapDataset.concatenate(
        [Shuffled(documents, (_HELDOUT_SEED, i)) for i, documents in enumerate(sources)]
    )
    place_in_source = np.concatenate([(np.arange(len(documents)) + 0.5) / len(documents) for documents in sources])
    order = np.argsort(place_in_source, kind="stable").tolist()
    return grain.MapDataset.source(order).map(lambda index: shuffled[index])
