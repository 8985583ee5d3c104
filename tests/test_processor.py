"""Messages, pictures and tools become the tokens and tiles that the model takes, whatever directory it came from."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from micro_run import PICTURES, picture_directory, picture_processor
from PIL import Image

import llama4_jax
from llama4_jax.config import RunConfig, converted_to_json, to_json
from llama4_jax.data.config import DataConfig
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import ImageConfig, picture_tokens, tile_picture
from llama4_jax.inputs.messages import Picture
from llama4_jax.inputs.picture_files import open_picture
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.processor import Inputs, Processor, illustrated

PROCESSOR = picture_processor()
TOOLS = [{"type": "function", "function": {"name": "zoom", "description": "Look closer", "parameters": None}}]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return picture_directory(tmp_path_factory.mktemp("processor") / "hf")


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def user(*content):
    return [{"role": "user", "content": list(content)}]


PLACE = {"type": "image"}


def test_a_hugging_face_directory_gives_its_processor(hugging_face):
    processor = Processor.from_pretrained(hugging_face)
    assert processor.pictures == ImageConfig(tile_size=28, tokens_per_tile=4, max_tiles=4)
    assert processor.tokenizer.fingerprint == ByteTokenizer().fingerprint
    assert llama4_jax.Processor is Processor


def test_what_it_makes_is_what_the_model_takes(hugging_face, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.jpg")]
    for path, size in zip(paths, ((28, 28), (50, 20)), strict=True):
        Image.fromarray(noise(*size)).save(path)
    model = llama4_jax.from_pretrained(hugging_face, dtype="float32")
    inputs = llama4_jax.Processor.from_pretrained(hugging_face)(
        user(PLACE, "or", PLACE, "?"), images=paths, tools=TOOLS
    )
    # `jax.jit` makes jax's arrays of numpy's, as calling the model does where annotations are not checked
    forward = jax.jit(model)
    logits = forward(inputs.tokens, images=inputs.images)
    assert logits.shape == (*inputs.tokens.shape, 320) and inputs.images.shape == (1, 1 + 3, 28, 28, 3)
    others = forward(inputs.tokens, images=255 - inputs.images)
    first = inputs.tokens[0].tolist().index(PICTURES.vision.patch_token_id)
    np.testing.assert_array_equal(logits[:, :first], others[:, :first])
    assert np.abs(logits[:, first:] - others[:, first:]).max() > 0.1


def run_directory(path, *, max_tiles, seq_len=64):
    path.mkdir()
    data = DataConfig(seq_len=seq_len, batch_size=1, tiles_per_row=8, max_tiles=max_tiles)
    (path / "config.json").write_text(to_json(RunConfig(name="x", model=PICTURES, data=data, steps=1)))
    ByteTokenizer().save(path)
    return path


def test_a_run_cuts_pictures_as_it_was_trained_to(tmp_path):
    processor = Processor.from_pretrained(run_directory(tmp_path / "run", max_tiles=3))
    assert processor.pictures == ImageConfig(tile_size=28, tokens_per_tile=4, max_tiles=3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"preprocessor_config.json": {"max_patches": 5, "size": {"height": 28, "width": 28}}}, {"max_tiles": 5}),
        ({"preprocessor_config.json": {"resize_to_max_canvas": True}}, {"resize_to_max_canvas": True}),
        ({"processor_config.json": {"image_processor": {"max_patches": 6, "resize_to_max_canvas": False}},
          "preprocessor_config.json": {"max_patches": 5}}, {"max_tiles": 6}),
        ({"processor_config.json": {"fake_image_token": "<|image|>"}, "preprocessor_config.json": {"max_patches": 7}},
         {"max_tiles": 7}),
        ({"preprocessor_config.json": {"max_patches": None}}, {}),
    ],
)  # fmt: skip
def test_a_converted_directory_cuts_pictures_as_its_source_says(tmp_path, files, expected):
    (tmp_path / "config.json").write_text(converted_to_json(PICTURES, {}))
    ByteTokenizer().save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = Processor.from_pretrained(tmp_path).pictures
    assert found == ImageConfig(**{"tile_size": 28, "tokens_per_tile": 4, "max_tiles": 16} | expected)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", '{"max_patches": "16"}', "preprocessor_config.json: .* from 1 to 256, not '16'"),
        ("preprocessor_config.json", '{"max_patches": 0}', "preprocessor_config.json: .* from 1 to 256, not 0"),
        ("preprocessor_config.json", "{", "preprocessor_config.json is no valid JSON"),
        ("preprocessor_config.json", "[1]", r"preprocessor_config.json: expected `object`, got `array`"),
        (
            "preprocessor_config.json",
            '{"resize_to_max_canvas": 1}',
            "resize_to_max_canvas should be true or false",
        ),
        (
            "processor_config.json",
            '{"image_processor": 3}',
            "processor_config.json: image_processor: expected `object`, got `int`",
        ),
        ("config.json", '{"model_type": "gpt2"}', "gpt2"),
        ("byte_tokenizer.json", "{", "byte_tokenizer.json is no valid JSON"),
    ],
)
def test_a_damaged_directory_is_said_by_file(tmp_path, file, content, message):
    (tmp_path / "config.json").write_text(converted_to_json(PICTURES, {}))
    ByteTokenizer().save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(tmp_path)


def test_a_directory_that_is_none_is_said_as_loading_a_model_says_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory: .*nowhere"):
        Processor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor params.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(converted_to_json(PICTURES, {}))
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        Processor.from_pretrained(tmp_path)


def test_another_models_tokenizer_is_told_by_its_patch_token(hugging_face, tmp_path):
    config = json.loads((hugging_face / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_index": 275}))
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=r"patch_token_id is 275, but <\|patch\|> is 274 for the tokenizer"):
        Processor.from_pretrained(tmp_path)


def test_tokens_are_those_of_the_chat_format_and_tiles_those_of_each_picture():
    pictures = [noise(28, 28), noise(100, 30, seed=1), noise(500, 500, seed=2)]
    messages = [
        {"role": "system", "content": "Look."},
        {
            "role": "user",
            "content": [PLACE, "and", {"type": "image", "image": pictures[1]}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom", "arguments": {}}]},
        {"role": "tool", "content": [{"type": "image"}]},
    ]
    inputs = PROCESSOR(messages, images=[pictures[0], pictures[2]], tools=TOOLS)
    assert isinstance(inputs, Inputs)
    cut = [tile_picture(open_picture(picture, name=""), PROCESSOR.pictures) for picture in pictures]
    special = PROCESSOR.tokenizer.special_tokens
    ids = [picture_tokens(tiles.rows, tiles.cols, 4, special) for tiles in cut]
    rendered = ChatFormat(PROCESSOR.tokenizer).encode(messages, tools=TOOLS, pictures=ids)
    assert inputs.tokens.tolist() == [rendered.tokens] and inputs.tokens.dtype == np.int32
    np.testing.assert_array_equal(inputs.images, np.concatenate([tiles.pixels for tiles in cut])[None])
    assert [len(tiles.pixels) for tiles in cut] == [1, 5, 5]
    # without the header of a reply, and as a list
    tokens, tiles = PROCESSOR.prompt(messages, images=[pictures[0], pictures[2]], tools=TOOLS, generation_prompt=False)
    header = ChatFormat(PROCESSOR.tokenizer)._header("assistant")
    assert tokens == rendered.tokens[: -len(header)]
    np.testing.assert_array_equal(tiles, inputs.images[0])


def test_text_alone_has_no_tiles():
    assert PROCESSOR.prompt(user("Hi <|image|>")).tiles is None
    assert PROCESSOR(user("Hi")).images is None
    assert PROCESSOR.text_prompt("def ") == (PROCESSOR.tokenizer.encode("def ", bos=True), None)
    assert Processor(ByteTokenizer()).prompt(user("Hi")).tokens == PROCESSOR.prompt(user("Hi")).tokens


def test_pictures_of_every_kind_are_taken(tmp_path):
    array = noise(28, 28)
    image = Image.fromarray(array)
    data = io.BytesIO()
    image.save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    for source in (array, image, data.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(PROCESSOR.prompt(user(PLACE), images=[source]).tiles, array[None])


def test_48_pictures_fit_and_keep_their_order():
    pictures = [np.full((28, 28, 3), 5 * i, np.uint8) for i in range(48)]
    inputs = PROCESSOR(user(*[PLACE] * 48, "Which is darkest?"), images=pictures)
    assert (inputs.tokens == PICTURES.vision.patch_token_id).sum() == 48 * 4
    np.testing.assert_array_equal(inputs.images[0, :, 0, 0, 0], 5 * np.arange(48))


def test_a_text_has_a_picture_at_each_place_or_several():
    one, two, three = (np.full((28, 28, 3), value, np.uint8) for value in (1, 2, 3))
    tokens, tiles = PROCESSOR.text_prompt("a<|image|>b<|image|>", images=[[one, two], three])
    special = PROCESSOR.tokenizer.special_tokens
    picture = picture_tokens(1, 1, 4, special)
    assert tokens == [PROCESSOR.tokenizer.bos_id, ord("a"), *picture, *picture, ord("b"), *picture]
    assert tiles[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert illustrated("x<|image|>", ["a.png"]) == ["x", Picture("a.png"), ""]
    assert illustrated("x<|image|>y", [["a", "b"]]) == ["x", Picture("a"), Picture("b"), "y"]


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ((PLACE, "and", PLACE), [noise(9, 9)],
         r"messages\[0\].content\[2\] is the place of a picture, and there is none for it: the messages have 2 such "
         r"places, and images has 1 pictures."),
        (("hi",), [noise(9, 9)],
         r'images\[0\] has no place: the messages have 0 \({"type": "image"}\), and images has 1 pictures.'),
        ((PLACE,), [noise(9, 9), noise(9, 9)], r"images\[1\] has no place: the messages have 1 "),
        ((PLACE,), "a.png", "images should be a list of pictures, and is a str."),
        ((PLACE,), ["nothing.png"], r"images\[0\]: there is no file nothing.png"),
        (({"type": "image", "path": "nothing.png"},), [], r"messages\[0\].content\[0\]: there is no file nothing.png"),
        ((PLACE, PLACE), [noise(9, 9), b"\x89PNG\r\n\x1a\nxxxx"], r"images\[1\] (cannot be opened|is not a picture)"),
        ((PLACE,), [b"GIF, I say"], r"images\[0\] is not a picture that can be read: PNG, JPEG"),
        ((PLACE,), [np.zeros((9, 9))], r"images\[0\] is an array of float64 and shape \(9, 9\)"),
        ((PLACE,), [5], r"images\[0\] should be a path, bytes, a PIL image or an array, and is 5."),
        ((PLACE,), [None], r"images\[0\] should be a path, bytes, a PIL image or an array, and is None."),
    ],
)  # fmt: skip
def test_a_picture_that_does_not_serve_is_named(content, images, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PROCESSOR(user(*content), images=images)


def test_a_truncated_picture_is_named(tmp_path):
    data = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(data, "JPEG")
    (tmp_path / "half.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"messages\[0\].content\[1\] is a JPEG picture .* that cannot be decoded"):
        PROCESSOR(user("x", {"type": "image", "path": str(tmp_path / "half.jpg")}))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<|image|> and <|image|>", [noise(9, 9)], r"the prompt has 2 places for pictures \(<\|image\|>\), and 1 pict"),
        ("nothing", [noise(9, 9)], r"the prompt has 0 places for pictures \(<\|image\|>\), and 1 pictures were given"),
        ("<|image|>", [], "the prompt has 1 places .* and 0 pictures were given: each picture needs a place"),
        ("<|image|>", [b"?"], r"images\[0\] is not a picture that can be read"),
    ],
)
def test_a_text_with_other_places_than_pictures_is_refused(text, images, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR.text_prompt(text, images=images)


def test_a_picture_for_a_model_that_reads_text_alone_is_refused():
    reader = Processor(ByteTokenizer())
    with pytest.raises(ValueError, match=r"images\[0\]: a picture was given, but this model reads text alone."):
        reader(user(PLACE), images=[noise(9, 9)])
    with pytest.raises(ValueError, match=r"messages\[0\].content\[1\]: a picture was given, but this model reads text"):
        reader(user("x", Picture("a.png")))
    with pytest.raises(ValueError, match=r"images\[0\]: a picture was given, but this model reads text alone."):
        reader.text_prompt("<|image|>", images=["a.png"])


def test_what_is_no_conversation_is_said():
    for messages, tools, message in [
        ([], [], "messages is empty"),
        ([{"role": "wizard", "content": "x"}], [], r"messages\[0\].role should be one of system, .* and is 'wizard'"),
        (user("x"), [{"name": "zoom", "parameters": {"type": "string"}}], r"tools\[0\].parameters.type should be"),
    ]:
        with pytest.raises(ValueError, match=message):
            PROCESSOR(messages, tools=tools)


def test_a_checkpoints_own_template_is_the_other_choice(hugging_face, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(hugging_face, own)
    with pytest.raises(FileNotFoundError, match="ships no chat template"):
        Processor.from_pretrained(own, template="checkpoint")
    (own / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
        "{% if p.type == 'image' %}<|image|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|eot|>{% endfor %}"
    )
    processor = Processor.from_pretrained(own, template="checkpoint")
    content = [{"type": "image"}, {"type": "text", "text": "Hi <|eot|>"}]
    inputs = processor([{"role": "user", "content": content}], images=[np.zeros((28, 28, 3), np.uint8)])
    text = processor.tokenizer.decode(inputs.tokens[0])
    assert text.startswith("<|begin_of_text|>[user]<|image_start|><|image|><|patch|>")
    assert text.endswith("<|image_end|>Hi <|eot|><|eot|>")
    assert (inputs.tokens == processor.tokenizer.special_tokens["<|eot|>"]).sum() == 1
