"""The manifest of a checkpoint's step: the files it should have, with their checksums, and what they hold.

    {"step": 20, "loss": 1.5, "meta": {...}, "leaves": {name: [shape, dtype]}, "files": {path: [bytes, sha256]}}

A step is who its manifest says: a folder of another name, a copy for instance, is none.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from moe_jax.files import read_sealed, sha256, write_sealed

MANIFEST = "manifest.json"
STATE = "state"  # the folder of the arrays, beside the manifest
LAST_STEP = 2**31 - 1  # of a counter in int32


def step_number(name: str) -> int | None:
    """The step that a folder of this name should hold, None for any other name ("007", "20.orbax-checkpoint-tmp")."""
    if not (name.isascii() and name.isdecimal()) or str(step := int(name)) != name:
        return None
    return step if step <= LAST_STEP else None


def present_steps(directory: Path) -> list[int]:
    """Steps that a directory of checkpoints has a folder of, valid or not, oldest first."""
    if not directory.is_dir():
        return []
    found = [step_number(path.name) for path in directory.iterdir()]
    return sorted(step for step in found if step is not None)


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a finished step: `facts` (step, loss, meta, leaves), and its files as they are now."""
    files = sorted(path for path in (directory / STATE).rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256, files))
    sums = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(files, hashes, strict=True)
    }
    write_sealed(directory / MANIFEST, {**facts, "files": sums})


def read_step(directory: Path) -> dict[str, Any]:
    """The manifest of a step's folder; ValueError says in a few words what is wrong with it."""
    if directory.exists() and not directory.is_dir():
        raise ValueError("it is a file, not a folder")
    try:
        found = read_sealed(directory / MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing, so the save was not finished") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{MANIFEST} is damaged") from None
    if not _is_manifest(found):
        raise ValueError(f"{MANIFEST} lacks what a manifest says")
    if directory.name != str(found["step"]):
        raise ValueError(f"{MANIFEST} is that of step {found['step']}")
    return found


def step_problem(directory: Path, hashes: bool = True) -> str | None:
    """Describes what is wrong with a step's files; None where they are what the manifest says."""
    try:
        files = read_step(directory)["files"]
        for name, (size, _) in files.items():
            _check_size(directory / name, name, size)
    except ValueError as problem:
        return str(problem)
    if not hashes:
        return None
    try:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(sha256, [directory / name for name in files]))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    wrong = [name for name, digest in zip(files, found, strict=True) if digest != files[name][1]]
    return f"the bytes of {wrong[0]} do not match its checksum" if wrong else None


def step_bytes(directory: Path) -> int:
    """Bytes of a step's files; ValueError without a manifest."""
    return sum(size for size, _ in read_step(directory)["files"].values())


def _check_size(path: Path, name: str, size: int) -> None:
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):  # or process 0 deletes the step at this moment
        raise ValueError(f"{name} is missing") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    if not path.is_file():
        raise ValueError(f"{name} is no file")
    if found != size:
        raise ValueError(f"{name} has {found} bytes instead of {size}")


def _is_manifest(found: Mapping[str, Any]) -> bool:
    """Tells whether there is everything that is read of a manifest, of the right types."""
    kinds = {"step": int, "meta": dict, "leaves": dict, "files": dict}
    return (
        all(isinstance(found.get(name), kind) for name, kind in kinds.items())
        and isinstance(found.get("loss"), int | float | None)
        and all(_is_leaf(leaf) for leaf in found["leaves"].values())
        and all(_is_inside(name) and _is_sum(sum_) for name, sum_ in found["files"].items())
    )


def _is_leaf(leaf: Any) -> bool:
    """Tells whether this is [shape, dtype]."""
    return isinstance(leaf, list) and len(leaf) == 2 and isinstance(leaf[0], list) and isinstance(leaf[1], str)


def _is_sum(sum_: Any) -> bool:
    """Tells whether this is [bytes, digest]."""
    return isinstance(sum_, list) and len(sum_) == 2 and isinstance(sum_[0], int) and isinstance(sum_[1], str)


def _is_inside(name: str) -> bool:
    """Tells whether a file's name leads to a place in the step's own folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
