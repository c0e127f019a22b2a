"""Parallel texts: folders of one's own, data sets of TensorFlow Datasets, and toy languages that need no network."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Integer

from moe_jax.core.ranges import PositiveInt, Range, check_ranges
from moe_jax.data import records
from moe_jax.data.documents import Snapshot, Split, digest, fingerprint, held_out, is_held_out
from moe_jax.data.folders import BOM, WIDE, LeftOut, file_bytes, files_below, root_of
from moe_jax.names import printable

VERSION = "2"  # raise it when the same files give other pairs, or other splits
SPLITS: tuple[Split, ...] = ("train", "held_out")
SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou")


class Pair(NamedTuple):
    """UTF-8 texts, and the number of their domain in `source.domains`."""

    source: bytes
    target: bytes
    domain: int


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A folder of .tsv files, one for each domain, with a line `source<TAB>target` for each pair, in UTF-8."""

    path: str

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the files."""
        return self.snapshot().domains

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Pair]:
        """Pairs without duplicates; a source is in one split, whatever its targets and their files."""
        return self.snapshot().pairs(split, directory)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of the domains and their texts."""
        return self.snapshot().key

    def snapshot(self) -> Snapshot:
        """All pairs, read once; files that are left out are named on stderr. ValueError if there are none."""
        found: dict[str, dict[tuple[bytes, bytes], str]] = {}  # pairs of each domain, with the digest of the source
        texts, apart = [VERSION], set[str]()
        for name, place, data in self._files():
            found[name] = {pair: digest(pair[0]) for pair in pairs_in(data, place)}
            apart |= held_out(found[name].values())
            texts.append(f"{name} {digest(data)}")
        splits: dict[Split, list[Pair]] = {"train": [], "held_out": []}
        for domain, pairs in enumerate(found.values()):
            for (source, target), key in pairs.items():
                splits["held_out" if key in apart else "train"].append(Pair(source, target, domain))
        return Snapshot(self, tuple(found), splits, fingerprint(texts))

    def _files(self) -> Iterator[tuple[str, str, bytes]]:
        """Domain, path and content of each file; ValueError if there are none."""
        root, left_out, n = root_of(self, ".tsv files"), LeftOut(self), 0
        for names, file in files_below(root, left_out):
            if not names[-1].endswith(".tsv"):
                continue
            if len(names) > 1:
                left_out.add("in a subfolder", names)
            elif (data := file_bytes(file, names, left_out)) is not None:
                n += 1
                yield printable(names[0].removesuffix(".tsv")), file.path, data
        left_out.say(n, ())
        if not n:
            raise ValueError(f"{self} holds no .tsv file: put some there, with a line source<TAB>target for each pair")


def pairs_in(data: bytes, place: str) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a .tsv file, without byte-order marks; ValueError names the first line that is none, in `place`."""
    if data.startswith(WIDE):
        raise ValueError(f"{place} is in UTF-16; convert the file to UTF-8")
    for number, line in enumerate(data.splitlines(), start=1):
        sides = line.removeprefix(BOM).split(b"\t")
        if len(sides) != 2 or not all(side.strip() for side in sides):
            raise ValueError(f"{place}, line {number}: there must be two texts with one tab between them")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{place}, line {number} is not UTF-8; convert the file") from None
        yield sides[0], sides[1]


@dataclasses.dataclass(frozen=True)
class TfdsPairs:
    """A translation data set of TensorFlow Datasets, by name, with its features `source` and `target`: one domain."""

    name: str
    source: str
    target: str
    held_out: str = "validation"  # where there is no such split, pairs of `train` are chosen by digest
    data_dir: str | None = None  # of TFDS; None is its own default

    @property
    def domains(self) -> tuple[str, ...]:
        return (f"{self.source}-{self.target}",)

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Pair]:
        """The examples that have both texts, in the order of the data set."""
        return itertools.chain.from_iterable(self.parts(split))

    def parts(self, split: Split) -> list[records.RecordRange]:
        """The same pairs in parts, each of which any process can read."""
        return records.parts(self, split)

    def read(self, examples: Iterable[Mapping[str, Any]], chosen: Split | None) -> Iterator[Pair]:
        """The pairs of some records; `chosen`: only those whose source's digest is of this split."""
        for source, target in ((example[self.source], example[self.target]) for example in examples):
            if source and target and (chosen is None or is_held_out(digest(source)) == (chosen == "held_out")):
                yield Pair(source, target, 0)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of what TFDS knows about the data set."""
        return fingerprint(records.tfds_facts(self, self.found()))

    def found(self) -> tfds.core.DatasetBuilder:
        """The prepared data set; ValueError if it has no such texts."""
        found = records.builder(self)
        features = found.info.features
        texts = sorted(name for name in features if isinstance(features[name], tfds.features.Text))
        if self.source == self.target or not {self.source, self.target} <= set(texts):
            raise ValueError(f"{self} has the texts {texts}: set source and target to two of them")
        return found


@dataclasses.dataclass(frozen=True)
class ToyTranslation:
    """Sentences of distinct random words, each into the language that its first word names.

    Every language has its own word for each word, and its own order: odd languages say a sentence backwards, even ones
    begin it with word 2, 3, ... and go round. No held-out sentence is trained on, in any language.
    """

    languages: Annotated[int, Range(1, 9)] = 4  # number of languages, each a domain
    words: Annotated[int, Range(6, len(SYLLABLES))] = 40
    sentences: PositiveInt = 20000  # number of pairs
    shortest: ClassVar = 3
    longest: ClassVar = 6

    def __post_init__(self):
        check_ranges(self)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(f"language {z}" for z in range(1, self.languages + 1))

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Pair]:
        """Every sentence in one language, in turn."""
        rng = np.random.default_rng(0)
        lexicon = np.array([rng.permutation(len(SYLLABLES))[: self.words] for _ in range(self.languages + 1)])
        for i in range(self.sentences):
            z = i % self.languages + 1
            sentence = rng.permutation(self.words)[: rng.integers(self.shortest, self.longest + 1)]
            text = said(lexicon[0, sentence])
            if is_held_out(digest(text)) == (split == "held_out"):
                yield Pair(b"%d " % z + text, said(word_order(lexicon[z, sentence], z)), z - 1)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of all sentences."""
        both = (pair for split in SPLITS for pair in self.pairs(split, directory))
        return fingerprint(f"{source.decode()}\t{target.decode()}" for source, target, _ in both)


def word_order(words: Integer[np.ndarray, "N"], z: int) -> Integer[np.ndarray, "N"]:
    """A sentence in the order of language z."""
    return words[::-1] if z % 2 else np.roll(words, -(z // 2))


def said(words: Integer[np.ndarray, "N"]) -> bytes:
    """The text of a sentence."""
    return " ".join(SYLLABLES[word] for word in words).encode()
