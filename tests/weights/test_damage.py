"""A flipped bit in an array is never taken for its value: whatever wrote it, whoever reads it, and however much."""

import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from make_checkpoints import META, write_meta

import llama4_jax
from llama4_jax import cli
from llama4_jax.ops.quantization import Scheme
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.weights import digests
from llama4_jax.weights.checkpoint import Checkpoints
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.inspect import describe, verify
from llama4_jax.weights.mapped import place_in_file
from llama4_jax.weights.quantize import quantize
from llama4_jax.weights.safetensors import SafetensorsFile
from llama4_jax.weights.source import open_weights

KINDS = ("converted", "quantized", "hf", "meta", "trained")
PROGRESS = {"step": 3, "data": [{"place": 17}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory of each kind, of the same weights."""
    folder = tmp_path_factory.mktemp("made")
    write_meta(META, folder / "source", 2)
    convert(folder / "source", folder / "converted")
    quantize(folder / "source", folder / "quantized", Scheme("int8", None))
    export(folder / "converted", folder / "hf", format="hf", shards=3)
    export(folder / "converted", folder / "meta", format="meta", shards=2)
    # as training writes: through Orbax, in its own storage
    arrays = Checkpoints(folder / "converted", read_only=True).newest().model
    (folder / "trained").mkdir()
    shutil.copy(folder / "converted" / "config.json", folder / "trained")
    checkpoints = Checkpoints(folder / "trained")
    checkpoints.save(3, arrays, {"step": jnp.zeros((), jnp.int32), "mu": jnp.arange(5000.0)}, PROGRESS)
    checkpoints.close()
    return folder


def files_of_arrays(directory: Path) -> list[Path]:
    def holds_arrays(path: Path) -> bool:
        if path.suffix in (".safetensors", ".pth"):
            return True
        return "checkpoints" in path.parts and "model" in path.parts and path.parent.name in ("d", "c", *"0123456789")

    return sorted(path for path in directory.rglob("*") if path.is_file() and holds_arrays(path))


def flip(directory: Path, seed: int, into: Path) -> Path:
    """A copy with one bit flipped somewhere in its arrays."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(directory, into)
    draw, files = random.Random(seed), files_of_arrays(into)
    (path,) = draw.choices(files, [file.stat().st_size for file in files])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return into


def read_all(directory: Path) -> dict[str, np.ndarray]:
    weights = open_weights(directory)
    return {name: np.array(weights.read(name)) for name in weights.names}


def differing(read: dict[str, np.ndarray], sound: dict[str, np.ndarray]) -> list[str]:
    return [name for name, array in sound.items() if read[name].tobytes() != array.tobytes()]


def assert_never_silent(made: Path, kind: str, folder: Path, seeds: range) -> None:
    sound, caught = read_all(made / kind), 0
    for seed in seeds:
        hurt = flip(made / kind, seed, folder / "hurt")
        try:
            assert not differing(read_all(hurt), sound), f"seed {seed}: wrong values, and no word"
        except (ValueError, OSError) as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
            caught += 1
    assert caught >= 0.8 * len(seeds)  # the rest is padding, or in names that no value hangs on


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_never_read_as_a_value(made, kind, tmp_path):
    assert_never_silent(made, kind, tmp_path, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_flipped_bits_are_never_read_as_values(made, kind, tmp_path):
    assert_never_silent(made, kind, tmp_path, range(4, 304))


@pytest.mark.parametrize("kind", KINDS)
def test_verifying_names_the_one_array_that_is_damaged(made, kind, tmp_path, capsys):
    assert verify(made / kind, print) == []
    if kind == "hf":
        file = sorted((made / kind).glob("*.safetensors"))[1]
        name, tensor = list(SafetensorsFile(file).tensors.items())[2]
        hurt = shutil.copytree(made / kind, tmp_path / "hurt")
        content = bytearray(file.read_bytes())
        content[tensor.offset + tensor.extent - 1] ^= 4
        (hurt / file.name).write_bytes(content)
        assert verify(hurt, print) == [f"{hurt / file.name}: {name}"]
    else:
        hurt = flip(made / kind, 5, tmp_path / "hurt")
        assert len(verify(hurt, print)) == 1
    (line,) = verify(hurt, lambda line: None)
    assert cli.main(["inspect", str(hurt), "--verify"]) == 2
    said = capsys.readouterr()
    assert "1 damaged" in said.err and line in said.err
    assert cli.main(["inspect", str(made / kind), "--verify"]) == 0


def test_the_error_names_array_and_checkpoint_and_what_to_do(made, tmp_path):
    hurt = shutil.copytree(made / "converted", tmp_path / "hurt")
    array = hurt / "checkpoints" / "0" / "model" / "params.decoder.rest.1.moe.gate_up"
    chunk = next(path for path in (array / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"checkpoints/0 is damaged: params\.decoder\.rest\.1\.moe\.gate_up: its bytes"
    ):
        open_weights(hurt).read("layers.1.moe.gate_up")
    for call in (
        lambda: llama4_jax.from_pretrained(hurt),
        lambda: export(hurt, tmp_path / "out", format="hf"),
        lambda: quantize(hurt, tmp_path / "small", Scheme("int8", None)),
    ):
        with pytest.raises(ValueError, match=r"params\.decoder\.rest\.1\.moe\.gate_up: its bytes do not fit"):
            call()
    assert not (tmp_path / "out").exists() and not (tmp_path / "small").exists()


@pytest.mark.parametrize("kind", ("converted", "trained", "hf"))
def test_a_mesh_of_eight_reads_no_flipped_bit_either(made, kind, tmp_path):
    assert jax.device_count() >= 8
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    sound = llama4_jax.from_pretrained(made / kind, mesh=mesh, dtype="float32").embed.embedding[...]
    hurt = shutil.copytree(made / kind, tmp_path / "hurt")
    for path in files_of_arrays(hurt):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 2, len(content), 997):
            content[place] ^= 1
        path.write_bytes(content)
    assert sound.size
    with pytest.raises(ValueError, match="damaged"):
        llama4_jax.from_pretrained(hurt, mesh=mesh, dtype="float32")


def test_a_damaged_place_in_the_data_is_no_place_to_resume_at(made, tmp_path):
    hurt, said = shutil.copytree(made / "trained", tmp_path / "hurt"), []
    path = hurt / "checkpoints" / "3" / "progress" / "metadata"
    path.write_text(path.read_text().replace("17", "18"))
    checkpoints = Checkpoints(hurt, say=said.append)
    with pytest.raises(ValueError, match="progress: its bytes do not fit their checksum"):
        checkpoints.newest()
    assert Checkpoints(made / "trained", read_only=True).newest().progress.items() >= PROGRESS.items()


def test_checkpoints_without_checksums_are_read_and_said_to_have_none(made, tmp_path):
    """As earlier versions wrote them."""
    arrays = Checkpoints(made / "trained", read_only=True).newest().model
    shutil.copytree(made / "trained", tmp_path / "old")
    item = tmp_path / "old" / "checkpoints" / "3" / "model"
    shutil.rmtree(item)
    with ocp.StandardCheckpointer() as writer:
        writer.save(item, arrays)
    (tmp_path / "old" / "checkpoints" / "3" / "progress" / "metadata").write_text('{"step": 3}')
    assert not differing(read_all(tmp_path / "old"), read_all(made / "trained"))
    assert "Checksums: none" in describe(tmp_path / "old")
    said = []
    assert verify(tmp_path / "old", said.append) == [] and f"{len(arrays)} of them without checksums" in said[0]
    assert Checkpoints(tmp_path / "old", read_only=True).newest().progress == {"step": 3}


def test_what_comes_from_elsewhere_has_no_digests_and_is_said_so(made, capsys):
    assert "Checksums: none, as it comes from elsewhere" in describe(made / "source")
    assert "Checksums: of every tensor, in digests.json" in describe(made / "meta")
    assert cli.main(["inspect", str(made / "source"), "--verify"]) == 0
    assert "has no digests.json to hold its values against" in capsys.readouterr().out


def test_a_part_is_held_against_the_blocks_that_it_meets_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", 256)
    values = np.arange(4096, dtype=np.float32).reshape(64, 64)
    from safetensors.numpy import save_file

    save_file({"w": values}, tmp_path / "model.safetensors")
    tensors = SafetensorsFile(tmp_path / "model.safetensors").tensors
    digests.write_digests(tmp_path, {tmp_path / "model.safetensors": tensors})
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[tensors["w"].offset + 40 * 256 + 7] ^= 1  # a row is a block
    (tmp_path / "model.safetensors").write_bytes(content)
    known, view = digests.Digests(tmp_path), tensors["w"].map()
    known.check(view[:40])
    known.check(view.T[:, 41:])
    for part in (view[40], view[39:42, 3:5].T, view[:, :1]):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its tensor w differs from digests\.json"):
            known.check(part)
    place = place_in_file(view[2:4, 5:])
    assert place.start == tensors["w"].offset + 4 * (2 * 64 + 5) and place.stop == tensors["w"].offset + 4 * 4 * 64


@pytest.mark.parametrize("text", ["[]", '{"algorithm": "md5", "block_bytes": 1, "files": {}}', '{"files": 3}'])
def test_a_digests_file_of_another_kind_is_refused_in_a_line(made, text, tmp_path):
    hurt = shutil.copytree(made / "hf", tmp_path / "hurt")
    (hurt / "digests.json").write_text(text)
    with pytest.raises(ValueError, match=r"digests\.json"):
        open_weights(hurt)


def test_a_reader_looks_again_when_training_replaces_what_it_reads(made, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(made / "trained", tmp_path / "run")
    from llama4_jax.weights import source

    opened = source.RunWeights.__init__

    def replaced_meanwhile(self, path, saved, step):
        if step == 3:
            shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "4")
            shutil.rmtree(run / "checkpoints" / "3")
        opened(self, path, saved, step)

    monkeypatch.setattr(source.RunWeights, "__init__", replaced_meanwhile)
    model = llama4_jax.from_pretrained(run, dtype="float32")
    sound = llama4_jax.from_pretrained(made / "converted", dtype="float32")
    assert "damaged" not in capsys.readouterr().err
    np.testing.assert_array_equal(model.embed.embedding[...], sound.embed.embedding[...])
    assert open_weights(run).step == 4
    weights = open_weights(run)
    shutil.move(run / "checkpoints" / "4", run / "checkpoints" / "5")
    with pytest.raises(OSError, match="was replaced while it was read: the run is being trained"):
        weights.read("embed.embedding")
