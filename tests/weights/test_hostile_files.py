"""Damaged and hostile JSON around weights: each reader gives a value, or one short error that names the file."""

import copy
import dataclasses
import json
import random
import struct
import time

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from make_checkpoints import VISION

from llama4_jax.config import converted_to_json, from_json, to_json
from llama4_jax.configs import load_config
from llama4_jax.model.presets import preset
from llama4_jax.processor import _cutting
from llama4_jax.weights.hf_config import to_hf_config
from llama4_jax.weights.meta_config import to_params
from llama4_jax.weights.safetensors import INDEX, SINGLE, HFCheckpoint, SafetensorsFile
from llama4_jax.weights.source import open_config, saved_model

WRONG = [
    ..., None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, -(10**9), 10**400, 0.0, -0.0, 0.5, 1e-30, 1e308,
    float("inf"), -float("inf"), float("nan"), "", "x", "1", "../x", "\0", "a" * 10_000, "\x1b[31m", "\ud800", [], [1],
    [0] * 5, [1] * 1000, ["x"], [None], [[1]], {}, {"a": 1}, ["full_attention"] * 4, {"rope_type": 3},
    {"rope_type": "llama3"}, {"rope_type": "yarn"}, {"rope_theta": "x"}, {"height": 1, "width": 1},
]  # fmt: skip
WHOLE = [
    b"", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{" * 10**5, b"\0" * 100, b'{"a": NaN}',
    b"[" * 10**5 + b"]" * 10**5, b'{"model_type":' * 10**5, b'{"a":' + b"1" * 5000 + b"}",
]  # fmt: skip


def paths(tree, before=()):
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, inner in entries:
        yield (*before, key)
        yield from paths(inner, (*before, key))


def mutations(tree: dict, extra: tuple[tuple, ...] = ()) -> st.SearchStrategy[list[bytes]]:
    """Ten files at a time: of this tree with one to three values changed or taken away; or some bytes; or another."""
    places, text = [*paths(tree), *extra], json.dumps(tree).encode()

    def mutated(seed: int) -> bytes:
        draw = random.Random(seed)
        match draw.randrange(10):
            case 0:
                return draw.choice(WHOLE)
            case 1 | 2:
                new = bytearray(text)
                for _ in range(draw.randint(1, 4)):
                    new[draw.randrange(len(new))] = draw.randrange(256)
                return bytes(new)
        new = json.loads(text)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            *before, last = draw.choice(places)
            value = draw.choice(WRONG)
            try:
                at = new
                for key in before:
                    at = at[key]
                if value is ...:
                    del at[last]
                else:
                    at[last] = copy.deepcopy(value)
            except (LookupError, TypeError):
                pass  # an earlier change took the place away
        return json.dumps(new).encode()

    return st.integers(0, 2**40).map(lambda seed: [mutated(10 * seed + i) for i in range(10)])


TINY = dataclasses.replace(preset("tiny_vision"), router_bias=False)
NESTED = to_hf_config(TINY)
TEXT = {**NESTED["text_config"], "rope_scaling": None, "no_rope_layer_interval": 4, "interleave_moe_layer_step": 2}
HF = {**NESTED, "text_config": TEXT}
PARAMS = to_params(
    dataclasses.replace(TINY, head_dim=32, vision=dataclasses.replace(TINY.vision, patch_token_id=200_092))
)
RUN = json.loads(to_json(load_config("tiny")))
CONVERTED = json.loads(converted_to_json(TINY, {"vocab_size": "config.json"}))
OF_HF = tuple(
    ("text_config", key) for key in ("rope_theta", "rope_parameters", "original_max_position_embeddings", "moe_layers")
)
MANY = settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def a_value_or_one_short_error(read, file, contents: list[bytes]):
    for content in contents:
        _a_value_or_one_short_error(read, file, content)


def _a_value_or_one_short_error(read, file, content: bytes):
    file.write_bytes(content)
    began = time.process_time()
    try:
        read()
    except (ValueError, OSError) as error:
        said = str(error)
        assert file.name in said and len(said) <= 500, said
        said.encode("utf-8")
        assert said.replace("\n", "").isprintable()
    assert time.process_time() - began < 2


@MANY
@given(mutations(HF, OF_HF))
@example([json.dumps({**HF, "vision_config": {**VISION, "num_hidden_layers": 2**31}}).encode()])
def test_any_config_of_hugging_face(directory, content):
    a_value_or_one_short_error(lambda: open_config(directory), directory / "config.json", content)


@MANY
@given(mutations(PARAMS, (("model",), ("lora_args",))))
def test_any_params_of_meta(directory, content):
    folder = directory / "meta"
    folder.mkdir(exist_ok=True)
    a_value_or_one_short_error(lambda: open_config(folder), folder / "params.json", content)


@MANY
@given(st.one_of(mutations(RUN), mutations(CONVERTED)))
def test_any_config_of_a_run(directory, content):
    folder = directory / "run"
    folder.mkdir(exist_ok=True)
    a_value_or_one_short_error(lambda: saved_model(folder), folder / "config.json", content)


@MANY
@given(mutations({"image_processor": {"max_patches": 16, "resize_to_max_canvas": False}}))
def test_any_config_of_a_processor(directory, content):
    folder = directory / "processor"
    folder.mkdir(exist_ok=True)
    a_value_or_one_short_error(lambda: _cutting(folder), folder / "processor_config.json", content)


NAMES = ("a", "b.c", "d")
ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "I8", "shape": [0, 7], "data_offsets": [32, 32]},
    "d": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
BODY = bytes(33)


def safetensors_file(header: bytes, body: bytes = BODY) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@MANY
@given(mutations({"metadata": {"total_size": 1}, "weight_map": {name: f"{name}.safetensors" for name in NAMES}}))
def test_any_index(directory, content):
    folder = directory / "sharded"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for name in NAMES:
            header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
            (folder / f"{name}.safetensors").write_bytes(safetensors_file(header, b"x"))
    a_value_or_one_short_error(lambda: HFCheckpoint(folder), folder / INDEX, content)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 28, 32, 33, 36, 64, -1, -4, 2**32, 2**62, 2**63, 2**64, 10**40])
OFFSETS = st.tuples(st.sampled_from([*ENTRIES][1:]), NUMBERS, NUMBERS).map(
    lambda change: json.dumps(
        {**ENTRIES, change[0]: {**ENTRIES[change[0]], "data_offsets": [change[1], change[2]]}}
    ).encode()
)
SHAPES = st.tuples(st.sampled_from([*ENTRIES][1:]), st.lists(NUMBERS, max_size=5)).map(
    lambda change: json.dumps({**ENTRIES, change[0]: {**ENTRIES[change[0]], "shape": change[1]}}).encode()
)
DTYPES = st.tuples(
    st.sampled_from([*ENTRIES][1:]), st.sampled_from(["F64", "F16", "U16", "F4", "C64", "XX", "f32"])
).map(lambda change: json.dumps({**ENTRIES, change[0]: {**ENTRIES[change[0]], "dtype": change[1]}}).encode())
WRITTEN = json.dumps(ENTRIES).encode()
BY_HAND = st.sampled_from(
    [
        WRITTEN,
        WRITTEN + b"   ",
        b" " + WRITTEN,
        WRITTEN.replace(b'"a"', b'"b.c"'),
        WRITTEN.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"'),
        WRITTEN.replace(b'"d"', b'"\\ud800"'),
        WRITTEN.replace(b"[0, 24]", b"[-0, 24]"),
        WRITTEN.replace(b"[0, 24]", b"[0.0, 24]"),
        WRITTEN.replace(b"[0, 24]", b"[0, 24, 24]"),
        WRITTEN.replace(b'"pt"', b'"\\ud800"'),
        WRITTEN.replace(b'"pt"', b"1"),
        WRITTEN.replace(b'"shape": [4]', b'"shape": [4], "more": NaN'),
        WRITTEN.replace(b'"shape": [4]', b'"shape": [4], "more": ' + b"[" * 500 + b"]" * 500),
        WRITTEN.replace(b'{"format": "pt"}', b"null"),
        WRITTEN.replace(b'"d"', b'"\\u0000\\n\\u001b[31m\\u202e"'),
    ]
)


def refused_if_the_package_refuses(directory, contents: list[bytes]):
    file = directory / SINGLE

    def read():
        ours = SafetensorsFile(file)
        with safetensors.safe_open(file, "np") as theirs:  # raises what is no ValueError, if it refuses
            assert set(theirs.keys()) == set(ours.tensors)

    a_value_or_one_short_error(read, file, contents)


@MANY
@given(mutations(ENTRIES))
def test_any_header_that_the_safetensors_package_refuses_is_refused(directory, headers):
    refused_if_the_package_refuses(directory, [safetensors_file(header) for header in headers])


@settings(max_examples=400, deadline=2000)
@given(st.one_of(OFFSETS, SHAPES, DTYPES, BY_HAND), st.sampled_from([0, 0, 0, 0, -1, 1, 8]))
def test_any_layout_that_the_safetensors_package_refuses_is_refused(directory, header, longer):
    """The bytes of the tensors are cut or lengthened by a few, too."""
    refused_if_the_package_refuses(directory, [safetensors_file(header, bytes(len(BODY) + longer))])


@pytest.mark.parametrize("length", [0, 1, 2**25 + 1, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_length_of_the_header_that_cannot_be_is_refused(tmp_path, length):
    file = tmp_path / SINGLE
    file.write_bytes(struct.pack("<Q", length) + WRITTEN + BODY)
    with pytest.raises(ValueError, match="safetensors"):
        SafetensorsFile(file)
    with open(file, "r+b") as sparse:
        sparse.truncate(min(length, 2 * 10**8) + 100)  # a hole: it takes no room
    with pytest.raises(ValueError, match="safetensors"):
        SafetensorsFile(file)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "a/../../x", "/etc/passwd", "", ".", "..", "a//b", "a\0", "x" * 300, "..\\x", "a\nb"]
)
def test_an_index_cannot_name_files_outside_and_none_is_opened(tmp_path, shard, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(safetensors_file(WRITTEN))
    (tmp_path / "x.safetensors").write_bytes(safetensors_file(WRITTEN))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": shard}}))
    monkeypatch.setattr("llama4_jax.weights.safetensors.SafetensorsFile", None)  # it would be called
    with pytest.raises(ValueError, match="is no path within its directory"):
        HFCheckpoint(folder)


def test_a_shard_may_be_a_link_to_elsewhere_as_in_the_cache_of_hugging_face(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(safetensors_file(WRITTEN))
    (snapshot / "config.json").write_text("{}")
    (snapshot / "m.safetensors").symlink_to("../../blobs/abc")
    names = [name for name in ENTRIES if name != "__metadata__"]
    (snapshot / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "m.safetensors")}))
    assert HFCheckpoint(snapshot).shapes()["a"] == (2, 3)


def test_a_run_config_survives_its_own_writing():
    assert from_json(to_json(load_config("tiny"))) == load_config("tiny")
