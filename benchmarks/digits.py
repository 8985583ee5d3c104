"""How well a model reads: the held-out pages of `configs/tiny_vision.py`, asked about as a user would.

    python train.py tiny_vision
    python benchmarks/digits.py runs/tiny_vision [docs/digits.png]
    python benchmarks/digits.py runs/tiny_vision --served 8         # by as many clients of `llama4 serve` at once

Replies are greedy. No scan on these pages was trained on, in any drawing. With a second argument, draws some pages and
what the model answers. With --served each page goes to the server as a data: URL, and what comes back is held against
what `generate` gives for that page alone, reply by reply.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import llama4_jax
from llama4_jax.config import from_json
from llama4_jax.data.digits import PAGE, VARIATIONS, DigitDocuments
from llama4_jax.data.documents import Conversation, split

DRAWINGS = 3  # of each held-out scan
BATCH = 32
MOST = 32  # tokens of a reply
ZOOM = 3


def heldout(pairs: bool, fraction: float) -> list[Conversation]:
    """Each held-out scan in a few drawings."""
    documents = split(DigitDocuments(pairs=pairs), fraction)[1]
    return [documents[i] for i in range(DRAWINGS * len(documents) // VARIATIONS)]


def answers(model, processor, asked: list[Conversation], cache: str = "float", batch: int = BATCH) -> list[str]:
    tokenizer, replies = processor.tokenizer, []
    for start in range(0, len(asked), batch):
        prompts = [processor.prompt(document.messages[:1]) for document in asked[start : start + batch]]
        rows = llama4_jax.generate(
            model,
            [prompt.tokens for prompt in prompts],
            images=[prompt.tiles for prompt in prompts],
            max_new_tokens=MOST,
            stop_ids=tokenizer.stop_ids,
            cache=cache,
        )
        replies += [tokenizer.decode(row, skip_special=True) for row in rows]
    return replies


@contextlib.contextmanager
def server(run: Path, slots: int) -> Iterator[str]:
    """`llama4 serve` as a user starts it; gives the address of its API."""
    command = [sys.executable, "-m", "llama4_jax.cli", "serve", run, "--port", "0", "--slots", str(slots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            if not ready.startswith("ready: "):
                raise RuntimeError(f"the server ended with {process.wait()}")
            yield ready.rsplit(" ", 1)[1].strip().removesuffix(")")
        finally:
            process.terminate()


def served(address: str, asked: list[Conversation], clients: int) -> list[str]:
    """The server's replies; `clients` wait for one at any time."""
    import openai

    client = openai.OpenAI(base_url=address, api_key="-", max_retries=0, timeout=600)
    name = client.models.list().data[0].id

    def ask(document: Conversation) -> str:
        content = [{"type": "text", "text": part} if isinstance(part, str) else as_url(part.source)
                   for part in document.messages[0].content]  # fmt: skip
        said = [{"role": "user", "content": content}]
        reply = client.chat.completions.create(model=name, messages=said, temperature=0, max_tokens=MOST)
        return reply.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, asked))


def as_url(picture: Image.Image) -> dict:
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def draw(groups: list[list[tuple[Conversation, str]]], path: Path) -> None:
    """Pages, and under each question the model's answer: green if it is right. A group has as many pages each."""
    font, page = ImageFont.load_default(size=12), PAGE * ZOOM + 12
    lines = sum(-(-len(group) * len(_pages(group[0])) // 10) for group in groups)
    sheet = Image.new("RGB", (10 * page + 6, lines * (page + 46)), "white")
    pen, y = ImageDraw.Draw(sheet), 6
    for group in groups:
        x = 6
        for document, reply in group:
            pages, question = _pages((document, reply)), document.messages[0].content[-1]
            if x + len(pages) * page > sheet.width:
                x, y = 6, y + page + 46
            for j, picture in enumerate(pages):
                large = picture.resize((PAGE * ZOOM, PAGE * ZOOM), Image.Resampling.NEAREST)
                sheet.paste(large, (x + j * page, y))
            right = reply == document.messages[1].text
            pen.text((x, y + page - 8), question, fill="black", font=font)
            pen.text((x, y + page + 10), reply, fill="darkgreen" if right else "firebrick", font=font)
            x += len(pages) * page
        y += page + 46
    sheet.save(path, optimize=True)


def _pages(answered: tuple[Conversation, str]) -> list[Image.Image]:
    return [part.source for part in answered[0].messages[0].content[:-1]]


def is_right(document: Conversation, reply: str) -> bool:
    """The last word of a pair: first or second."""
    return reply.split()[-1:] == document.messages[1].text.split()[-1:]


QUESTIONS = ((False, "which digit is this?"), (True, "two pictures, which is larger?"))


def through_the_server(run: Path, clients: int, pages: int | None) -> None:
    fraction = from_json((run / "config.json").read_text()).data.heldout_fraction
    model = llama4_jax.from_pretrained(run, dtype="float32")
    processor = llama4_jax.Processor.from_pretrained(run)
    print(f"| question | held-out pages | right, {clients} clients of the server | right, `generate` one by one "
          "| equal replies | pages/s |\n|---|---|---|---|---|---|")  # fmt: skip
    with server(run, slots=8) as address:
        for pairs, question in QUESTIONS:
            asked = heldout(pairs, fraction)[:pages]
            began = time.perf_counter()
            replies = served(address, asked, clients)
            rate = len(asked) / (time.perf_counter() - began)
            alone = answers(model, processor, asked, batch=1)
            right = [
                np.mean([is_right(*pair) for pair in zip(asked, given, strict=True)]) for given in (replies, alone)
            ]
            equal = sum(a == b for a, b in zip(replies, alone, strict=True))
            print(f"| {question} | {len(asked)} | **{right[0]:.1%}** | {right[1]:.1%} | {equal} of {len(asked)} "
                  f"| {rate:.1f} |", flush=True)  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("drawing", type=Path, nargs="?")
    parser.add_argument(
        "--served", type=int, metavar="CLIENTS", help="ask a server instead, by as many clients at once"
    )
    parser.add_argument("--pages", type=int, help="of each question; all, if not given")
    options = parser.parse_args(arguments)
    run = options.run
    if options.served is not None:
        through_the_server(run, options.served, options.pages)
        return
    fraction = from_json((run / "config.json").read_text()).data.heldout_fraction
    model = llama4_jax.from_pretrained(run, dtype="float32")
    processor = llama4_jax.Processor.from_pretrained(run)
    drawn = []
    print("| question | held-out pages | right |\n|---|---|---|")
    for pairs, question in QUESTIONS:
        asked = heldout(pairs, fraction)[: options.pages]
        replies = answers(model, processor, asked)
        right = [is_right(document, reply) for document, reply in zip(asked, replies, strict=True)]
        print(f"| {question} | {len(asked)} | **{np.mean(right):.1%}** |")
        chosen = np.random.default_rng(0).choice(len(asked), 9, replace=False).tolist()
        wrong = [i for i, ok in enumerate(right) if not ok][:1]
        drawn.append([(asked[i], replies[i]) for i in (chosen + wrong)[:10]])
    if options.drawing is not None:
        draw(drawn, options.drawing)


if __name__ == "__main__":
    main(sys.argv[1:])
