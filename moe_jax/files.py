"""Atomic writes: a file has its new content or the old one; and JSON files that hold their own checksum."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"  # the key of a sealed file's own checksum
UNFINISHED = re.compile(r"(.+)\.\d+\.part")  # name of a file, process
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("no space left on device", "disk quota exceeded")  # of libraries that keep no error number


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes a file atomically, text as UTF-8. An interruption or a full disk leaves the old content.

    Where `path` is a symbolic link, the file that it leads to is written, and the link stays.
    """
    target = path.resolve() if path.is_symlink() else path
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):  # it was never made, as on a read-only disk
            unfinished.unlink()
        raise
    return path


def unfinished_of(path: Path) -> str | None:
    """Name of the file that `write_file` was to write through this one; None for any other file."""
    found = UNFINISHED.fullmatch(path.name)
    return found and found[1]


def is_disk_full(error: BaseException | None) -> bool:
    """Tells whether an error, or what has caused it, is a disk or a quota without room."""
    for cause in _causes(error):
        words = str(cause).lower()
        if getattr(cause, "errno", None) in FULL or any(full in words for full in FULL_WORDS):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text; ValueError for anything else, however deep its brackets are."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the brackets are too deep") from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON object that holds its own SHA-256 digest; ValueError if its key is taken."""
    if SEAL in content:
        raise ValueError(f"{path} cannot be sealed: its content has a key {SEAL!r} already; give that another name.")
    return write_file(path, json.dumps({**content, SEAL: json_digest(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote; ValueError where the file has been changed, OSError without a file."""
    data = path.read_bytes()
    with contextlib.suppress(ValueError):
        content = parse_json(data)
        if isinstance(content, dict) and content.pop(SEAL, None) == json_digest(content):
            return content
    raise ValueError(f"{path} is damaged: it does not match its checksum; make it again, or take a copy.")


def json_digest(value: Any) -> str:
    """SHA-256 digest of a value as JSON with sorted keys, in hexadecimal; ValueError where it is nested too deeply."""
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("the brackets are too deep") from None
