"""A headless Chromium, told what to do over a pipe in its DevTools protocol: no driver, no package."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Chromium reads from 3, and writes to 4.
_PLACE_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 64) for pipe in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `run` gives what a JavaScript expression gives, after its promise if it is one."""

    def __init__(self, directory, *, width=1000, height=760):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [
            PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={directory}", f"--window-size={width},{height}",
        ]  # fmt: skip

        # Not by preexec_fn, which may hang in a process that has threads.
        placed = [sys.executable, "-S", "-E", "-c", _PLACE_PIPES, str(to_browser), str(from_browser), *command]
        self._process = subprocess.Popen(
            placed, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ids, self._rest, self._session = itertools.count(1), b"", None
        self.console = []  # messages, and errors that nobody caught
        (target, *_) = [one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.urls = []

    def ask(self, method, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == number:
                assert "error" not in said, (method, said)
                return said["result"]

    def _next(self, seconds=30):
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium says nothing"
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        said = json.loads(message)
        if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.console.append(said["params"])
        if said.get("method") == "Network.requestWillBeSent":
            self.urls.append(said["params"]["request"]["url"])
        return said

    def run(self, expression):
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression, seconds=15):
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, (expression, self.run("document.body.innerText"), self.console)
            time.sleep(0.02)

    def open(self, url):
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def type(self, text):
        self.ask("Input.insertText", text=text)

    def press(self, key, *, shift=False):
        codes = {"Enter": 13, "Tab": 9, "Escape": 27}
        how = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **how, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **how)

    def look(self, *, width, height, scheme, mobile=False):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.ask("Browser.close")
        for pipe in (self._write, self._read):
            os.close(pipe)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
