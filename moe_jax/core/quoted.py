"""Values that were given, as error messages repeat them: in a line, and at most a hundred characters of each."""

import re
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

LONGEST = 100  # characters of one value
# Text in quotes that begin a word, with backslashes as repr writes them, and words, longer than that.
QUOTED = re.compile(rf"(?<!\w)(['\"])(?:(?!\1)[^\\]|\\.){{{LONGEST},}}?\1")
WORD = re.compile(rf"\S{{{LONGEST + 1},}}")


def quoted(value: Any) -> str:
    """The repr of a value, cut where it is long; of anything: deeply nested, or a number of a million digits."""
    try:
        return shortened(_REPR.repr(value))
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4300 digits
        return f"<{type(value).__name__} that is too large to print>"


def shortened(text: str) -> str:
    """A text of at most a hundred characters: its beginning and its end, and how many it had."""
    if len(text) <= LONGEST:
        return text
    mark = f"...({len(text)} characters)..."
    kept = LONGEST - len(mark)
    return text[: kept - kept // 3] + mark + text[len(text) - kept // 3 :]


def brief(message: str, given: Iterable[str] = ()) -> str:
    """A message in one line, with at most a hundred characters of each word, each text in quotes, and each text given.

    given: texts that the message may repeat without quotes, as the words of a command line.
    """
    line = " ".join(message.split())
    for text in sorted((" ".join(text.split()) for text in given), key=len, reverse=True):
        if len(text) > LONGEST:
            line = line.replace(text, shortened(text))
    return WORD.sub(_cut, QUOTED.sub(_cut, line))


def _cut(match: re.Match) -> str:
    return shortened(match[0])


_REPR = reprlib.Repr()
_REPR.maxlevel = 6
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = sys.maxsize
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = LONGEST
