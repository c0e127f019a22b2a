"""A process shows its supervisor that it lives, and does not outlive it. Nothing slow is imported here."""

import contextlib
import os
import pathlib
import threading
import time

EVERY = 1.0  # seconds


def beat(file: pathlib.Path) -> None:
    """A thread touches the file every second, and ends this process when its parent is not who wrote the file.

    Into the file the parent has written its process id; if the file is empty or not there, anybody may be the parent.
    """
    text = file.read_text() if file.is_file() else ""
    parent = int(text) if text else None
    file.touch()

    def run() -> None:
        while parent in (None, os.getppid()):
            with contextlib.suppress(OSError):
                os.utime(file)
            time.sleep(EVERY)
        os._exit(1)

    threading.Thread(target=run, daemon=True).start()
