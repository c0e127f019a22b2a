"""Folders on disk that are either whole or absent, and whose files are checked before they are believed."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from moe_jax.files import parse_json, sha256
from moe_jax.names import printable

MANIFEST = "manifest.json"
ELSEWHERE = "choose another place, by --data_dir or the environment variable MOE_JAX_DATA."


def default_directory() -> pathlib.Path:
    """Folder of prepared data: $MOE_JAX_DATA, or ~/.cache/moe_jax. ValueError where nobody's home is known."""
    if given := os.environ.get("MOE_JAX_DATA"):
        return pathlib.Path(given)
    try:
        return pathlib.Path.home() / ".cache" / "moe_jax"
    except RuntimeError:
        raise ValueError(f"There is no home to keep prepared data in; {ELSEWHERE}") from None


def make_directory(directory: pathlib.Path) -> None:
    """Makes a folder for prepared data, unless it is there; ValueError where it cannot be made."""
    try:
        str(directory).encode()  # libraries that write data sets need it
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeEncodeError) as error:
        raise _unusable(directory, error) from None


def ensure(folder: pathlib.Path, make: Callable[[pathlib.Path], dict[str, Any]]) -> None:
    """Makes `folder` unless it is there: `make` fills an empty folder and returns facts for its manifest."""
    if (folder / MANIFEST).exists():
        return
    make_directory(folder.parent)
    try:
        unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unusable(folder.parent, error) from None
    try:
        facts = make(unfinished)
        manifest = {
            "facts": facts,
            "sha256": {name: sha256(unfinished / name) for name in _files(unfinished)},
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _move(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a folder made by `ensure`; ValueError if any file is not as it was written."""
    manifest = read_manifest(folder)
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            raise _damaged(path, folder)
    return manifest["facts"]


def manifest_facts(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a folder made by `ensure`, without reading its other files."""
    return read_manifest(folder)["facts"]


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        return {"facts": manifest["facts"], "sha256": manifest["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder / MANIFEST, folder) from None


def _move(unfinished: pathlib.Path, folder: pathlib.Path) -> None:
    # Renaming onto a full folder fails: then another process was faster, and its work is as good.
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{folder} is not empty and has no {MANIFEST}: delete it, and it is made anew") from None


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _unusable(folder: pathlib.Path, error: OSError | UnicodeEncodeError) -> ValueError:
    if isinstance(error, UnicodeEncodeError):
        reason = "its name is not UTF-8"
    else:
        taken = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in its place" if taken else str(error.strerror)
    return ValueError(f"Prepared data cannot be kept in {printable(str(folder))} ({reason}); {ELSEWHERE}")


def _damaged(path: pathlib.Path, folder: pathlib.Path) -> ValueError:
    return ValueError(f"{path} is damaged or missing: delete the folder {folder}, and it is made anew")
