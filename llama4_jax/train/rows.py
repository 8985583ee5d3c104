"""Which rows of a batch a process reads, and how they get to its devices.

The mesh decides, not the number of the process: of a group that splits a model between hosts, by heads or by sequence,
every process needs the same rows, and on a torus the devices of one host need not hold rows that follow each other. So
the processes are sorted by the rows that their devices hold. Those with the same rows make the same share of the batch,
and where its rows lie in the whole batch is again the mesh's to say.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from llama4_jax.data.batch import Batch
from llama4_jax.sharding import activation_sharding
from llama4_jax.train.step import batch_shardings


class Rows:
    """This process's rows of every batch.

    - share, shares: the loader's part of the batch that this process reads, of so many equal ones
    - own: where the rows of the share are in the whole batch, in order

    Raises ValueError, the same in every process, where processes hold some rows in common but not all: no equal shares
    would do then.
    """

    def __init__(self, mesh: Mesh, batch_size: int, process: int | None = None):
        process = jax.process_index() if process is None else process
        held = _rows_by_process(mesh, batch_size)
        distinct = sorted(set(held.values()))
        if sum(map(len, distinct)) != batch_size or len(set(map(len, distinct))) > 1:
            one, other = next((a, b) for a in held for b in held if held[a] != held[b] and set(held[a]) & set(held[b]))
            raise ValueError(
                f"the mesh ({dict(mesh.shape)}) deals rows out unevenly: process {one} holds the rows {held[one]} of "
                f"a batch, and process {other} the rows {held[other]}. Choose mesh.tensor and mesh.context so that a "
                f"multiple of their product is the number of devices of a host, or the other way round."
            )
        self._mesh, self._batch_size = mesh, batch_size
        self.own = np.array(held[process])
        self.share, self.shares = distinct.index(held[process]), len(distinct)

    def on_devices(self, batch: Batch) -> Batch:
        """These rows [batch_size / shares, ...] as a part of the whole batch, split over the mesh."""

        def place(x, sharding):
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self._batch_size)
                first = int(np.searchsorted(self.own, start))
                return x[(slice(first, first + stop - start), *index[1:])]

            return jax.make_array_from_callback((self._batch_size, *x.shape[1:]), sharding, part)

        return jax.tree.map(place, batch, batch_shardings(self._mesh, images=batch.images is not None))

    def __str__(self) -> str:
        runs = np.split(self.own, np.flatnonzero(np.diff(self.own) != 1) + 1)
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _rows_by_process(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
    held: dict[int, set[int]] = {}
    places = activation_sharding(("batch",), mesh).devices_indices_map((batch_size,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    return {process: tuple(sorted(rows)) for process, rows in held.items()}
