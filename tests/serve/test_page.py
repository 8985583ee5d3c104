"""The page, in a real browser: what a person does with it works, and it does nothing else."""

import base64
import contextlib
import io
import json
import os
import pathlib

import chromium
import pytest
from micro_run import picture_processor
from PIL import Image
from serving import serving, wait_until

from llama4_jax.serve.app import _read_page

DRAW = os.environ.get("LLAMA4_DRAW_PAGE")  # a path: the screenshot for docs is written there
HOSTILE = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script> &amp; **bold**'


def last(kind="article:last-of-type"):
    return f"document.querySelector('#log > {kind}')"


def picture():
    file = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_page_is_one_file_that_asks_nobody_else():
    page, headers = _read_page()
    text = page.decode()
    assert "innerHTML" not in text and "http://" not in text and "https://" not in text and "eval(" not in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


@pytest.mark.skipif(chromium.PATH is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_person_talks_with_the_model(tmp_path):
    """One start of the browser for all of it: that takes most of the time."""

    def script(handle):
        said = tokenizer.decode(handle.prompt)
        if "weather" in said and "ipython" not in said:
            return '[weather(city="Zürich")]'
        if "ipython" in said:
            return "It is " + said.rpartition("ipython")[2].split("\n\n")[1].partition("<|")[0]
        if "long" in said:
            return "and on " * 4000
        return HOSTILE if "hostile" in said else "Scout is a mixture of 16 experts, and reads pictures too."

    processor = picture_processor()
    tokenizer = processor.tokenizer
    with serving(processor=processor, script=script, delay=0.005) as found, contextlib.ExitStack() as stack:
        page = chromium.Page(tmp_path / "profile")
        stack.callback(page.close)
        page.open(f"http://127.0.0.1:{found.port}/")
        page.wait_for("document.getElementById('model').textContent === 'tiny'")
        assert page.run("document.activeElement.id") == "text"

        # A message, by keyboard: Shift and Enter begin a line, Enter sends. The reply comes bit by bit.
        page.type("What is Scout?")
        page.press("Enter", shift=True)
        page.type("In a line.")
        assert page.run("document.getElementById('text').value") == "What is Scout?\nIn a line."
        page.run(
            "window.lengths = []; new MutationObserver(() => window.lengths.push("
            "document.querySelector('.assistant .text')?.textContent.length))"
            ".observe(document.getElementById('log'), {subtree: true, childList: true})"
        )
        page.press("Enter")
        page.wait_for(f"{last()}.querySelector('.figures')?.textContent.includes('tokens/s')")
        assert page.run(f"{last()}.querySelector('.text').textContent").startswith("Scout is a mixture")
        assert len(set(page.run("window.lengths"))) > 5
        assert page.run("document.activeElement.id") == "text" and page.run("document.getElementById('stop').hidden")
        assert found.engine.requests[-1].asked["temperature"] == 0.7

        # What the model writes is text, whatever it spells.
        page.type("hostile")
        page.press("Enter")
        page.wait_for(f"{last()}.querySelector('.figures')?.textContent.includes('tokens')")
        assert page.run(f"{last()}.querySelector('.text').textContent") == HOSTILE
        assert page.run("window.harmed === undefined && !document.querySelector('#log img, #log script')")

        # A long reply is stopped, and its slot is free.
        page.type("long")
        page.press("Enter")
        page.wait_for(f"{last()}.querySelector('.text').textContent.length > 20")
        page.run("document.getElementById('stop').click()")
        page.wait_for(f"{last()}.querySelector('.figures')?.textContent === 'stopped'")
        assert wait_until(found.idle) and found.engine.requests[-1].finish_reason == "cancelled"

        # A conversation, a system prompt, a picture that is dropped, and a tool.
        page.run("document.getElementById('new').click()")
        page.run("document.getElementById('options').click()")
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        page.run(f"document.getElementById('tools').value = {json.dumps(json.dumps(tools))}")
        page.run("document.getElementById('system').value = 'Be brief.'; document.getElementById('seed').value = 5")
        page.run("document.getElementById('options').click()")
        page.run(
            "(() => {"
            f"const bytes = Uint8Array.from(atob('{picture()}'), (c) => c.charCodeAt(0));"
            "const data = new DataTransfer(); data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));"
            "document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})) })()"
        )
        page.wait_for("document.querySelectorAll('#pictures img').length === 1")
        page.type("What is the weather there?")
        page.press("Enter")
        page.wait_for(f"{last()}.querySelector('.call textarea')")
        assert "weather" in page.run(f"{last()}.querySelector('.call').textContent")
        asked = found.engine.requests[-1]
        assert "Be brief." in tokenizer.decode(asked.prompt) and asked.asked["seed"] == 5
        assert (asked.asked["tiles"] == [255, 0, 0]).all()
        page.wait_for("document.activeElement.closest('.call') !== null")
        page.type("sunny, 24 degrees.")
        page.run(f"{last()}.querySelector('form button').click()")
        page.wait_for(f"{last()}.querySelector('.text').textContent === 'It is sunny, 24 degrees.'")
        page.wait_for(f"{last()}.querySelector('.figures')")

        # On a phone nothing is wider than the screen; in the dark it is dark. Every control has a name.
        for scheme, dark in (("light", False), ("dark", True)):
            page.look(width=360, height=640, scheme=scheme, mobile=True)
            page.wait_for("innerWidth === 360")
            assert page.run("document.documentElement.scrollWidth") <= 360
            channels = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert (sum(channels) < 150) == dark
        page.run("document.getElementById('options').click()")
        assert page.run("document.documentElement.scrollWidth") <= 360
        unnamed = (
            "[...document.querySelectorAll('button, input, textarea')].filter((e) => !e.hidden && "
            "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
        )
        assert page.run(unnamed) == []
        page.run("document.getElementById('options').click()")
        # Nobody else was asked, and nothing was refused but what this test tried.
        assert {url.partition("://")[2].partition("/")[0] for url in page.urls if url.startswith(("http", "ws"))} == {
            f"127.0.0.1:{found.port}"
        }
        thrown = [one for one in page.console if "exceptionDetails" in one]
        assert not thrown, thrown
        if DRAW:
            page.look(width=900, height=640, scheme="light")
            page.screenshot(pathlib.Path(DRAW))
