"""Names as people give them (of files, folders, domains, runs), fit to be shown and written everywhere."""

import unicodedata

BROKEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are not UTF-8, and ends of lines
OF_NO_FILE = "\\\ufffe\uffff"  # begins an escape; no XML file may hold the others


def printable(name: str) -> str:
    r"""Writes a name in characters that every file, page and terminal takes: `caf\udce9` for a byte that is not UTF-8.

    Two different names stay different: a backslash is doubled.
    """
    return "".join(c.encode("unicode_escape").decode() if _breaks(c) else c for c in name)


def without_middle(name: str, most: int) -> str:
    """Cuts the middle out of a name of more than `most` characters; its beginning and its end tell it from others."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[-end:]}"


def _breaks(character: str) -> bool:
    return character in OF_NO_FILE or unicodedata.category(character) in BROKEN
