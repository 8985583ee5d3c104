"""Ctrl-C at a chosen moment."""

import signal
import sys


class PressedAt:
    """Presses Ctrl-C at a line of these files' code, the number-th that is run; `came` says whether it came to that.

    `within`: counting only lines of functions of these names.
    """

    def __init__(self, number: int, *files: str, within: tuple[str, ...] = ()):
        self.number, self.files, self.within, self.came = number, files, within, False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _trace(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.endswith(self.files) or (self.within and code.co_name not in self.within):
            return None
        if event == "line":
            self.number -= 1
            if self.number == 0:
                self.came = True
                signal.raise_signal(signal.SIGINT)
        return self._trace
