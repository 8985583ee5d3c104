"""infer.py as a user runs it: on a run of train.py, in a process of its own; mistakes in the process of the tests."""

import io
import itertools
import json
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from micro_run import (
    PICTURES,
    ROOT,
    WORDS,
    environment,
    finished_run,
    infer,
    picture_directory,
    picture_processor,
    start,
)
from PIL import Image
from pressed_at import PressedAt
from scripted_core import ScriptedCore

import infer as script
import llama4_jax
import llama4_jax.infer.batch
import llama4_jax.infer.chat
from llama4_jax.config import converted_to_json
from llama4_jax.inputs.messages import Message, Picture
from llama4_jax.inputs.tokenizer import ByteTokenizer, load_tokenizer
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run):
    return llama4_jax.from_pretrained(run, dtype="float32")


def test_generate_continues_the_prompt_as_the_library_does(run, model):
    result = infer(run.parent, "generate", str(run), "--prompt", "the model ", "--max-new-tokens", "30",
                   "--temperature", "0")  # fmt: skip
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(run)
    (reply,) = llama4_jax.generate(
        model, [tokenizer.encode("the model ", bos=True)], max_new_tokens=30, stop_ids=tokenizer.stop_ids
    )
    assert result.stdout == "the model " + tokenizer.decode(reply, skip_special=True) + "\n"
    assert re.fullmatch(rf"\[{len(reply)} tokens; the first after [\d.]+ s, then [\d.,]+ tokens/s\]\n", result.stderr)


def test_the_command_that_training_ends_with_works(run):
    said = (run.parent / "stdout.txt").read_text()
    (command,) = re.findall(r"^  python infer\.py (.*)$", said, re.MULTILINE)
    result = infer(run.parent, *shlex.split(command))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def ")


def test_samples_differ_from_one_another_and_repeat_with_the_seed(run):
    options = ("generate", str(run), "--prompt", "a", "--max-new-tokens", "20", "--temperature", "1.0",
               "--num-samples", "3", "--seed")  # fmt: skip
    first, again = infer(run.parent, *options, "7"), infer(run.parent, *options, "7")
    assert first.returncode == 0, first.stderr
    samples = re.split(r"--- sample \d of 3\n", first.stdout)[1:]
    assert len(set(samples)) == 3 and all(sample.startswith("a") for sample in samples)
    assert again.stdout == first.stdout


def test_score_gives_bits_per_byte_and_nats_by_position(run, model, tmp_path):
    text = (" ".join(WORDS.split()[:9]) + "\n") * 5  # more than the context of 64
    (tmp_path / "some.txt").write_text(text)
    result = infer(run.parent, "score", str(run), "--file", str(tmp_path / "some.txt"), "--json")
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    tokens = np.array(load_tokenizer(run).encode(text, bos=True), np.int32)
    nll, forward = [], jax.jit(model)
    for first in range(0, len(tokens) - 1, 64):
        piece = tokens[first : first + 65]
        logits = np.asarray(forward(piece[None, :-1])[0], np.float64)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll += list(log_sum - logits[np.arange(len(piece) - 1), piece[1:]])
    assert (got["bytes"], got["tokens"]) == (len(text.encode()), len(nll))
    assert got["nats_per_token"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(np.sum(nll) / np.log(2) / len(text), rel=1e-5)
    assert got["by_position"][0]["nats"] == pytest.approx(np.mean(nll[::64]), rel=1e-4)
    assert "scored as 4 documents" in result.stderr
    shown = infer(run.parent, "score", str(run), "--file", str(tmp_path / "some.txt"))
    assert f"{got['bits_per_byte']:.4f} bits per byte" in shown.stdout
    assert got["bits_per_byte"] < 5  # of 8: it has learnt something


def run_here(capsys, monkeypatch, *options, typed=""):
    """infer.py in this process: exit code, stdout and stderr."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "none of the user's")
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    try:
        code = script.main(list(options))
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["generate", "NOWHERE", "--prompt", "x"], ["no such directory: ", "nowhere"]),
        (["generate", "RUN", "--prompt", "x" * 70], ["71 tokens", "64"]),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "100"], ["64", "max_new_tokens"]),
        (["generate", "RUN", "--prompt", "x", "--temprature", "1"], ["--temprature", "--temperature"]),
        (["generate", "EMPTY", "--prompt", "x"], ["config.json"]),
        (["score", "RUN", "--file", "NOWHERE"], ["no such file: ", "nowhere"]),
        (["score", "RUN", "--file", "EMPTY/void.txt"], ["void.txt is empty"]),
        (["score", "RUN", "--file", "EMPTY/latin.txt"], ["latin.txt is not UTF-8", "at byte 3"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value[0] in ("generate", "score") else "",
)
def test_a_mistake_is_one_clear_error(run, tmp_path, options, says, capsys, monkeypatch):
    (tmp_path / "void.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    places = {"RUN": str(run), "NOWHERE": str(tmp_path / "nowhere"), "EMPTY": str(tmp_path)}
    filled = [re.sub("RUN|NOWHERE|EMPTY", lambda match: places[match[0]], option) for option in options]
    code, stdout, stderr = run_here(capsys, monkeypatch, *filled)
    assert (code, stdout) == (2, "")
    for words in says:
        assert words in stderr


def test_a_mistake_shows_no_traceback_and_exits_with_2(run, tmp_path):
    result = infer(run.parent, "generate", str(tmp_path / "nowhere"), "--prompt", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"infer.py: no such directory: {tmp_path / 'nowhere'}\n"


# Below, a model with pictures.


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    directory = picture_directory(tmp_path_factory.mktemp("cli") / "seeing")
    draw = np.random.default_rng(0)
    for name, size in (("a.png", (28, 28)), ("b.jpg", (28, 56))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(directory.parent / name)
    stills = [Image.new("RGB", (28, 28), (value, 0, 0)) for value in (10, 90, 170, 250)]
    stills[0].save(directory.parent / "clip.gif", save_all=True, append_images=stills[1:], duration=100)
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {"properties": {"by": {}}}}}]
    (directory.parent / "tools.json").write_text(json.dumps(tools))
    return directory


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """What there is of a model before its weights are read: with pictures, and one that reads text alone."""
    place = tmp_path_factory.mktemp("blank")
    for name, config in (("sees", PICTURES), ("reads", preset("tiny"))):
        (place / name).mkdir()
        (place / name / "config.json").write_text(converted_to_json(config, {}))
        ByteTokenizer().save(place / name)
    Image.new("RGB", (28, 28)).save(place / "a.png")
    files = {
        "text.txt": "no picture", "dict.json": '{"name": "f"}', "broken.json": "[{", "schema.json": '[{"name": "f", '
        '"parameters": {"type": "string"}}]', "in.jsonl": "{}", "others.jsonl": '{"line": 1, "request": "0"}\n',
    }  # fmt: skip
    for name, content in files.items():
        (place / name).write_text(content)
    return place


def as_shown(text: str) -> str:
    """As `text=True` of a subprocess gives it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


SYSTEM = "Look at it for as long as you need."
ASKED = [{"role": "system", "content": SYSTEM},
         {"role": "user", "content": [{"type": "image"}, {"type": "image"}, "What changed?"]}]  # fmt: skip


@pytest.fixture(scope="module")
def what_changed(seeing):
    """What the library says of both pictures, and whether it came to an end."""
    model = llama4_jax.from_pretrained(seeing, dtype="float32")
    processor = llama4_jax.Processor.from_pretrained(seeing)
    inputs = processor(ASKED, images=[seeing.parent / "a.png", seeing.parent / "b.jpg"])
    (row,) = llama4_jax.generate(
        model, inputs.tokens.tolist(), images=[inputs.images[0]], stop_ids=processor.tokenizer.stop_ids,
        max_new_tokens=12,
    )  # fmt: skip
    stopped = row[-1] in processor.tokenizer.stop_ids
    return row[:-1] if stopped else row, stopped


def test_generate_answers_about_pictures_as_the_library_does(seeing, what_changed):
    pictures = [option for name in ("a.png", "b.jpg") for option in ("--image", str(seeing.parent / name))]
    result = infer(
        seeing, "generate", str(seeing), *pictures, "--system", SYSTEM, "--prompt", "<|image|><|image|>What changed?",
        "--max-new-tokens", "12", "--temperature", "0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    row, stopped = what_changed
    assert result.stdout == as_shown(ByteTokenizer().decode(row, skip_special=True)) + "\n"
    assert re.fullmatch(rf"\[{len(row) + stopped} tokens; the first after .*\]\n", result.stderr)


def test_a_chat_through_a_pipe_says_what_the_library_does(seeing, what_changed):
    place = seeing.parent
    options = ("--image", str(place / "a.png"), "--system", SYSTEM, "--max-new-tokens", "12", "--temperature", "0")
    process = start(seeing, "chat", str(seeing), *options, script="infer.py", stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(f"/image {place / 'b.jpg'}\nWhat changed?\n", timeout=300)
    assert process.returncode == 0, stderr
    row, stopped = what_changed
    assert stdout == as_shown(ByteTokenizer().decode(row)) + "\n"
    assert stderr.startswith(f"{seeing}: /image, /system, /reset, /quit, /help\n")
    assert ("[cut off: --max-new-tokens are reached, or the context is full]" in stderr) == (not stopped)


class Scripted:
    """Writes texts, and keeps what it was asked: in place of `generate`, or `of_core()` in place of the engine."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def __call__(self, model, prompts, *, images, stop_ids, on_tokens, **how):
        self.asked.append({"prompts": prompts, "images": images, **how})
        rows = [[*ByteTokenizer().encode(self.texts.pop(0)), stop_ids[-1]] for _ in prompts]
        on_tokens(rows)
        return rows

    def of_core(self) -> ScriptedCore:
        def write(prompt, *, tiles, stop_ids, **how):
            self.asked.append({"prompts": [prompt], "images": [tiles], **how})
            return [[*ByteTokenizer().encode(self.texts.pop(0)), stop_ids[-1]]]

        return ScriptedCore(write)


def test_frames_are_the_stills_of_a_clip_in_its_place(seeing, capsys, monkeypatch):
    said = 'Look: [zoom(by=2), zoom(by="x")]'
    written = Scripted(said, "[zoom(by=two)]", "fine")
    monkeypatch.setattr(llama4_jax.infer.generate, "generate", written)
    place = seeing.parent
    options = ("generate", str(seeing), "--image", str(place / "clip.gif"), "--image", str(place / "a.png"), "--frames",
               "2", "--prompt", "<|image|> then <|image|>?", "--max-new-tokens", "12")  # fmt: skip
    tools = ("--tools", str(place / "tools.json"))
    code, stdout, stderr = run_here(capsys, monkeypatch, *options, *tools)
    assert (code, stdout) == (0, said + "\n")
    assert stderr.startswith('[call: zoom(by=2)]\n[call: zoom(by="x")]\n[33 tokens;')
    content = [{"type": "image"}, {"type": "image"}, " then ", {"type": "image"}, "?"]
    with Image.open(place / "clip.gif") as clip:
        stills = []
        for number in (1, 3):  # the middles of its two halves
            clip.seek(number)
            stills.append(clip.convert("RGB"))
    prompt = picture_processor().prompt(
        [{"role": "user", "content": content}],
        images=[*stills, place / "a.png"], tools=json.loads((place / "tools.json").read_text()),
    )  # fmt: skip
    assert written.asked[0]["prompts"] == [prompt.tokens]
    np.testing.assert_array_equal(written.asked[0]["images"][0], prompt.tiles)
    code, stdout, stderr = run_here(capsys, monkeypatch, *options, *tools)
    assert "[what looks like a call of a tool cannot be read: 'two' is no literal" in stderr
    code, stdout, stderr = run_here(capsys, monkeypatch, *options, "--raw")
    assert stdout == "<|image|> then <|image|>?fine\n"
    prompt = picture_processor().text_prompt("<|image|> then <|image|>?", images=[stills, place / "a.png"])
    assert written.asked[2]["prompts"] == [prompt.tokens]


def test_a_chat_is_read_line_by_line(seeing, capsys, monkeypatch):
    written = Scripted(*"abcde")
    monkeypatch.setattr(llama4_jax.infer.chat, "EngineCore", written.of_core())
    place = seeing.parent
    typed = f"""Hello
/image {place / "b.jpg"}

Which?
/system Be brief.
 Hello
/image {place / "a.png"}
/reset
/image {place / "nothing.png"}
/image
/dance
/help
/etc/passwd is a file
/system
Bye"""
    options = ("--system", "Be kind.", "--image", str(place / "a.png"))
    code, stdout, stderr = run_here(capsys, monkeypatch, "chat", str(seeing), *options, typed=typed)
    assert (code, stdout) == (0, "a\nb\nc\nd\ne\n")
    assert stderr.splitlines() == [
        f"{seeing}: /image, /system, /reset, /quit, /help",
        f"infer.py: /image {place / 'nothing.png'}: there is no file {place / 'nothing.png'}",
        "infer.py: /image should be followed by the path of a picture.",
        "infer.py: there is no /dance; /help says what there is.",
        *script.CHAT_HELP.splitlines(),
    ]
    a, b = (Picture(str(place / name)) for name in ("a.png", "b.jpg"))
    kind, brief = (Message("system", (words,)) for words in ("Be kind.", "Be brief."))
    first = [kind, Message("user", (a, "Hello"))]
    conversations = [
        first,
        [*first, Message("assistant", ("a",)), Message("user", (b, "Which?"))],
        [brief, Message("user", (" Hello",))],
        [brief, Message("user", ("/etc/passwd is a file",))],
        [Message("user", ("Bye",))],
    ]
    for conversation, asked in zip(conversations, written.asked, strict=True):
        prompt = picture_processor().prompt(conversation)
        assert asked["prompts"] == [prompt.tokens]
        np.testing.assert_array_equal(asked["images"][0], prompt.tiles)


def test_a_chat_asks_for_the_results_of_calls(seeing, capsys, monkeypatch):
    written = Scripted("[zoom(by=2), zoom(by=3)]", "I see.", "[zoom(by=4)]")
    monkeypatch.setattr(llama4_jax.infer.chat, "EngineCore", written.of_core())
    tools = ("--tools", str(seeing.parent / "tools.json"))
    typed = "Look!\ntwice\nthrice\nAgain\n"
    code, stdout, stderr = run_here(capsys, monkeypatch, "chat", str(seeing), *tools, typed=typed)
    assert (code, stdout) == (0, "\nI see.\n\n")
    assert stderr.splitlines()[1:] == ["[call: zoom(by=2)]", "[call: zoom(by=3)]", "[call: zoom(by=4)]"]
    text = ByteTokenizer().decode(written.asked[1]["prompts"][0])
    assert "ipython<|header_end|>\n\ntwice<|eom|><|header_start|>ipython<|header_end|>\n\nthrice<|eom|>" in text


def test_a_chat_goes_on_after_an_error(seeing, capsys, monkeypatch):
    written = Scripted("ok")
    monkeypatch.setattr(llama4_jax.infer.chat, "EngineCore", written.of_core())
    typed = "x" * 3000 + "\nHi\n/quit\nnever\n"
    code, stdout, stderr = run_here(capsys, monkeypatch, "chat", str(seeing), typed=typed)
    assert (code, stdout) == (0, "ok\n")
    assert "infer.py: the conversation has 3023 tokens, and the model's context_length is 2048: begin" in stderr
    assert written.asked[0]["prompts"] == [picture_processor().prompt([{"role": "user", "content": "Hi"}]).tokens]


SLOW = """
import sys, time
sys.path.insert(0, "tests")
import infer, llama4_jax.infer.chat
from scripted_core import ScriptedCore
def slow(prompt, **how):
    for _ in range(1000):
        yield list(b"word ")
        time.sleep(0.05)
llama4_jax.infer.chat.EngineCore = ScriptedCore(slow)
sys.exit(infer.main(["chat", sys.argv[1]]))
"""


# With SIGINT ignored, as a script's background jobs and all that they start have it.
IN_A_TERMINAL = (
    "import os, pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
)


def test_ctrl_c_in_a_terminal_stops_a_reply_and_not_the_chat(seeing):
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, sys.executable, "-c", SLOW, str(seeing)], cwd=ROOT,
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
    )  # fmt: skip
    shown = b""

    def until(words, type_then=b""):
        nonlocal shown
        deadline = time.monotonic() + 120
        while words not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([process.stdout], [], [], 1)[0]:
                more = process.stdout.read(4096)
                assert more, shown
                shown += more
        shown = shown[shown.index(words) + len(words) :]
        process.stdin.write(type_then)

    try:
        until(b"> ", b"Hi\n")
        until(b"word word ", b"\x03")
        until(b"[stopped]")
        until(b"> ", b"half a line\x03")
        until(b"> ", b"More?\n")
        until(b"word word ", b"\x03")
        until(b"[stopped]")
        until(b"> ", b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()  # the terminal goes with it, and what runs there
        process.communicate()


# A press that comes while nothing that waits is woken up by it, as between a prompt and the wait for the first key.
UNNOTICED = """
import signal, sys, threading, time
import infer
from llama4_jax.infer import interrupt
def press():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
with interrupt.watched(always=True):
    threading.Thread(target=press).start()
    print("typed:", infer.ask("> "))
"""


def test_ctrl_c_is_noticed_before_the_next_key():
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, sys.executable, "-c", UNNOTICED], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
    )  # fmt: skip
    shown = b""
    try:
        while shown.count(b"> ") < 2:  # it asks anew
            assert select.select([process.stdout], [], [], 60)[0], shown
            shown += process.stdout.read(4096)
        process.stdin.write(b"yes\n")
        assert b"typed: yes" in shown + process.communicate(timeout=60)[0]
    finally:
        process.kill()


def test_ctrl_c_at_any_line_of_the_chat_ends_no_chat(seeing, capsys, monkeypatch):
    processor = picture_processor()
    made = nnx.eval_shape(lambda: Llama4(PICTURES, scan_layers=False)), jax.make_mesh((1,), ("data",))
    monkeypatch.setattr(script, "read_processor", lambda options: processor)
    monkeypatch.setattr(script, "load", lambda options: made)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number in itertools.count(1, 2):  # every second: each takes a while
            monkeypatch.setattr(llama4_jax.infer.chat, "EngineCore", Scripted("one", "two", "three").of_core())
            typed = "Hi\n/image nowhere.png\n/reset\nMore?\n/quit\n"
            with PressedAt(number, "infer.py", within=("chat", "ask", "end_reply", "show", "say_calls")) as press:
                code, stdout, stderr = run_here(capsys, monkeypatch, "chat", str(seeing), typed=typed)
            if not press.came:
                break
            started = ": /image, /system" in stderr
            done = stdout == "one\ntwo\n"  # when all is said, nothing is left to go on with
            assert code in ([0, 130] if done else [0] if started else [130]), (number, stderr)
            assert not started or "one" in stdout or "two" in stdout or "[stopped]" in stderr
    finally:
        signal.signal(signal.SIGINT, before)
    assert number > 60 and stdout == "one\ntwo\n"


def test_batch_says_by_its_exit_code_whether_all_was_answered(seeing, capsys, monkeypatch, tmp_path):
    written = Scripted(*"abcdef")
    monkeypatch.setattr(llama4_jax.infer.batch, "EngineCore", written.of_core())
    good = {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, "What?"]}]}
    source, out = seeing.parent / "in.jsonl", tmp_path / "out.jsonl"
    options = ("batch", str(seeing), "--in", str(source), "--out", str(out), "--batch-size", "2", "--seed", "4")
    source.write_text((json.dumps(good) + "\n") * 3)
    code, stdout, stderr = run_here(capsys, monkeypatch, *options)
    assert (code, stdout) == (0, f"{out}: 3 replies, 0 errors\n")
    assert stderr.splitlines()[-1] == "3 answered, 0 of them by an error"
    assert [json.loads(line)["message"]["content"] for line in out.read_text().splitlines()] == ["a", "b", "c"]
    how = {name: value for name, value in written.asked[0].items() if name not in ("prompts", "images")}
    assert how == {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": None, "seed": 5}
    with source.open("a") as more:
        more.write("{}\n" + json.dumps(good))
    code, stdout, stderr = run_here(capsys, monkeypatch, *options)
    assert (code, stdout) == (1, f"{out}: 5 replies, 3 of them before, 1 errors\n")
    assert json.loads(out.read_text().splitlines()[3])["error"] == "line 4: it has no messages, but nothing."
    assert run_here(capsys, monkeypatch, *options)[0] == 1  # as long as a reply is an error


IMAGE = ["--image", "PLACE/a.png"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["generate", "SEES", "--prompt", "x", "--image", "PLACE/no.png"],
         "--image PLACE/no.png: there is no file PLACE/no.png"),
        (["generate", "SEES", "--prompt", "x", "--image", "PLACE/text.txt"],
         "--image PLACE/text.txt is not a picture that can be read: PNG, JPEG"),
        (["generate", "SEES", "--prompt", "<|image|><|image|>", *IMAGE],
         "the prompt has 2 places for pictures (<|image|>), and 1 pictures were given: each picture needs a place"),
        (["generate", "SEES", "--prompt", "What?", *IMAGE],
         "the prompt has 0 places for pictures (<|image|>), and 1 pictures were given"),
        (["generate", "SEES", "--prompt", "<|image|>"], "the prompt has 1 places for pictures (<|image|>), and 0 pict"),
        (["generate", "READS", "--prompt", "<|image|>", *IMAGE], "but this model reads text alone"),
        (["generate", "SEES", "--prompt", "<|image|>", *IMAGE, "--frames", "0"],
         "--image PLACE/a.png: 0 frames were asked for, and should be at least 1"),
        (["generate", "SEES", "--prompt", "x", "--tools", "PLACE/no.json"], "--tools: no such file: PLACE/no.json"),
        (["generate", "SEES", "--prompt", "x", "--tools", "PLACE/broken.json"], "broken.json is no valid JSON: Exp"),
        (["generate", "SEES", "--prompt", "x", "--tools", "PLACE/dict.json"],
         "PLACE/dict.json should be a list of tools, and is {'name': 'f'}."),
        (["generate", "SEES", "--prompt", "x", "--tools", "PLACE/schema.json"],
         "PLACE/schema.json[0].parameters.type should be \"object\", as arguments have names, and is 'string'."),
        (["generate", "SEES", "--prompt", "x", "--top-p", "1.5"], "top_p must be above 0 and at most 1"),
        (["generate", "SEES", "--prompt", "x", "--top-k", "9999999999"], "top_k must be below 2147483648, got"),
        (["generate", "SEES", "--prompt", "x", "--num-samples", "0"], "num_samples must be at least 1, got 0."),
        (["chat", "READS", *IMAGE], "--image PLACE/a.png: a picture was given, but this model reads text alone."),
        (["chat", "SEES", "--image", "PLACE/no.png"], "--image PLACE/no.png: there is no file PLACE/no.png"),
        (["chat", "SEES", "--tools", "PLACE/dict.json"], "PLACE/dict.json should be a list of tools, and is"),
        (["chat", "SEES", "--temperature", "-1"], "temperature must be 0 (the most likely token) or a positive number"),
        (["chat", "SEES", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0."),
        (["batch", "SEES", "--in", "PLACE/no", "--out", "PLACE/o"], "no such file of requests: PLACE/no"),
        (["batch", "SEES", "--in", "PLACE/in.jsonl", "--out", "PLACE/no/o"], "there is no directory PLACE/no"),
        (["batch", "SEES", "--in", "PLACE/in.jsonl", "--out", "PLACE"], "PLACE cannot be written: it is no file."),
        (["batch", "SEES", "--in", "PLACE/in.jsonl", "--out", "PLACE/o", "--batch-size", "0"], "batch_size must be at"),
        (["batch", "SEES", "--in", "PLACE/in.jsonl", "--out", "PLACE/others.jsonl"],
         "others.jsonl, line 1 answers line 1 of the requests as it was, or under other settings: give another --out"),
    ],
    ids=lambda value: " ".join(value)[:70] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_said_in_one_line_before_weights_are_read(blank, options, says, capsys, monkeypatch):
    monkeypatch.setattr(script, "load", None)
    places = {"PLACE": str(blank), "SEES": str(blank / "sees"), "READS": str(blank / "reads")}

    def filled(text):
        return re.sub("PLACE|SEES|READS", lambda match: places[match[0]], text)

    code, stdout, stderr = run_here(capsys, monkeypatch, *map(filled, options))
    assert (code, stdout) == (2, "")
    assert re.fullmatch(r"infer.py: [^\n]*\n", stderr) and filled(says) in stderr


def test_help_says_what_the_flags_are_for(capsys, monkeypatch):
    for command, says in {
        "generate": ["a picture, or with --frames a clip (repeatable)", "at most so many stills of each clip: an",
                     "JSON file: a list of functions that the model may call, as OpenAI's API has them"],
        "chat": ["a picture, which comes before the first message (repeatable)", "of a reply, at most (default: 512)",
                 "/help says what else can be typed; Ctrl-C stops a reply"],
        "batch": ["--in PATH JSON Lines of requests; what they do not say is as the flags", "JSON Lines of replies",
                  "The exit code is 1 if a line could not be answered", "always the most likely token (default: 0.0)"],
    }.items():  # fmt: skip
        code, stdout, _ = run_here(capsys, monkeypatch, command, "--help")
        shown = " ".join(stdout.replace("│", " ").split())
        assert code == 0
        for words in says:
            assert words in shown
