"""Each process reads the rows that its devices hold, and all together make the batch that one process would make."""

import itertools

import numpy as np
import pytest
from jax.sharding import Mesh
from topologies import chips

from llama4_jax.data.config import DataConfig
from llama4_jax.data.loader import make_loader
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.sharding import MeshConfig, activation_sharding, make_mesh
from llama4_jax.train.rows import Rows

MESHES = [
    MeshConfig(fsdp=64),  # on a torus: the four chips of a host have rows that are far apart
    MeshConfig(data=4, tensor=16),  # a copy of the model on four hosts, which read the same rows
    MeshConfig(fsdp=4, context=16),
    MeshConfig(data=2, fsdp=2, expert=4, tensor=2, context=2),
]


@pytest.fixture(scope="module")
def pod():
    """Sixty-four chips on sixteen hosts."""
    return chips("v5p:4x4x4")


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_the_rows_of_a_process_are_those_of_its_devices_and_the_shares_make_the_batch(pod, config):
    mesh = make_mesh(config, pod)
    rows = {process: Rows(mesh, 128, process) for process in range(16)}
    places = activation_sharding(("batch",), mesh).devices_indices_map((128,))
    for device, (held,) in places.items():
        assert set(range(128)[held]) <= set(rows[device.process_index].own)
    shares = {own.share: own for own in rows.values()}
    assert len(shares) == rows[0].shares
    assert sorted(np.concatenate([own.own for own in shares.values()])) == list(range(128))


def test_the_batches_of_all_processes_together_are_those_of_one(pod, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of many" for n in range(40_000)))
    config = DataConfig(sources=(f"text:{tmp_path}/text.txt",), seq_len=16, batch_size=16, heldout_fraction=0.3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=8, tensor=4), pod)

    def batches(share: int, shares: int):
        loader = make_loader(config, ByteTokenizer(), split="train", process_index=share, process_count=shares)
        return [batch.tokens for batch in itertools.islice(loader, 3)]

    together = np.full((3, 16, 16), -1, np.int32)
    for process in range(16):
        rows = Rows(mesh, 16, process)
        together[:, rows.own] = batches(rows.share, rows.shares)
    contents = [{row.tobytes() for row in batch} for batch in together]
    assert contents == [{row.tobytes() for row in batch} for batch in batches(0, 1)]


def test_rows_arrive_on_the_devices_that_hold_them():
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    rows = Rows(mesh, 4)
    assert (rows.share, rows.shares, str(rows)) == (0, 1, "0 to 3")
    (batch,) = itertools.islice(make_loader(DataConfig(seq_len=16, batch_size=4), ByteTokenizer(), split="train"), 1)
    placed = rows.on_devices(batch)
    assert placed.tokens.sharding.shard_shape((4, 16)) == (2, 8)
    np.testing.assert_array_equal(placed.tokens, batch.tokens)


class _Device:
    """One of a host that JAX only needs to know by its number."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number: int, host: int):
        self.id, self.process_index = number, host


def test_groups_that_begin_in_the_middle_of_a_host_are_an_error_in_words():
    devices = np.array([_Device(i, i // 2) for i in range(6)]).reshape(2, 1, 1, 3, 1)
    mesh = Mesh(devices, ("data", "fsdp", "expert", "tensor", "context"))
    with pytest.raises(ValueError, match=r"deals rows out unevenly: process \d holds the rows .* Choose mesh.tensor"):
        Rows(mesh, 4, 0)


def test_the_first_rows_belong_to_the_process_that_holds_them_whatever_its_number():
    devices = np.array([_Device(i, 1 - i // 2) for i in range(4)]).reshape(4, 1, 1, 1, 1)
    mesh = Mesh(devices, ("data", "fsdp", "expert", "tensor", "context"))
    rows = Rows(mesh, 8, 1)
    assert (rows.share, rows.shares, str(rows)) == (0, 2, "0 to 3")
