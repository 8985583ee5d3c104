"""How well a model reads: the held-out pages of `configs/tiny_vision.py`, asked about as a user would.

    python train.py tiny_vision
    python benchmarks/digits.py runs/tiny_vision [docs/digits.png]

Replies are greedy. No scan on these pages was trained on, in any drawing. With a second argument, draws some pages and
what the model answers.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import llama4_jax
from llama4_jax.config import from_json
from llama4_jax.data.digits import PAGE, VARIATIONS, DigitDocuments
from llama4_jax.data.documents import Conversation, split

DRAWINGS = 3  # of each held-out scan
BATCH = 32
ZOOM = 3


def heldout(pairs: bool, fraction: float) -> list[Conversation]:
    """Each held-out scan in a few drawings."""
    documents = split(DigitDocuments(pairs=pairs), fraction)[1]
    return [documents[i] for i in range(DRAWINGS * len(documents) // VARIATIONS)]


def answers(model, processor, asked: list[Conversation], cache: str = "float") -> list[str]:
    tokenizer, replies = processor.tokenizer, []
    for start in range(0, len(asked), BATCH):
        prompts = [processor.prompt(document.messages[:1]) for document in asked[start : start + BATCH]]
        rows = llama4_jax.generate(
            model,
            [prompt.tokens for prompt in prompts],
            images=[prompt.tiles for prompt in prompts],
            max_new_tokens=32,
            stop_ids=tokenizer.stop_ids,
            cache=cache,
        )
        replies += [tokenizer.decode(row, skip_special=True) for row in rows]
    return replies


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


def main(arguments: list[str]) -> None:
    run = Path(arguments[0])
    fraction = from_json((run / "config.json").read_text()).data.heldout_fraction
    model = llama4_jax.from_pretrained(run, dtype="float32")
    processor = llama4_jax.Processor.from_pretrained(run)
    drawn = []
    print("| question | held-out pages | right |\n|---|---|---|")
    for pairs, question in ((False, "which digit is this?"), (True, "two pictures, which is larger?")):
        asked = heldout(pairs, fraction)
        replies = answers(model, processor, asked)
        # Of a pair, the last word: first or second.
        right = [a.split()[-1:] == d.messages[1].text.split()[-1:] for a, d in zip(replies, asked, strict=True)]
        print(f"| {question} | {len(asked)} | **{np.mean(right):.1%}** |")
        chosen = np.random.default_rng(0).choice(len(asked), 9, replace=False).tolist()
        wrong = [i for i, ok in enumerate(right) if not ok][:1]
        drawn.append([(asked[i], replies[i]) for i in (chosen + wrong)[:10]])
    if len(arguments) > 1:
        draw(drawn, Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
