"""Rows with pictures: read, encoded, packed with their tiles, and resumed."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llama4_jax.data.config import DataConfig
from llama4_jax.data.digits import DigitDocuments
from llama4_jax.data.documents import Conversation, Illustrated, split
from llama4_jax.data.encode import Encoder
from llama4_jax.data.loader import make_loader, merge_states
from llama4_jax.data.sources import open_source
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import ImageConfig, picture_tokens
from llama4_jax.inputs.messages import Message, Picture, ToolCall
from llama4_jax.inputs.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special_tokens
PICTURES = ImageConfig(tile_size=8, tokens_per_tile=2, max_tiles=4)
PATCH = SPECIAL["<|patch|>"]


def picture(value: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


def png(value: int, width: int = 8) -> bytes:
    out = io.BytesIO()
    picture(value, width).save(out, "PNG")
    return out.getvalue()


def conversation(*values: int) -> Conversation:
    """A question with these pictures, and its answer."""
    messages = (
        Message("user", (*(Picture(picture(v)) for v in values), "Which?")),
        Message("assistant", ("This one",)),
    )
    return Conversation(messages, (), "here")


def test_a_conversation_becomes_the_chat_formats_tokens_and_the_pictures_tiles():
    piece = Encoder(TOKENIZER, PICTURES)(conversation(10, 20))
    one = picture_tokens(1, 1, 2, SPECIAL)
    rendered = ChatFormat(TOKENIZER).encode(conversation(1, 2).messages, pictures=[one, one], generation_prompt=False)
    assert piece.tokens.tolist() == rendered.tokens[:-1] and piece.targets.tolist() == rendered.tokens[1:]
    assert piece.tiles[:, 0, 0, 0].tolist() == [10, 20]
    assert (piece.tokens == PATCH).sum() == piece.num_tiles * PICTURES.tokens_per_tile


def test_no_token_of_a_picture_is_learnt_and_replies_alone_where_asked():
    everything = Encoder(TOKENIZER, PICTURES)(conversation(10))
    of_pictures = np.isin(everything.targets, picture_tokens(2, 2, 1, SPECIAL))
    assert of_pictures.sum() == 5  # start, image, two patches, end
    np.testing.assert_array_equal(everything.weights, ~of_pictures)
    replies = Encoder(TOKENIZER, PICTURES, "replies")(conversation(10))
    learnt = replies.targets[replies.weights > 0]
    assert TOKENIZER.decode(learnt) == "This one<|eot|>"
    assert replies.target_bytes.sum() == len("This one") == replies.target_bytes[replies.weights > 0].sum()


def test_calls_of_tools_are_replies_and_their_results_are_not():
    messages = (
        Message("user", ("Time?",)),
        Message("assistant", (), (ToolCall("now", {}),)),
        Message("tool", ("noon",)),
        Message("assistant", ("Noon",)),
    )
    piece = Encoder(TOKENIZER, None, "replies")(Conversation(messages, (), "here"))
    assert TOKENIZER.decode(piece.targets[piece.weights > 0]) == "[now()]<|eom|>Noon<|eot|>"


def test_text_with_pictures_holds_them_where_they_stand():
    document = Illustrated(("a", Picture(picture(1, 16)), "b", Picture(picture(2)), "c"), "here")
    piece = Encoder(TOKENIZER, PICTURES)(document)
    wide, small = picture_tokens(1, 2, 2, SPECIAL), picture_tokens(1, 1, 2, SPECIAL)
    expected = [TOKENIZER.bos_id, ord("a"), *wide, ord("b"), *small, ord("c"), TOKENIZER.eos_id]
    assert [*piece.tokens.tolist(), piece.targets[-1]] == expected
    assert piece.num_tiles == 4  # two, the whole, one


def test_a_picture_for_a_model_that_reads_text_alone_is_an_error_that_names_it():
    with pytest.raises(
        ValueError, match=r"here, messages\[0\].content\[0\]: a picture was given, but this model reads text alone"
    ):
        Encoder(TOKENIZER, None)(conversation(1))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of files


def write_jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]


def test_chat_rows_find_their_pictures_beside_the_file_in_images_or_in_the_row(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(1))
    import base64

    url = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    rows = [
        {"messages": ask({"type": "image", "path": "sub/a.png"})},
        {"messages": ask({"type": "image"}), "images": ["sub/a.png"]},
        {"messages": ask({"type": "image_url", "image_url": {"url": url}}, {"type": "image"}), "images": ["sub/a.png"]},
        {"messages": ask()},
    ]
    documents = open_source(f"chat:{write_jsonl(tmp_path, rows)}")
    encoder = Encoder(TOKENIZER, PICTURES)
    shades = [[] if p.tiles is None else p.tiles[:, 0, 0, 0].tolist() for p in map(encoder, documents)]
    assert shades == [[1], [1], [3, 1], []]


def test_parquet_rows_hold_the_bytes_of_their_pictures(tmp_path):
    """As data sets of Hugging Face have them: {"bytes", "path"}; messages nested or as JSON."""
    images = [[{"bytes": png(5), "path": "x.png"}], [{"bytes": png(6), "path": None}]]
    for name, messages in {
        "nested": [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "!"}]}]] * 2,
        "json": [json.dumps(ask({"type": "image"}))] * 2,
    }.items():  # fmt: skip
        pq.write_table(
            pa.table({"messages": messages, "images": images, "other": [1, 2]}), tmp_path / f"{name}.parquet"
        )
        documents = open_source(f"chat:{tmp_path / name}.parquet")
        tiles = [Encoder(TOKENIZER, PICTURES)(document).tiles for document in documents]
        assert [t[0, 0, 0, 0] for t in tiles] == [5, 6]
    captions = {"text": ["a<|image|>b", "c"], "image": [i[0] for i in images]}
    pq.write_table(pa.table(captions), tmp_path / "captions.parquet")
    documents = open_source(f"pictures:{tmp_path / 'captions.parquet'}")
    assert [[p for p in d.content if isinstance(p, str)] for d in documents] == [["a", "b"], ["c"]]
    assert isinstance(documents[1].content[0], Picture)  # without a mark, the picture comes first


def calling(name, arguments, tools=()):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": list(tools),
    }


def declared(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def deeper(kind):
    """The same type with strings in dictionaries, and large lists: as other writers keep them."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, deeper(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.large_list(deeper(kind.value_type))
    return pa.large_string() if pa.types.is_string(kind) else kind


@pytest.mark.parametrize("types", ["as inferred", "large"])
def test_parquet_gives_the_documents_of_the_same_rows_as_jsonl(tmp_path, types):
    """Arrow fills what a row has not with null, at every depth."""
    place = {"where": {"city": "Oslo"}, "days": [{"n": 1}, {"word": "two"}]}
    rows = [
        calling("weather", {"city": "Oslo"}, [declared("weather", city={"type": "string", "enum": ["Oslo", "Rome"]})]),
        calling("clock", {"zone": "UTC"}, [declared("clock", zone={"type": "string"}), declared("stop")]),
        calling("place", place, [declared("place", where={"type": "object", "properties": {"x": {"type": "null"}}})]),
        calling("stop", {}),
    ]
    table = pa.Table.from_pylist(rows)
    if types == "large":
        table = table.cast(pa.schema([(field.name, deeper(field.type)) for field in table.schema]))
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = list(open_source(f"chat:{write_jsonl(tmp_path, rows)}"))
    got = list(open_source(f"chat:{tmp_path}/rows.parquet"))
    assert [(d.messages, d.tools) for d in got] == [(d.messages, d.tools) for d in expected]
    assert [call.arguments for d in got for call in d.messages[1].tool_calls] == [
        {"city": "Oslo"}, {"zone": "UTC"}, place, {}
    ]  # fmt: skip


def test_nulls_in_maps_in_lists_and_in_json_were_written_and_stay(tmp_path):
    kind = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.list_(pa.int64())))])
    message = pa.struct(
        [("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.string()), ("tool_calls", pa.list_(kind))]
    )
    calls = [{"name": "f", "arguments": [("a", [1, None]), ("b", None)]}, {"name": "g", "arguments": None}]
    said = [[{"role": "assistant", "content": "", "tool_calls": calls}]]
    pq.write_table(pa.table({"messages": pa.array(said, pa.list_(message))}), tmp_path / "maps.parquet")
    (document,) = open_source(f"chat:{tmp_path}/maps.parquet")
    assert [c.arguments for c in document.messages[0].tool_calls] == [{"a": [1, None], "b": None}, {}]
    rows = [calling("f", json.dumps({"a": None})), calling("g", "")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "json.parquet")
    documents = open_source(f"chat:{tmp_path}/json.parquet")
    assert [d.messages[1].tool_calls[0].arguments for d in documents] == [{"a": None}, {}]
    import datetime

    rows = [calling("f", {"at": datetime.datetime(2026, 1, 2)})]
    pq.write_table(pa.Table.from_pylist([{"messages": rows[0]["messages"]}]), tmp_path / "times.parquet")
    with pytest.raises(ValueError, match=r"row 0 of row group 0, messages\[1\].*holds what JSON cannot: .*datetime"):
        open_source(f"chat:{tmp_path}/times.parquet")[0]


@pytest.mark.parametrize("path", ["../a.png", "{outside}/a.png", "link.png", "linked/a.png"])
def test_a_row_opens_no_picture_outside_the_folder_of_its_file(tmp_path, path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    (folder / "linked").symlink_to(tmp_path)
    source = path.format(outside=tmp_path)
    for kind, row in {
        "chat": {"messages": ask({"type": "image", "path": source})},
        "pictures": {"text": "x", "image": source},
    }.items():
        with pytest.raises(
            ValueError, match=r"rows.jsonl, .* leads out of the folder .*/data, and pictures are read from"
        ):
            open_source(f"{kind}:{write_jsonl(folder, [row])}")[0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2 is no valid JSON"),
        ("[1]", "line 2: should be a JSON object"),
        ({"other": 1}, "line 2: has no field 'messages', but 'other'"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"line 2, messages\[0\].role should be one of .* is 'usr'"),
        ({"messages": ask({"type": "image"})}, "line 2: there are 1 places for pictures, and 0 pictures"),
        ({"messages": ask(), "images": ["a.png"]}, "line 2: there are 0 places for pictures, and 1 pictures"),
        ({"messages": ask({"type": "image", "path": "gone.png"})}, "line 2: there is no picture .*gone.png"),
        ({"messages": ask(), "tools": [{"name": 3}]}, r"line 2, tools\[0\].name"),
        ({"messages": ask({"type": "image", "url": "https://x/y.png"})}, "nothing is fetched"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_before_training_begins(tmp_path, row, says):
    path = write_jsonl(tmp_path, [{"messages": ask()}, row])
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_source(f"chat:{path}")


def test_a_damaged_picture_is_named_when_it_is_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1)[:40])
    path = write_jsonl(tmp_path, [{"text": "x", "image": "a.png"}])
    with pytest.raises(ValueError, match=r"rows.jsonl, at byte 0"):
        Encoder(TOKENIZER, PICTURES)(open_source(f"pictures:{path}")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def mixed(folder, count=40):
    """Rows with one to three pictures, each of a shade of its own, and texts among them."""
    folder.mkdir(exist_ok=True)
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        number = int(draw.integers(1, 4))
        names = [f"{i}-{j}.png" for j in range(number)]
        for j, name in enumerate(names):
            (folder / name).write_bytes(png(1 + (3 * i + j) % 250))
        rows.append({"text": f"{i}: " + "<|image|>" * number, "images": names})
    (folder / "text.txt").write_text("some words of plain text\n\n" * 2000)
    return DataConfig(
        sources=(f"pictures:{write_jsonl(folder, rows)}", f"text:{folder / 'text.txt'}"),
        seq_len=48, batch_size=4, tiles_per_row=4, max_tiles=1, heldout_fraction=0.2, prefetch=0,
    )  # fmt: skip


def loader(config, split="train", **more):
    return make_loader(config, TOKENIZER, split=split, pictures=PICTURES, **more)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_every_row_has_the_tiles_of_its_patches_in_order_and_no_picture_is_cut(tmp_path):
    batches = take(loader(mixed(tmp_path)), 30)
    shades = []
    for batch in batches:
        for row in range(4):
            patches = batch.tokens[row] == PATCH
            tiles = patches.sum() // PICTURES.tokens_per_tile
            assert patches.sum() % PICTURES.tokens_per_tile == 0
            assert batch.images[row, tiles:].max(initial=0) == 0 and batch.images[row, :tiles].min(initial=1) > 0
            shades += batch.images[row, :tiles, 0, 0, 0].tolist()
            for segment in range(1, batch.segment_ids[row].max() + 1):
                own = batch.tokens[row][batch.segment_ids[row] == segment]
                if (own == PATCH).any():  # whole: it begins, and all its pictures end
                    assert own[0] == TOKENIZER.bos_id
                    assert (own == SPECIAL["<|image_start|>"]).sum() == (own == SPECIAL["<|image_end|>"]).sum()
    assert len(set(shades)) > 50
    texts = [TOKENIZER.decode(row) for batch in batches for row in batch.tokens]
    assert any("plain text" in text for text in texts)


def test_a_document_that_fits_in_no_row_is_named_with_what_to_do(tmp_path):
    config = mixed(tmp_path)
    for small in ({"tiles_per_row": 2}, {"seq_len": 16}):
        fields = {**vars(config), **small}
        with pytest.raises(ValueError, match=r"rows.jsonl, at byte \d+: with its pictures .* raise data.seq_len"):
            take(loader(DataConfig(**fields)), 30)


def test_a_conversation_is_cut_only_if_it_is_longer_than_a_row(tmp_path):
    rows = []
    for i in range(40):
        question, answer = f"{i} " + "why? " * (i % 5), "so" * (80 if i == 7 else 3)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    config = DataConfig(
        sources=(f"chat:{write_jsonl(tmp_path, rows)}",), seq_len=96, batch_size=2, heldout_fraction=0.0, prefetch=0,
        loss_on="replies",
    )  # fmt: skip
    (long,) = [d for d in open_source(config.sources[0]) if d.messages[0].text.startswith("7 ")]
    long_text = TOKENIZER.decode(Encoder(TOKENIZER)(long).tokens)
    seen, parts = set(), 0
    for batch in take(loader(config), 60):
        for row, ids in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in range(1, ids.max() + 1):
                text = TOKENIZER.decode(row[ids == segment])
                if text in long_text:
                    parts += 1
                else:
                    assert text.startswith("<|begin_of_text|>") and text.endswith("\n\nsososo")
                    seen.add(int(text.split("<|header_end|>")[1].split()[0]))
    assert parts > 1
    assert seen == set(range(40)) - {7}


def test_heldout_rows_with_pictures_come_once_each(tmp_path):
    config = mixed(tmp_path)
    train, heldout = split(open_source(config.sources[0]), 0.2)
    numbers = [int(d.content[0].split(":")[0]) for d in heldout]
    found = [TOKENIZER.decode(row) for batch in loader(config, "heldout") for row in batch.tokens]
    for number in numbers:
        assert sum(text.count(f"<|begin_of_text|>{number}: <|image_start|>") for text in found) == 1
    assert numbers and not set(numbers) & {int(d.content[0].split(":")[0]) for d in train}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_goes_on_where_another_was_with_the_same_tiles(tmp_path, prefetch):
    config = DataConfig(**{**vars(mixed(tmp_path)), "prefetch": prefetch})
    one = loader(config)
    take(one, 7)
    state = json.loads(json.dumps(one.get_state()))
    expected = take(one, 6)
    other = loader(config)
    other.set_state(state)
    assert_same(take(other, 6), expected)


def test_two_processes_together_make_the_batches_of_one(tmp_path):
    config = mixed(tmp_path)
    whole = loader(config)
    halves = [loader(config, process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        parts = [next(half) for half in halves]
        joined = tuple(np.concatenate(fields) for fields in zip(*parts, strict=True))
        assert_same([joined], [next(whole)])
    merged = merge_states([half.get_state() for half in halves])
    again = loader(config)
    again.set_state(merged)
    assert_same([next(again)], [next(whole)])


@pytest.mark.parametrize("change", [{"tiles_per_row": 5}, {"loss_on": "replies"}])
def test_a_saved_place_is_of_one_way_of_packing(tmp_path, change):
    config = mixed(tmp_path)
    state = loader(config).get_state()
    with pytest.raises(ValueError, match="the saved place in the data is of other data"):
        loader(DataConfig(**{**vars(config), **change})).set_state(state)


# ---------------------------------------------------------------------------------------------------------------------
# What every machine has


@pytest.mark.parametrize("pairs", [False, True])
def test_no_heldout_digit_is_ever_trained_on(pairs):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    documents = DigitDocuments(pairs=pairs)
    train, heldout = split(documents, 0.1)
    assert 100 < len(heldout) / 64 < 260 and len(train) + len(heldout) == 64 * len(labels)

    def scans(subset):
        return set((subset._indices % len(labels)).tolist())

    assert not scans(train) & scans(heldout)
    for i in range(0, len(heldout), len(heldout) // 20):
        assert int(heldout[i].where.split()[2].rstrip(",")) in scans(heldout)
    for i in list(scans(train))[::50]:  # the second of a pair
        assert documents._other(i, np.random.default_rng(i)) in scans(train)


def test_digits_are_asked_about_and_answered():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    single, pair = DigitDocuments(pairs=False), DigitDocuments(pairs=True)
    for i in (0, 100, 2000):
        page, question = single[i].messages[0].content
        assert page.source.size == (48, 48) and question.endswith(("?", "."))
        assert single[i].messages[1].content == (str(labels[i % len(labels)]),)
        np.testing.assert_array_equal(page.source, single[i].messages[0].content[0].source)  # the same every time
        first, second = pair[i].messages[1].text[:1], pair[i].messages[1].text[6:7]
        assert pair[i].messages[1].text == f"{first} and {second}: the {'first' if first > second else 'second'}"
        assert first == str(labels[i % len(labels)]) != second
    same_scan = np.asarray(single[len(labels)].messages[0].content[0].source)
    assert np.abs(same_scan.astype(int) - np.asarray(single[0].messages[0].content[0].source)).max() > 50


def test_docstrings_are_short_english_texts():
    documents = open_source("docstrings")
    lengths = [len(documents[i]) for i in range(len(documents))]
    assert len(lengths) > 3000 and 50 < np.median(lengths) < 400
    assert "Return" in " ".join(documents[i] for i in range(200))
