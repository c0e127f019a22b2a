"""The end of a forked process."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave(work: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code that `work` returns, 3 where it raises; runs nothing of its parent's."""
    code = 3
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
