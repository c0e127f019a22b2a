"""The embedded corpus: text in eight domains that needs no network, a TFDS data set without TensorFlow."""

import contextlib
import dataclasses
import io
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import tensorflow_datasets as tfds

from moe_jax.core.ranges import Range, check_ranges
from moe_jax.data import cache, python_text
from moe_jax.data.documents import Document, Split, digest, fingerprint, held_out

SPLITS: tuple[Split, ...] = ("train", "held_out")
VERSION = "1.0.0"  # raise it when the same environment gives other documents


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text of the running Python's library and packages, at most `megabytes` (1e6 bytes) in each domain."""

    megabytes: Annotated[float, Range(0.02, 1000)] = 2.0
    domains: ClassVar[tuple[str, ...]] = python_text.DOMAINS

    def __post_init__(self):
        check_ranges(self)

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Document]:
        """The documents of a split, domains mixed; ValueError if they are not those that were written."""
        folder = self.prepared(directory)
        expected = cache.read_facts(folder)[split]
        records = list(_records(folder, split))
        if len(records) != expected["records"] or _fingerprint(records) != expected["sha256"]:
            raise ValueError(f"{folder} does not read back as it was written: delete it, and it is made anew")
        for record in records:
            yield Document(record["text"], int(record["domain"]))

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of all decoded records, which depends on the versions of Python and of the packages."""
        return cache.manifest_facts(self.prepared(directory))["fingerprint"]

    def prepared(self, directory: pathlib.Path) -> pathlib.Path:
        """The folder of the corpus of this very environment, built if it is not there (about 10 s)."""
        name = f"{python_text.environment()}-{self.megabytes:g}MB-v{VERSION}"
        folder = directory / "corpus" / name
        cache.ensure(folder, self._build)
        return folder

    def _build(self, folder: pathlib.Path) -> dict[str, Any]:
        start = time.monotonic()
        _say("building the embedded corpus from this Python's library and packages (once, about 10 s) ...")
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS has its own words for this, less true ones
            EmbeddedCorpus(self.megabytes, data_dir=folder).download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        tfds.enable_progress_bar()
        facts: dict[str, Any] = {split: _facts(folder, split) for split in SPLITS}
        total = fingerprint([facts[split]["sha256"] for split in SPLITS])
        size = sum(facts[split]["bytes"] for split in SPLITS) / 1e6
        _say(f"embedded corpus: {size:.1f} MB in {time.monotonic() - start:.0f} s, fingerprint {total[:16]}")
        return {**facts, "fingerprint": total}


class EmbeddedCorpus(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder: features `text`, `domain` and `name`, splits `train` and `held_out`."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, megabytes: float = 2.0, **options: Any):
        self.megabytes = megabytes
        super().__init__(**options)

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "domain": tfds.features.ClassLabel(names=python_text.DOMAINS),
            "name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        examples: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for domain in python_text.DOMAINS:
            texts = list(python_text.texts(domain, self.megabytes))
            chosen = held_out([digest(text.text.encode()) for text in texts])
            for text in texts:
                split = "held_out" if digest(text.text.encode()) in chosen else "train"
                examples[split].append(text._asdict())
        return {split: self._generate_examples(examples[split]) for split in SPLITS}

    def _generate_examples(self, examples):
        for example in examples:
            yield f"{example['domain']}/{example['name']}", example


def _records(folder: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    (info,) = folder.rglob("dataset_info.json")
    builder = tfds.builder_from_directory(info.parent)
    source = builder.as_data_source(split=split)
    declared = builder.info.splits[split].num_examples
    if len(source) != declared:
        raise ValueError(f"{folder} holds {len(source)} of {declared} records: delete it, and it is made anew")
    return (source[i] for i in range(len(source)))


def _facts(folder: pathlib.Path, split: str) -> dict[str, Any]:
    records = list(_records(folder, split))
    size = sum(len(record["text"]) for record in records)
    return {"records": len(records), "bytes": size, "sha256": _fingerprint(records)}


def _fingerprint(records: list[dict[str, Any]]) -> str:
    return fingerprint(f"{record['domain']} {record['name'].decode()} {digest(record['text'])}" for record in records)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
