"""The files below a folder, in a fixed order, each read once; and an account of those that are left out."""

import collections
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.names import printable

BOM = "\ufeff".encode()
WIDE = (b"\xff\xfe", b"\xfe\xff")  # the byte-order marks of UTF-16 and UTF-32
SHOWN = 5  # names of the files that are left out for one reason
GONE, LINK = "that cannot be read", "that link to a folder"
UTF16, NOT_UTF8, BINARY = "in UTF-16", "not in UTF-8", "with NUL bytes"


class LeftOut:
    """Files that give no text, by reason, and domains that have none left."""

    def __init__(self, source: Any):
        self.source = source
        self.names: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, reason: str, names: tuple[str, ...], where: str = "") -> None:
        """Notes a file, whose path below the folder has these parts."""
        self.names[reason].append(printable("/".join(names)) + where)

    def say(self, kept: int, without: Sequence[str]) -> None:
        """Prints one line to stderr, if there is anything to say.

        kept: number of files that were read. without: domains that have no text.
        """
        parts = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.names.items()]
        total = sum(map(len, self.names.values()))
        lines = [f"{total} of {total + kept} files are left out: {'; '.join(parts)}."] if parts else []
        lines += [f"No domain is left of: {_some([printable(name) for name in without])}."] if without else []
        if lines:
            print(f"{self.source}: {' '.join(lines)}", file=sys.stderr, flush=True)


def root_of(source: Any, holds: str) -> pathlib.Path:
    """The folder that a source's `path` names; FileNotFoundError if it is none. holds: what belongs there."""
    try:
        root = pathlib.Path(source.path).expanduser().resolve()
        found = root.is_dir()
    except (OSError, RuntimeError, ValueError):  # a loop of links, nobody's home, a NUL
        found = False
    if not found:
        raise FileNotFoundError(f"{source}: there is no such folder, give one of {holds}")
    return root


def files_below(root: pathlib.Path, left_out: LeftOut) -> Iterator[tuple[tuple[str, ...], os.DirEntry]]:
    """Each file, with the parts of its path below `root`; hidden files and folders are passed over."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), None)]
    while waiting:
        names, entry = waiting.pop()
        if entry is None or entry.is_dir(follow_symlinks=False):
            inner = _entries(entry.path if entry else str(root), names, left_out)
            waiting += [((*names, e.name), e) for e in reversed(inner) if not e.name.startswith(".")]
        elif entry.is_dir():
            left_out.add(LINK, names)
        else:
            yield names, entry


def file_bytes(file: os.DirEntry, names: tuple[str, ...], left_out: LeftOut) -> bytes | None:
    """The bytes of a file; None for one that is no regular file, is not ours to read, or is gone by now."""
    try:
        if file.is_file():  # a pipe would wait for ever
            with open(file.path, "rb", buffering=0) as opened:
                return opened.read()
    except (PermissionError, FileNotFoundError):
        pass
    left_out.add(GONE, names)
    return None


def text_of(file: os.DirEntry, names: tuple[str, ...], left_out: LeftOut) -> str:
    """The text in a file, without a byte-order mark; none of one that is not in UTF-8, or nothing but space."""
    data = file_bytes(file, names, left_out) or b""
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        wide, binary = data.startswith(WIDE), b"\0" in data
        left_out.add(UTF16 if wide else BINARY if binary else NOT_UTF8, names, "" if wide or binary else _at(error))
        return ""
    if "\0" in text:
        left_out.add(BINARY, names)
        return ""
    return "" if text.isspace() else text


def _entries(folder: str, names: tuple[str, ...], left_out: LeftOut) -> list[os.DirEntry]:
    """Entries of a folder by name; none of one that is not ours to read, or is gone by now."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        left_out.add(GONE, (*(names or (".",)), ""))
        return []


def _at(error: UnicodeDecodeError) -> str:
    return f" at byte {error.start:,}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
