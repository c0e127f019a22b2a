"""Atomic writes: a file has its new content or the old one; and JSON files that hold their own checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"  # the key of a sealed file's own checksum


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes a file atomically, text as UTF-8. An interruption or a full disk leaves the old content."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        return unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def parse_json(data: str | bytes) -> Any:
    """The value that JSON writes; ValueError for what is none, and for what is nested too deeply to be read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON object that holds its own SHA-256 digest; ValueError if its key is taken."""
    if SEAL in content:
        raise ValueError(f"{path} cannot be sealed: its content has a key {SEAL!r} already; give that another name.")
    return write_file(path, json.dumps({**content, SEAL: _seal(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote; ValueError where the file has been changed, OSError without a file."""
    data = path.read_bytes()
    try:
        content = parse_json(data)
        intact = content.pop(SEAL) == _seal(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: it does not match its checksum; make it again, or take a copy.")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
