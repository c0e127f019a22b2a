"""Span corruption: an encoder reads text with gaps, a decoder fills them (T5, arXiv:1910.10683, sec. 3.1.4)."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Int, Int32

from moe_jax.core.ranges import Range, check_ranges
from moe_jax.data.documents import fingerprint
from moe_jax.data.objectives import check_source
from moe_jax.data.pairs import Pairs, example, pair_batch, shapes
from moe_jax.data.preparation import SERIAL, Preparation
from moe_jax.data.terms import loss_mask, predictions
from moe_jax.data.windows import Windows, prepare

VERSION = "1"  # raise it when the same windows give other spans


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """A sentinel stands for every span that is left out; the target is every sentinel with its span, and one more.

    density: the fraction of tokens left out. span: mean length of a span. sentinels: token ids beyond the tokenizer's.
    config.data.L is the length of the source, which ends with a begin-of-document token (T5's end of sequence).
    Spans are drawn anew in every epoch, over whole windows: documents that share one see each other, as T5's do.
    """

    density: Annotated[float, Range(0, 1, "()")] = 0.15
    span: Annotated[float, Range(1, math.inf, "[)")] = 3.0
    sentinels: Annotated[int, Range(2, 2**31, "[)")] = 128
    batch_kind: ClassVar = "pairs"
    targets: ClassVar = staticmethod(loss_mask)
    terms: ClassVar = staticmethod(predictions)

    def __post_init__(self):
        check_ranges(self)

    def sizes(self, source: Any, tokenizer: Any) -> dict[str, Any]:
        """Sizes of the model that follow from the data."""
        check_source(self, source, "documents")
        return {"V": tokenizer.V + self.sentinels}

    def lengths(self, L: int) -> tuple[int, int]:
        """Tokens that make a source of at most L, and tokens of their target: 568 and 114 for T5's 512."""
        if self._source(2) > L:
            raise ValueError(f"config.data.L={L} leaves no token beside a span's sentinel; make it at least 3.")
        n = beyond = 2
        while self._source(beyond) <= L:
            n, beyond = beyond, 2 * beyond
        while beyond - n > 1:
            middle = (n + beyond) // 2
            n, beyond = (middle, beyond) if self._source(middle) <= L else (n, middle)
        noise, spans = self.left_out(n)
        if spans >= self.sentinels:
            raise ValueError(f"{self}: sources of L={L} have {spans} spans; set sentinels to {spans + 1} or more.")
        return n, noise + spans + 1

    def left_out(self, n: int) -> tuple[int, int]:
        """Number of tokens that are left out of n, and of spans."""
        noise = min(max(round(n * self.density), 1), n - 1)
        return noise, min(max(round(noise / self.span), 1), n - noise)

    def shapes(self, source: Any, B: int, L: int) -> Pairs:
        """Shapes of a batch, as arrays without values."""
        return shapes(B, L, self.lengths(L)[1])

    def prepare(
        self, source: Any, tokenizer: Any, L: int, directory: pathlib.Path, how: Preparation = SERIAL
    ) -> tuple["Gapped", "Gapped"]:
        """The training and the held-out examples: windows of text kept under `directory`, and gaps made on the way."""
        train, held_out = prepare(source, tokenizer, self.lengths(L)[0] - 1, directory, how)
        return Gapped(train, self, L), Gapped(held_out, self, L)

    def _source(self, n: int) -> int:
        noise, spans = self.left_out(n)
        return n - noise + spans + 1


class Gapped:
    """A split of windows, of which `finish` leaves out spans."""

    def __init__(self, windows: Windows, objective: SpanCorruption, L: int):
        self.windows, self.objective, self.tokenizer = windows, objective, windows.tokenizer
        n, self.L = objective.lengths(L)
        self.M = L
        self.domains, self.domain_W = windows.domains, windows.domain_W
        self.fingerprint = fingerprint([windows.fingerprint, str(objective), VERSION])
        self.bytes_per_token = windows.bytes_per_token * objective.left_out(n)[0] / self.L  # of text left out

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Int32[np.ndarray, "..."]]:
        return self.windows[i]

    def finish(self, window: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A window's text with gaps, and what was in them."""
        tokens_N = window["tokens"][window["segments"] > 0]
        lengths = self.objective.left_out(len(tokens_N))
        source, target = corrupt(tokens_N, *lengths, self.tokenizer.V, self.tokenizer.bod, rng)
        return example(source, target, int(window["domain"]), self.M, self.L)

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A pair of nothing."""
        nothing = np.zeros(0, np.int32)
        return example(nothing, nothing, 0, self.M, self.L)

    def batch(self, examples: Sequence[dict[str, np.ndarray]]) -> Pairs:
        return pair_batch(examples, self.tokenizer.bod)


def corrupt(
    tokens_N: Int32[np.ndarray, "N"], noise: int, spans: int, sentinel: int, end: int, rng: np.random.Generator
) -> tuple[Int32[np.ndarray, "M"], Int32[np.ndarray, "L"]]:
    """Source and target: `noise` tokens in `spans` spans left out; sentinels from this one upwards.

    As in T5's code, text comes first, and the last span last.
    """
    lengths = np.stack([segmented(len(tokens_N) - noise, spans, rng), segmented(noise, spans, rng)], axis=1)
    parts = np.split(tokens_N, lengths.cumsum()[:-1])
    marks = sentinel + np.arange(spans + 1, dtype=np.int32)[:, None]
    source = [part for pair in zip(parts[::2], marks, strict=False) for part in pair]
    target = [part for pair in zip(marks, parts[1::2], strict=False) for part in pair]
    return np.concatenate([*source, np.array([end], np.int32)]), np.concatenate([*target, marks[-1]])


def segmented(n: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "parts"]:
    """Lengths of so many parts of n tokens, none of them empty, all ways to cut being as likely."""
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [n]]))
