"""Generating in batches, through caches and compiled loops, gives what one plain forward pass after another gives."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from micro_run import PICTURES, picture_model, picture_processor
from oracles import hf, ours
from oracles.cases import MAVERICK, SCOUT, Case, tokens

import llama4_jax
from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer import generate as module
from llama4_jax.infer.generate import generate
from llama4_jax.sharding import SERVING, MeshConfig, make_mesh, parameter_sharding

CASE = dataclasses.replace(SCOUT, layers=4, vocab=96)  # three chunked layers and a global one
LENGTHS = (29, 1, 8)  # chunks are of 8 tokens
PROMPTS = [row[:length].tolist() for row, length in zip(tokens(CASE, batch=3), LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def model():
    return ours.model(CASE)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=40)


@pytest.mark.parametrize("case", [SCOUT, MAVERICK], ids=lambda case: case.name)
def test_64_greedy_tokens_are_those_of_hugging_face_for_prompts_of_unequal_length(case: Case):
    rows = tokens(case, batch=3)
    prompts = [row[:length].tolist() for row, length in zip(rows, (29, 5, 16), strict=True)]
    replies = generate(ours.model(case), prompts, max_new_tokens=64)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply == hf.reference(case).greedy(np.array([prompt]), 64)[0].tolist()


def test_each_row_gives_what_it_gives_alone(model, greedy):
    for prompt, reply in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt], max_new_tokens=40) == [reply]


def test_decoding_gives_what_a_forward_pass_over_everything_gives(model, greedy):
    forward = jax.jit(lambda model, tokens: model(tokens))
    for prompt, reply in zip(PROMPTS, greedy, strict=True):
        whole = np.zeros((1, 69), np.int32)  # one length, compiled once
        whole[0, : len(prompt) + 40] = prompt + reply
        best = np.asarray(forward(model, whole))[0].argmax(-1)
        assert best[len(prompt) - 1 : len(prompt) + 39].tolist() == reply


def test_long_prompts_are_read_piece_by_piece(model, greedy, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 12)  # neither a chunk nor a divisor of one
    assert generate(model, PROMPTS, max_new_tokens=40) == greedy


def test_a_reply_continued_is_the_longer_reply(model, greedy):
    longer = [prompt + reply[:11] for prompt, reply in zip(PROMPTS, greedy, strict=True)]
    assert generate(model, longer, max_new_tokens=29) == [reply[11:] for reply in greedy]


def test_a_scanned_model_gives_the_same():
    case = dataclasses.replace(CASE, layers=2, rope_pattern=(True, True))
    unscanned, scanned = (ours.model(case, scan_layers=scan) for scan in (False, True))
    assert scanned.decoder.repeats == 2
    assert generate(scanned, PROMPTS, max_new_tokens=12) == generate(unscanned, PROMPTS, max_new_tokens=12)


def test_the_number_of_new_tokens_is_exact(model, greedy):
    for count in (1, 2, 33):
        assert generate(model, PROMPTS, max_new_tokens=count) == [reply[:count] for reply in greedy]
    assert generate(model, [], max_new_tokens=3) == []


def test_a_row_ends_with_its_stop_id_and_the_others_go_on(model, greedy):
    stop_ids = [greedy[0][5], greedy[2][0]]
    replies = generate(model, PROMPTS, max_new_tokens=40, stop_ids=stop_ids)
    for reply, full in zip(replies, greedy, strict=True):
        ends = [i + 1 for i, token in enumerate(full) if token in stop_ids]
        assert reply == full[: min(ends, default=40)]
    assert len(replies[2]) == 1 and len(replies[0]) <= 6


def test_on_tokens_sees_every_token_once_and_in_order(model, greedy):
    stop = greedy[0][5]
    seen, calls = [[] for _ in PROMPTS], 0

    def collect(gained):
        nonlocal calls
        calls += 1
        for row, more in zip(seen, gained, strict=True):
            row += more

    replies = generate(model, PROMPTS, max_new_tokens=40, stop_ids=[stop], on_tokens=collect)
    assert seen == replies == generate(model, PROMPTS, max_new_tokens=40, stop_ids=[stop])
    assert calls >= 2  # the first tokens at once, then as time passes


def test_draws_repeat_with_the_seed_and_do_not_depend_on_other_rows(model):
    settings = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    first = generate(model, PROMPTS, **settings, seed=5)
    assert generate(model, PROMPTS, **settings, seed=5) == first
    assert generate(model, PROMPTS[:2], **settings, seed=5) == first[:2]
    assert generate(model, PROMPTS, **settings, seed=5, on_tokens=lambda gained: None) == first
    assert generate(model, PROMPTS, **settings, seed=6) != first
    same = generate(model, [PROMPTS[0]] * 3, **settings)
    assert same[0] != same[1] != same[2]


def test_other_values_compile_nothing(model):
    def compiled() -> list[int]:
        return [f._cache_size() for f in (programs.empty_cache, programs.read, programs.decode)]

    settings = {"temperature": 0.9, "top_p": 0.9, "top_k": 7, "stop_ids": [1, 2]}
    generate(model, PROMPTS, max_new_tokens=30, **settings)
    before = compiled()
    others = [row[:length].tolist() for row, length in zip(tokens(CASE, batch=3, seed=1), (17, 20, 3), strict=True)]
    settings = {"temperature": 0.3, "top_p": 0.5, "top_k": 3, "stop_ids": [3, 4], "seed": 9}
    generate(model, others, max_new_tokens=19, **settings)
    generate(model, others, max_new_tokens=5, on_tokens=lambda gained: None, **settings)
    assert compiled() == before
    generate(model, [*others, [1], [2]], max_new_tokens=2, **settings)  # another shape
    assert compiled() == [size + 1 for size in before]


@pytest.mark.parametrize(
    "axes", [{"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}, {"expert": 4, "tensor": 2}], ids=str
)
def test_a_mesh_changes_nothing_and_is_compiled_for_once(axes, greedy, caplog):
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes))
    model = placed(ours.model(CASE), mesh)
    with jax.set_mesh(mesh):
        assert generate(model, PROMPTS, max_new_tokens=40) == greedy  # three rows, which no mesh axis divides
        with jax.log_compiles(), caplog.at_level("WARNING"):
            assert generate(model, PROMPTS, max_new_tokens=40) == greedy
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]


def placed(model, mesh):
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable[...]
        variable.set_value(jax.device_put(value, parameter_sharding(value.shape, variable.axes, mesh, rules=SERVING)))
    return model


def test_what_cannot_be_generated_is_said_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(module, "EngineCore", None)
    for prompts, settings, message in [
        ([[1], []], {}, r"prompts\[1\] is empty: give at least one token"),
        ([[1], [5, 96]], {}, r"prompts\[1\]\[1\] is the token id 96, but the model's vocabulary has 96 ids, 0 to 95"),
        ([[-1]], {}, r"prompts\[0\]\[0\] is the token id -1"),
        ([[1], [1] * 1000], {"max_new_tokens": 25}, r"prompts\[1\] has 1000 tokens, .*25 exceeds .* of 1024"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"stop_ids": [97]}, "stop_ids has 97"),
        ([[1]], {"seed": -1}, "seed must be from 0 to 2147483647, got -1"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, **{"max_new_tokens": 5} | settings)


def test_the_last_position_of_the_context_can_be_reached(model):
    prompt = tokens(CASE, batch=1, length=1020)[0].tolist()
    assert len(llama4_jax.generate(model, [prompt], max_new_tokens=4)[0]) == 4


PATCH, SIDE = PICTURES.vision.patch_token_id, PICTURES.vision.image_size


@pytest.fixture(scope="module")
def seeing():
    return picture_model()


def seen(seed=0):
    """Prompts and their tiles: with one picture, without, with three, and a long one."""
    rng = np.random.default_rng(seed)
    processor = picture_processor(max_tiles=8)

    def picture(rows, cols):
        return rng.integers(0, 256, (rows * SIDE, cols * SIDE, 3), np.uint8)

    def words(length):
        return "".join(map(chr, rng.integers(97, 123, length)))

    return [
        processor.text_prompt("<|image|>" + words(20), images=[picture(1, 1)]),
        processor.text_prompt(words(30)),
        processor.text_prompt(
            f"<|image|>{words(8)}<|image|> <|image|>{words(5)}", images=[picture(2, 3), picture(1, 1), picture(1, 2)]
        ),
        # begin_of_text, 507 letters, image_start, image, and four patches, of which two are in the second piece
        processor.text_prompt(words(507) + "<|image|>" + words(12), images=[picture(1, 1)]),
    ]


def rows_of(prompts):
    return {"prompts": [prompt.tokens for prompt in prompts], "images": [prompt.tiles for prompt in prompts]}


def test_prompts_with_pictures_are_continued_as_forward_passes_over_everything_say(seeing):
    prompts = seen()
    assert [0 if p.tiles is None else len(p.tiles) for p in prompts] == [1, 0, 7 + 1 + 3, 1]
    assert prompts[3].tokens[511:513] == [PATCH, PATCH]
    replies = generate(seeing, **rows_of(prompts), max_new_tokens=40)
    longest, most = 600, 11
    tokens = np.zeros((4, longest), np.int32)
    tiles = np.zeros((4, most, SIDE, SIDE, 3), np.uint8)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        whole = [*prompt.tokens, *reply]
        tokens[row, : len(whole)] = whole
        if prompt.tiles is not None:
            tiles[row, : len(prompt.tiles)] = prompt.tiles
    likeliest = np.argmax(jax.jit(seeing)(tokens, images=tiles), axis=-1)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        start = len(prompt.tokens) - 1
        assert reply == likeliest[row, start : start + 40].tolist()
        assert len(set(reply)) > 3  # not the same token again and again
    other = [prompt._replace(tiles=None if prompt.tiles is None else 255 - prompt.tiles) for prompt in prompts]
    changed = [a != b for a, b in zip(generate(seeing, **rows_of(other), max_new_tokens=40), replies, strict=True)]
    assert changed == [True, False, True, True]


def test_other_pictures_of_as_many_tiles_compile_nothing(seeing, caplog):
    functions = (programs.encode, programs.read, programs.decode)
    first, other = seen(), seen(seed=1)
    generate(seeing, **rows_of(first), max_new_tokens=8)
    sizes = [f._cache_size() for f in functions]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        generate(seeing, **rows_of(other), max_new_tokens=8)
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]
    # 14 tiles are padded to 8 and 8, as 13 were
    more = picture_processor().text_prompt("<|image|><|image|>", images=[np.zeros((9, 9, 3), np.uint8)] * 2)
    generate(seeing, **rows_of([more, *other[1:]]), max_new_tokens=8)
    assert [f._cache_size() for f in functions] == sizes


def test_a_mesh_changes_nothing_of_what_is_seen(seeing):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, expert=2))
    model = placed(picture_model(), mesh)
    expected = [generate(seeing, **rows_of(seen(seed)), max_new_tokens=1) for seed in range(3)]
    assert len({reply[0] for replies in expected for reply in replies}) > 8
    with jax.set_mesh(mesh):
        assert [generate(model, **rows_of(seen(seed)), max_new_tokens=1) for seed in range(3)] == expected


def test_pictures_that_do_not_fit_the_prompts_are_said_before_anything_is_computed(model, seeing, monkeypatch):
    monkeypatch.setattr(module, "EngineCore", None)

    def tiles(count, size=SIDE):
        return np.zeros((count, size, size, 3), np.uint8)

    one = [1, *[PATCH] * 4]
    for which, prompts, images, message in [
        (model, [[1]], [tiles(1)], "images were given, but this model has no vision encoder: it reads text alone."),
        (seeing, [one, [1]], [tiles(1)], "images has 1 entries for 2 prompts: give one for each, or None."),
        (seeing, [one], [tiles(1, 14)], r"images\[0\] must be tiles of \[28, 28, 3\], got \[14, 14, 3\]."),
        (seeing, [[1], one], [None, tiles(2)],
         r"prompts\[1\] has 4 <\|patch\|> tokens, but the 2 tiles of images\[1\] have features for 8: give each "
         r"picture's tiles, and its tokens, once \(llama4_jax.Processor does\)."),
        (seeing, [one[:4]], [tiles(1)], r"prompts\[0\] has 3 <\|patch\|> tokens, but the 1 tiles .* features for 4"),
        (seeing, [one], [None], r"prompts\[0\] has 4 <\|patch\|> tokens, but the 0 tiles .* features for 0"),
        (seeing, [one], None, r"prompts\[0\] has 4 <\|patch\|> tokens, but the 0 tiles"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            generate(which, prompts, images=images, max_new_tokens=5)
