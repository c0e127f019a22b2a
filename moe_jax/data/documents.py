"""Documents with a domain, which every source of text gives, split by content into train and held-out."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

Split = Literal["train", "held_out"]
HELD_OUT = 0.05  # share of the documents


class Document(NamedTuple):
    """UTF-8 text, and the number of its domain in `source.domains`."""

    text: bytes
    domain: int


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that names some text; `directory` is where it may keep what it makes of it."""

    if TYPE_CHECKING:  # at run time an isinstance would read a whole folder for its domains

        @property
        def domains(self) -> tuple[str, ...]: ...

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Document]: ...

    def fingerprint(self, directory: pathlib.Path) -> str: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Snapshot:
    """Documents (or pairs) of a source whose files have been read, once: what changes on disk later does not matter."""

    source: Any
    domains: tuple[str, ...]
    splits: Mapping[Split, Sequence[Any]]
    key: str  # the fingerprint

    def __repr__(self) -> str:
        return repr(self.source)

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Any]:
        """The documents of a split, in their order."""
        return iter(self.splits[split])

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Any]:
        """The pairs of a split, in their order."""
        return iter(self.splits[split])

    def fingerprint(self, directory: pathlib.Path) -> str:
        """The fingerprint of what was read."""
        return self.key


def read_once(source: Any) -> Any:
    """The source as it is now: of one that reads files of the user's (`snapshot`), all text; any other as it is."""
    return source.snapshot() if hasattr(source, "snapshot") else source


def decoded(data: bytes) -> str | None:
    """The text in `data`, or None for what is not text: not UTF-8, NUL bytes, nothing but space."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() and "\0" not in text else None


def pieces(text: str, limit: int) -> Iterator[str]:
    """Cuts `text` after the last line that ends within `limit` characters, again and again."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def digest(text: bytes) -> str:
    """The sha256 that decides a document's split."""
    return hashlib.sha256(text).hexdigest()


def is_held_out(digest: str) -> bool:
    """Tells whether a document of this digest is held out; nothing else in the data set matters."""
    return int(digest[:8], 16) < HELD_OUT * 2**32


def held_out(digests: Collection[str]) -> set[str]:
    """The held-out documents of one domain: chosen by digest; neither none nor all of two or more."""
    if len(set(digests)) < 2:
        return set()
    chosen = {digest for digest in digests if is_held_out(digest)}
    return (chosen or {min(digests)}) - {max(digests)}  # the last is chosen only if all are


def fingerprint(parts: Iterable[str]) -> str:
    """One sha256 over strings, in order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part.encode())
    return total.hexdigest()
