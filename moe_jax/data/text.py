"""Text of one's own: a folder of files, or any text data set of TensorFlow Datasets."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data import records
from moe_jax.data.documents import (
    Document,
    Split,
    decoded,
    digest,
    fingerprint,
    held_out,
    is_held_out,
    pieces,
)

LONGEST = 2**16  # characters of a document


@dataclasses.dataclass(frozen=True)
class Folder:
    """The UTF-8 text files below a folder; its subfolders are the domains, and it is one itself."""

    path: str  # the folder

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the subfolders that hold text (and the folder's own name, if it does)."""
        return tuple(self._texts())

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Document]:
        """Files, long ones in pieces, without duplicates, domains mixed."""
        chosen: dict[str, Document] = {}
        for domain, texts in enumerate(self._texts().values()):
            kept = held_out(texts) if split == "held_out" else set(texts) - held_out(texts)
            chosen |= {key: Document(texts[key], domain) for key in kept}
        for key in sorted(chosen):
            yield chosen[key]

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of the domains and the texts."""
        return fingerprint(f"{domain} {key}" for domain, texts in self._texts().items() for key in sorted(texts))

    def _texts(self) -> dict[str, dict[str, bytes]]:
        """Documents of each domain by digest; ValueError if there are none."""
        root = pathlib.Path(self.path).expanduser().resolve()
        if not root.is_dir():
            raise FileNotFoundError(f"Folder(path={self.path!r}): there is no such folder, give one of text files")
        found: dict[str, dict[str, bytes]] = {}
        seen: set[str] = set()
        for path in sorted(root.rglob("*")):
            names = path.relative_to(root).parts
            if any(name.startswith(".") for name in names) or not path.is_file():
                continue
            domain = names[0] if len(names) > 1 else root.name
            texts = [piece.encode() for piece in pieces(decoded(path.read_bytes()) or "", LONGEST)]
            new = {digest(text): text for text in texts if digest(text) not in seen}
            if new:
                seen |= set(new)
                found.setdefault(domain, {}).update(new)
        if not found:
            raise ValueError(f"Folder(path={self.path!r}) holds no UTF-8 text file: put some there, or in subfolders")
        return found


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A data set of TensorFlow Datasets, by name: one domain, its feature `text`, its split `held_out`."""

    name: str  # of the data set, as TensorFlow Datasets has it
    text: str = "text"
    held_out: str = "validation"  # where there is no such split, documents of `train` are chosen by digest
    data_dir: str | None = None  # of TFDS; None is its own default

    @property
    def domains(self) -> tuple[str, ...]:
        return (self.name,)

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Document]:
        """The examples that have text, in the order of the data set."""
        return itertools.chain.from_iterable(self.parts(split))

    def parts(self, split: Split) -> list[records.RecordRange]:
        """The same documents in parts, each of which any process can read."""
        return records.parts(self, split)

    def read(self, examples: Iterable[Mapping[str, Any]], chosen: Split | None) -> Iterator[Document]:
        """The documents of some records; `chosen`: only those whose digest is of this split."""
        for text in (example[self.text] for example in examples):
            if text and (chosen is None or is_held_out(digest(text)) == (chosen == "held_out")):
                yield Document(text, 0)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of what TFDS knows about the data set: version, features, and the size of every shard."""
        return fingerprint(records.tfds_facts(self, self.found()))

    def found(self) -> tfds.core.DatasetBuilder:
        """The prepared data set; ValueError if it has no such text."""
        builder = records.builder(self)
        features = builder.info.features
        if self.text not in features or not isinstance(features[self.text], tfds.features.Text):
            raise ValueError(f"{self} has the features {sorted(features)}: set text to one that holds text")
        return builder
