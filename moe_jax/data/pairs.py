"""Pairs of a source and a target, for an encoder and a decoder; and those of parallel texts."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, Integer

from moe_jax.core.quoted import quoted
from moe_jax.data import cache, tokenizers
from moe_jax.data.documents import Split, fingerprint, read_once
from moe_jax.data.objectives import check_source
from moe_jax.data.packing import RowFile
from moe_jax.data.preparation import SERIAL, Preparation
from moe_jax.data.terms import loss_mask, predictions
from moe_jax.data.tokenizers import Tokenizer, TokenizerConfig
from moe_jax.data.translation import Pair

NOTHING = -1  # stands in an example where no token is
VERSION = "1"  # raise it when the same pairs and tokenizers give other examples


class Pairs(NamedTuple):
    """Sources, and targets with the tokens before them."""

    source_BM: Int32[np.ndarray, "B M"]
    source_segment_BM: Int32[np.ndarray, "B M"]  # 0 is padding
    tokens_BL: Int32[np.ndarray, "B L"]  # the target, one behind
    target_BL: Int32[np.ndarray, "B L"]
    segment_BL: Int32[np.ndarray, "B L"]  # that of its source; 0 is padding
    loss_mask_BL: Bool[np.ndarray, "B L"]
    domain_B: Int32[np.ndarray, "B"]


def shapes(B: int, M: int, L: int) -> Pairs:
    """Shapes of a batch, as arrays without values."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    source, target = of(jnp.int32, B, M), of(jnp.int32, B, L)
    return Pairs(source, source, target, target, target, of(jnp.bool, B, L), of(jnp.int32, B))  # type: ignore[arg-type]


def example(
    source: Int32[np.ndarray, "m"], target: Int32[np.ndarray, "l"], domain: int, M: int, L: int
) -> dict[str, np.ndarray]:
    """One pair, at the length of all: `source` of M, `target` of L, and the number of its `domain`."""
    long = lambda ids, n: np.pad(ids, (0, n - len(ids)), constant_values=NOTHING).astype(np.int32)  # noqa: E731
    return {"source": long(source, M), "target": long(target, L), "domain": np.array(domain, np.int32)}


def pair_batch(examples: Sequence[dict[str, np.ndarray]], first: int) -> Pairs:
    """Pairs side by side, one in a row; before the first target stands the token `first`."""
    source_BM, target_BL = (np.stack([one[name] for one in examples]) for name in ("source", "target"))
    real_BL = target_BL != NOTHING
    before_BL = np.pad(target_BL[:, :-1], ((0, 0), (1, 0)), constant_values=first)
    return Pairs(
        source_BM=np.where(source_BM == NOTHING, 0, source_BM),
        source_segment_BM=(source_BM != NOTHING).astype(np.int32),
        tokens_BL=np.where(real_BL, before_BL, 0),
        target_BL=np.where(real_BL, target_BL, 0),
        segment_BL=real_BL.astype(np.int32),
        loss_mask_BL=real_BL,
        domain_B=np.stack([one["domain"] for one in examples]),
    )


@dataclasses.dataclass(frozen=True)
class Translation:
    """The second text of a pair from the first; a target ends with the token that also begins it.

    source: the tokenizer of sources, where they have a vocabulary of their own (GShard's).
    config.data.L is the length of both; pairs that are longer are left out, and counted.
    """

    source: Any = None
    batch_kind: ClassVar = "pairs"
    targets: ClassVar = staticmethod(loss_mask)
    terms: ClassVar = staticmethod(predictions)

    def __post_init__(self):
        if self.source is not None and not (hasattr(self.source, "fit") and hasattr(self.source, "V")):
            raise ValueError(f"Translation(source={quoted(self.source)}) is no tokenizer; use SentencePiece(), say.")

    def sizes(self, source: Any, tokenizer: Any) -> dict[str, Any]:
        """Sizes of the model that follow from the data."""
        check_source(self, source, "pairs")
        return {"V": tokenizer.V, "V_source": None if self.source is None else self.source.V}

    def shapes(self, source: Any, B: int, L: int) -> Pairs:
        """Shapes of a batch, as arrays without values."""
        return shapes(B, L, L)

    def prepare(
        self,
        source: Any,
        tokenizer: TokenizerConfig,
        L: int,
        directory: pathlib.Path,
        how: Preparation = SERIAL,
    ) -> tuple["ParallelText", "ParallelText"]:
        """The training and the held-out pairs, made once and kept under `directory`."""
        cache.make_directory(directory)
        source = read_once(source)
        text = source.fingerprint(directory)

        def fit(config: TokenizerConfig, sides: tuple[str, ...]) -> Tokenizer:
            texts = (getattr(pair, side) for pair in source.pairs("train", directory) for side in sides)
            key = fingerprint([text, repr(config), *sides, tokenizers.VERSION])
            return config.fit(texts, directory / "tokenizers" / key[:16])

        fitted = fit(tokenizer, ("source", "target") if self.source is None else ("target",))
        of_source = fitted if self.source is None else fit(self.source, ("source",))
        key = fingerprint([text, of_source.fingerprint, fitted.fingerprint, str(L), VERSION])

        def made(split: Split) -> ParallelText:
            def make(new: pathlib.Path) -> dict[str, Any]:
                sizes = {"source": of_source.V, "target": fitted.V}
                facts = write_pairs(encoded(source, "pairs", split, directory), sizes, L, new)
                left_out = f"{facts['left_out']} of {facts['left_out'] + facts['pairs']} {split} pairs"
                if not facts["pairs"]:
                    raise ValueError(f"{source}: {left_out} fit into L={L} tokens; give more pairs, or a larger L")
                if facts["left_out"]:
                    print(f"{source}: {left_out} are longer than L={L} tokens, and left out", file=sys.stderr)
                return {**facts, "domains": source.domains, "fingerprint": fingerprint([key, split])}

            folder = directory / "pairs" / key[:16] / split
            cache.ensure(folder, make)
            return ParallelText(folder, fitted, None if self.source is None else of_source)

        with how.encoder(functools.partial(encode_pairs, of_source, fitted)) as encoded:
            return made("train"), made("held_out")


class ParallelText:
    """A split of pairs, at random access; its files are checked when it is opened."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None = None):
        facts = cache.read_facts(folder)
        self.tokenizer, self.source_tokenizer = tokenizer, source_tokenizer
        self.domains: tuple[str, ...] = tuple(facts["domains"])
        self.fingerprint: str = facts["fingerprint"]
        self.bytes_per_token: float = facts["bytes"] / facts["targets"]
        self.left_out: int = facts["left_out"]  # pairs that are too long
        self.source_WM = np.load(folder / "source.npy", mmap_mode="r")
        self.target_WL = np.load(folder / "target.npy", mmap_mode="r")
        self.domain_W = np.load(folder / "domains.npy")

    def __len__(self) -> int:
        return len(self.domain_W)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Pair i, as `example` has it."""
        rows = {"source": self.source_WM[i], "target": self.target_WL[i], "domain": self.domain_W[i]}
        return {name: np.array(row, np.int32) for name, row in rows.items()}

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A pair of nothing."""
        nothing = np.zeros(0, np.int32)
        return example(nothing, nothing, 0, self.source_WM.shape[1], self.target_WL.shape[1])

    def batch(self, examples: Sequence[dict[str, np.ndarray]]) -> Pairs:
        return pair_batch(examples, self.tokenizer.bod)


def encode_pairs(
    of_source: Tokenizer, tokenizer: Tokenizer, pair: Pair
) -> tuple[Integer[np.ndarray, "m"], Integer[np.ndarray, "l"], int, int]:
    """Tokens of a pair's source and of its target with the end, the number of the target's bytes, and the domain."""
    target = np.append(tokenizer.encode(pair.target), np.int32(tokenizer.bod))
    return of_source.encode(pair.source), target, len(pair.target), pair.domain


def write_pairs(
    pairs: Iterable[tuple[Integer[np.ndarray, "m"], Integer[np.ndarray, "l"], int, int]],
    sizes: Mapping[str, int],
    L: int,
    folder: pathlib.Path,
) -> dict[str, int]:
    """The encoded pairs that fit into source.npy, target.npy, domains.npy; returns facts. sizes: of vocabularies."""
    files = {name: RowFile(folder / f"{name}.npy", _smallest(V), (L,)) for name, V in sizes.items()}
    files["domain"] = RowFile(folder / "domains.npy", np.dtype(np.int32), ())
    total = {"pairs": 0, "left_out": 0, "bytes": 0, "targets": 0}
    for source, target, size, domain in pairs:
        if max(len(source), len(target)) > L:
            total["left_out"] += 1
            continue
        for name, row in example(source, target, domain, L, L).items():
            files[name].append(row[None])
        more = {"pairs": 1, "bytes": size, "targets": len(target)}
        total |= {name: total[name] + n for name, n in more.items()}
    for file in files.values():
        file.close()
    return total


def _smallest(V: int) -> np.dtype:
    return np.dtype(np.int16 if V <= 2**15 else np.int32)
