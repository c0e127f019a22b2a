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
    Snapshot,
    Split,
    digest,
    fingerprint,
    held_out,
    is_held_out,
    pieces,
)
from moe_jax.data.folders import LeftOut, files_below, root_of, text_of
from moe_jax.names import printable

LONGEST = 2**16  # characters of a document


@dataclasses.dataclass(frozen=True)
class Folder:
    """The UTF-8 text files below a folder; its subfolders are the domains, and it is one itself."""

    path: str  # the folder

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the subfolders that hold text (and the folder's own name, if it does)."""
        return self.snapshot().domains

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Document]:
        """Files, long ones in pieces, without duplicates, domains mixed."""
        return self.snapshot().documents(split, directory)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of the domains and the texts."""
        return self.snapshot().key

    def snapshot(self) -> Snapshot:
        """All text, read once; what is left out is said on stderr. ValueError if there is none."""
        texts = self._texts()
        splits: dict[Split, dict[str, Document]] = {"train": {}, "held_out": {}}
        for domain, own in enumerate(texts.values()):
            apart = held_out(own)
            for key, text in own.items():
                splits["held_out" if key in apart else "train"][key] = Document(text, domain)
        key = fingerprint(f"{domain} {key}" for domain, own in texts.items() for key in sorted(own))
        return Snapshot(self, tuple(texts), {split: [d[key] for key in sorted(d)] for split, d in splits.items()}, key)

    def _texts(self) -> dict[str, dict[str, bytes]]:
        """Documents of each domain by digest; ValueError if there are none."""
        root, left_out = root_of(self, "text files"), LeftOut(self)
        found: dict[str, dict[str, bytes]] = {}  # by subfolder; "" is the folder itself
        seen, domains, kept = set[str](), dict[str, None](), 0
        for names, file in files_below(root, left_out):
            domain = names[0] if len(names) > 1 else ""
            domains[domain] = None
            text = text_of(file, names, left_out)
            kept += bool(text)
            for piece in (piece.encode() for piece in pieces(text, LONGEST)):
                if (key := digest(piece)) not in seen:
                    seen.add(key)
                    found.setdefault(domain, {})[key] = piece
        left_out.say(kept, [domain or root.name for domain in domains if domain not in found])
        if not found:
            raise ValueError(f"{self} holds no UTF-8 text file: put some there, or in subfolders")
        own = printable(root.name) + ("/" if root.name in found or not root.name else "")
        return {printable(domain) or own: texts for domain, texts in found.items()}


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
