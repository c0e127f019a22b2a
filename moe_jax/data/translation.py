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
from moe_jax.data.documents import Split, digest, fingerprint, held_out, is_held_out

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
        return tuple(file.stem for file in self._files())

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Pair]:
        """Pairs without duplicates; a source is in one split, whatever its targets."""
        for domain, file in enumerate(self._files()):
            lines = dict.fromkeys(read_pairs(file))
            apart = held_out([digest(source) for source, _ in lines])
            for source, target in lines:
                if (digest(source) in apart) == (split == "held_out"):
                    yield Pair(source, target, domain)

    def fingerprint(self, directory: pathlib.Path) -> str:
        """A sha256 of the domains and their texts."""
        return fingerprint(f"{file.stem} {digest(file.read_bytes())}" for file in self._files())

    def _files(self) -> list[pathlib.Path]:
        root = pathlib.Path(self.path).expanduser().resolve()
        if not root.is_dir():
            raise FileNotFoundError(f"{self}: there is no such folder, give one of .tsv files")
        if not (files := sorted(root.glob("*.tsv"))):
            raise ValueError(f"{self} holds no .tsv file: put some there, with a line source<TAB>target for each pair")
        return files


def read_pairs(file: pathlib.Path) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a .tsv file; ValueError names the first line that is none."""
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        sides = line.split(b"\t")
        if len(sides) != 2 or not all(side.strip() for side in sides):
            raise ValueError(f"{file}, line {number}: there must be two texts with one tab between them")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}, line {number} is not UTF-8; convert the file") from None
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
