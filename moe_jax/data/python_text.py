"""The text that is on every machine: the running Python's standard library and its installed packages."""

import ast
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.data.documents import decoded, fingerprint, pieces

DOMAINS = ("prose", "stdlib", "library", "tests", "c", "stubs", "tables", "cython")
SUFFIXES = {
    **dict.fromkeys((".md", ".rst"), "prose"),
    **dict.fromkeys((".c", ".cc", ".cpp", ".h", ".hpp"), "c"),
    **dict.fromkeys((".csv", ".tsv", ".dat", ".afm"), "tables"),
    **dict.fromkeys((".pyx", ".pxd", ".pxi"), "cython"),
    ".pyi": "stubs",
}
LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")
# Copies of other packages would put held-out text into the training split; checksums are noise.
SKIPPED = {"_vendor", "_vendored", "vendor", "vendored", "externals", "third_party", "url_checksums"}
SKIPPED |= {"__pycache__", "site-packages", "dist-packages", "lib-dynload"}
SHORTEST, LONGEST = 128, 2**16  # characters of a document
# Ourselves, and what is here for other data than text: the corpus stays what figures have been measured on.
LEFT_OUT = {"moe_jax", "scikit_learn", "joblib", "threadpoolctl", "narwhals"}
FEWEST = 16  # documents that a domain should be able to hold
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SAME_END = 300  # characters: licences differ in the copyright line on top, not at the end


class Text(NamedTuple):
    """A document of the embedded corpus; `name` is the file it was taken from."""

    name: str
    domain: str
    text: str


def texts(domain: str, megabytes: float) -> Iterator[Text]:
    """Documents of one domain, a fair mix of its packages, without duplicates, at most `megabytes` in all."""
    left = int(megabytes * 1e6)
    longest = min(LONGEST, left // FEWEST)
    seen = set()
    for name, path in files()[domain]:
        text = next(pieces(read_text(name, path, domain) or "", longest), "")
        end = re.sub(r"\s+", " ", text).strip()[-SAME_END:]
        if len(text) < SHORTEST or end in seen:
            continue
        seen.add(end)
        left -= len(text.encode())
        if left < 0:
            return
        yield Text(name, domain, text)


@functools.cache
def files() -> dict[str, list[tuple[str, str]]]:
    """Names and paths of each domain's files, by a hash of their names: no package comes first."""
    found: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
    names = {**dict(standard_library()), **dict(installed_packages())}
    for name in sorted(names, key=_hash):
        for domain in domains_of(pathlib.PurePosixPath(name)):
            found[domain].append((name, names[name]))
    return found


def standard_library() -> Iterator[tuple[str, str]]:
    root = sysconfig.get_path("stdlib")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        for name in names:
            path = os.path.join(folder, name)
            yield f"stdlib/{pathlib.PurePath(os.path.relpath(path, root)).as_posix()}", path


def installed_packages() -> Iterator[tuple[str, str]]:
    """Files that the packages list themselves, so nothing that was made or left in the environment later."""
    for distribution in distributions():
        root = str(distribution.locate_file(""))
        for name in map(str, distribution.files or ()):
            if not name.startswith("..") and "__editable__" not in name:
                yield f"packages/{name}", os.path.join(root, name)


def distributions() -> list[importlib.metadata.Distribution]:
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    found = importlib.metadata.distributions(path=folders)
    return [distribution for distribution in found if (distribution.name or "").replace("-", "_") not in LEFT_OUT]


def environment() -> str:
    """A short name of what the corpus depends on: the version of Python and of every package."""
    packages = sorted(f"{distribution.name}=={distribution.version}" for distribution in distributions())
    return f"py{sys.version.split()[0]}-{sys.platform}-{fingerprint(packages)[:8]}"


def domains_of(path: pathlib.PurePosixPath) -> tuple[str, ...]:
    """The domains that a file may belong to, going by its name; a file has text for one domain only."""
    if SKIPPED.intersection(path.parts) or path.name.startswith("_sysconfigdata"):
        return ()
    if path.suffix == ".py":
        return (_domain_of_python(path),)
    if path.name == "METADATA" or path.name.startswith(LICENCES):
        return ("prose",)
    if any(part.endswith(".dist-info") or part.startswith("config-") for part in path.parts):
        return ()
    if path.suffix == ".txt":
        return ("prose", "tables")
    return (SUFFIXES[path.suffix],) if path.suffix in SUFFIXES else ()


def _domain_of_python(path: pathlib.PurePosixPath) -> str:
    in_tests = not {"test", "tests"}.isdisjoint(path.parts)
    if in_tests or path.name.startswith("test_") or path.stem.endswith("_test"):
        return "tests"
    if _hash(str(path)) < "4":  # one file in four gives its docstrings and not its code
        return "prose"
    return "stdlib" if path.parts[0] == "stdlib" else "library"


def read_text(name: str, path: str, domain: str) -> str | None:
    """Text that a file holds for a domain; None if there is none."""
    try:
        text = decoded(pathlib.Path(path).read_bytes())
    except OSError:
        return None
    if text is None or "Generated by Cython" in text[:200]:
        return None
    if name.endswith(".txt") and domain != _domain_of_txt(text):
        return None
    return docstrings(text) if domain == "prose" and name.endswith(".py") else text


def _domain_of_txt(text: str) -> str | None:
    """Numbers make a table, lines of several words make prose; anything else (lists of names) is neither."""
    head = text[:20_000]
    if sum(map(str.isdigit, head)) > 0.3 * len(head):
        return "tables"
    return "prose" if len(head.split()) > 5 * len(head.splitlines()) else None


def docstrings(source: str) -> str | None:
    """The docstrings of a Python file, one after another."""
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return None
    found = (ast.get_docstring(node) for node in _documented(tree))
    return "\n\n".join(text for text in found if text) + "\n"


def _documented(node: ast.Module | Definition) -> Iterator[ast.Module | Definition]:
    """A module, class or function, and those right inside it."""
    yield node
    for child in node.body:
        if isinstance(child, Definition):
            yield from _documented(child)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
