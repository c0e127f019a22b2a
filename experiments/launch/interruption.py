"""SIGINT and SIGTERM to a program that trains: the first is heard at the end of a step, the second ends it at once.

Ctrl-C and a pre-emption of the machine lose no step then. Python runs a signal's handler in the main thread alone,
which may be in a compilation for minutes; so a thread of its own hears the signals, by the file that Python writes
them to.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from experiments.launch import join

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AHEAD = 3  # steps: when a process asks, another one may have begun the next step, and sees it in the one after that


class Interrupted(KeyboardInterrupt):
    """End of a program by a signal. words: what is said about it. together: all processes end at the same step."""

    def __init__(self, number: int, words: str, together: bool = False):
        super().__init__(words)
        self.code, self.together = 128 + number, together


class Interruption:
    """Hears signals as a context manager; called after a step with its number, says whether to stop there.

    Several processes stop at the same step, whichever of them was signalled. A signal before the first step raises
    Interrupted. At the second signal the process is ended, with the last words that `leaving` gives. In threads
    other than the main one nothing is heard.
    """

    def __init__(self, leaving: Callable[[], str]):
        self.leaving = leaving
        self.heard: int | None = None  # the number of the signal that this process has got
        self._training = self._proposed = False

    def __call__(self, step: int) -> bool:
        self._training = True
        if not join.connected():
            return self.heard is not None
        if self.heard is not None and not self._proposed:
            join.propose("stop", str(step + AHEAD))
            self._proposed = True
        agreed = join.proposed("stop")
        return agreed is not None and step >= int(agreed)

    def __enter__(self) -> "Interruption":
        self._heard_here = threading.current_thread() is threading.main_thread()
        if self._heard_here:
            ear, mouth = os.pipe()
            os.set_blocking(mouth, False)
            self._pipe = ear, mouth
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._fd_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(ear,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        if not self._heard_here:
            return
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's
        os.write(self._pipe[1], b"\0")  # ends the thread, which closes the other end
        os.close(self._pipe[1])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, when it comes to it."""
        if not self._training:
            raise Interrupted(number, f"{name(number)} before the first step; {self.leaving()}")

    def _listen(self, ear: int) -> None:
        while (number := os.read(ear, 1)) not in (b"", b"\0"):
            if number[0] in SIGNALS:
                self._hear(number[0])
        os.close(ear)

    def _hear(self, number: int) -> None:
        if self.heard is None:
            self.heard = number
            if self._training:
                say(f"{name(number)}: finishing this step and saving it; a second signal leaves at once")
            return
        say(f"{name(number)} again, leaving at once; {self.leaving()}")
        os._exit(128 + number)


def name(number: int) -> str:
    """SIGINT, say."""
    return signal.Signals(number).name


def say(words: str) -> None:
    print(f"\n{words}", file=sys.stderr, flush=True)
