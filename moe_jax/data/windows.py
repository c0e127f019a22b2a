"""Documents as fixed windows of tokens, kept in memory-mapped files with their checksums."""

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer

from moe_jax.data import cache, tokenizers
from moe_jax.data.documents import Document, Source, Split, fingerprint, read_once
from moe_jax.data.packing import Packer, RowFile
from moe_jax.data.preparation import SERIAL, Preparation
from moe_jax.data.tokenizers import Tokenizer, TokenizerConfig

VERSION = "1"  # raise it when the same documents and tokenizer give other windows


class Batch(NamedTuple):
    """Inputs and targets: token l + 1 of a window is the target of token l."""

    tokens_BL: Int32[np.ndarray, "B L"]
    target_BL: Int32[np.ndarray, "B L"]
    segment_BL: Int32[np.ndarray, "B L"]  # 1, 2, ... for the documents of a window, 0 for padding
    position_BL: Int32[np.ndarray, "B L"]  # from 0 in each segment
    loss_mask_BL: Bool[np.ndarray, "B L"]  # the target is text, and of the same document as its input
    domain_B: Int32[np.ndarray, "B"]


def batch(windows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Windows side by side, as inputs and targets."""
    tokens_BM, segment_BM = (np.stack([window[name] for window in windows]) for name in ("tokens", "segments"))
    segment_BL, next_BL = segment_BM[:, :-1], segment_BM[:, 1:]
    return Batch(
        tokens_BL=tokens_BM[:, :-1],
        target_BL=tokens_BM[:, 1:],
        segment_BL=segment_BL,
        position_BL=positions(segment_BL),
        # a begin-of-document token starts another segment, so it is never a target
        loss_mask_BL=(segment_BL == next_BL) & (next_BL > 0),
        domain_B=np.stack([window["domain"] for window in windows]),
    )


def positions(segment_BL: Int32[np.ndarray, "B L"]) -> Int32[np.ndarray, "B L"]:
    """Distance of each token from the start of its segment."""
    place_L = np.arange(segment_BL.shape[1], dtype=np.int32)
    starts_BL = np.diff(segment_BL, axis=1, prepend=-1) != 0
    return place_L - np.maximum.accumulate(np.where(starts_BL, place_L, 0), axis=1)


class Windows:
    """A split as random-access windows of L + 1 tokens; its files are checked when it is opened."""

    batch = staticmethod(batch)

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        facts = cache.read_facts(folder)
        self.tokenizer = tokenizer
        self.L: int = facts["L"]
        self.domains: tuple[str, ...] = tuple(facts["domains"])
        self.fingerprint: str = facts["fingerprint"]
        self.bytes_per_token: float = facts["bytes"] / facts["targets"]  # of text per target
        self.tokens_WM = np.load(folder / "tokens.npy", mmap_mode="r")
        self.segment_WM = np.load(folder / "segments.npy", mmap_mode="r")
        self.domain_W = np.load(folder / "domains.npy")

    def __len__(self) -> int:
        return len(self.domain_W)

    def __getitem__(self, i: int) -> dict[str, Int32[np.ndarray, "..."]]:
        """Window i: `tokens` and `segments` of L + 1, and the number of its `domain`."""
        return {
            "tokens": self.tokens_WM[i].astype(np.int32),
            "segments": self.segment_WM[i].astype(np.int32),
            "domain": np.array(self.domain_W[i], np.int32),
        }

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A window without text."""
        nothing = np.zeros(self.L + 1, np.int32)
        return {"tokens": nothing, "segments": nothing, "domain": np.array(0, np.int32)}


def prepare(
    source: Source, tokenizer: TokenizerConfig, L: int, directory: pathlib.Path, how: Preparation = SERIAL
) -> tuple[Windows, Windows]:
    """The training and the held-out windows of L inputs, made once and kept under `directory`."""
    if L < 1:
        raise ValueError(f"windows of L={L} tokens were asked for: give L >= 1")
    cache.make_directory(directory)
    source = read_once(source)
    text = source.fingerprint(directory)
    texts = (document.text for document in source.documents("train", directory))
    fitted = tokenizer.fit(
        texts, directory / "tokenizers" / fingerprint([text, repr(tokenizer), tokenizers.VERSION])[:16]
    )
    key = fingerprint([text, fitted.fingerprint, str(L), VERSION])

    def windows(split: Split) -> Windows:
        def make(new: pathlib.Path) -> dict[str, Any]:
            documents = encoded(source, "documents", split, directory)
            facts = write_windows(documents, source.domains, fitted, L, new)
            if not facts["targets"]:
                raise ValueError(f"{source} has no text in its {split} split: give it more documents")
            return {**facts, "fingerprint": fingerprint([key, split])}

        folder = directory / "windows" / key[:16] / split
        cache.ensure(folder, make)
        return Windows(folder, fitted)

    with how.encoder(functools.partial(encode_documents, fitted)) as encoded:
        return windows("train"), windows("held_out")


def encode_documents(tokenizer: Tokenizer, document: Document) -> tuple[Integer[np.ndarray, "N"], int, int]:
    """Tokens of a document, the number of its bytes, and its domain."""
    return tokenizer.encode(document.text).astype(_smallest(tokenizer.V - 1)), len(document.text), document.domain


def write_windows(
    documents: Iterable[tuple[Integer[np.ndarray, "N"], int, int]],
    domains: tuple[str, ...],
    tokenizer: Tokenizer,
    L: int,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Packs the encoded documents of each domain into tokens.npy, segments.npy, domains.npy; returns facts."""
    files = [RowFile(folder / "tokens.npy", _smallest(tokenizer.V - 1), (L + 1,))]
    files += [RowFile(folder / "segments.npy", _smallest(L + 1), (L + 1,))]
    files += [RowFile(folder / "domains.npy", np.dtype(np.int32), ())]
    packers = [Packer(L, tokenizer.bod) for _ in domains]
    total = {"bytes": 0, "targets": 0}

    def flush(domain: int, last: bool) -> None:
        tokens_WM, segment_WM = packers[domain].cut(last)
        for file, rows in zip(files, (tokens_WM, segment_WM, np.full(len(tokens_WM), domain)), strict=True):
            file.append(rows)

    for tokens_N, size, domain in documents:
        total = {"bytes": total["bytes"] + size, "targets": total["targets"] + len(tokens_N)}
        packers[domain].add(tokens_N.astype(np.int32))
        if packers[domain].full():
            flush(domain, last=False)
    for domain, packer in enumerate(packers):
        if packer.documents:
            flush(domain, last=True)
    for file in files:
        file.close()
    return {"L": L, "domains": domains, **total}


def _smallest(largest: int) -> np.dtype:
    return np.dtype(np.uint16 if largest < 2**16 else np.int32)
