"""Tokenizers: text to token ids and back, without loss."""

import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Protocol, SupportsInt, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from moe_jax.core.ranges import Range, check_ranges
from moe_jax.data import cache

VERSION = "2"  # raise it when the same text gives another tokenizer
MODEL = "sentencepiece.model"
SPACE = "\u2581"  # stands for a space in the pieces of a model
TRAINED_ON = 8_000_000  # bytes
LONGEST_LINE = 1000  # characters; sentencepiece leaves out lines above 4192 bytes
VERBATIM = re.compile(f"({SPACE}+|[\\udc80-\\udcff]+)")  # surrogates carry bytes that are not UTF-8


@runtime_checkable
class Tokenizer(Protocol):
    """V token ids; `bod` begins a document and is never the id of any text; `fingerprint` tells two apart."""

    V: int
    bod: int

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: bytes) -> Int32[np.ndarray, "N"]: ...

    def decode(self, ids: Sequence[SupportsInt] | np.ndarray) -> bytes: ...


@runtime_checkable
class TokenizerConfig(Protocol):
    """Tokenizer as a config names it: its V is known at once, and `fit` gives the tokenizer for some training text."""

    V: int

    def fit(self, texts: Iterable[bytes], folder: pathlib.Path) -> Tokenizer: ...


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token per byte, and one that begins a document."""

    V: ClassVar[int] = 257
    bod: ClassVar[int] = 256
    fingerprint: ClassVar[str] = "bytes"

    def fit(self, texts: Iterable[bytes], folder: pathlib.Path) -> "Bytes":
        """Needs no training: this very tokenizer."""
        return self

    def encode(self, text: bytes) -> Int32[np.ndarray, "N"]:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[SupportsInt] | np.ndarray) -> bytes:
        """The text of `ids`; begin-of-document tokens have none."""
        ids = np.asarray(ids, np.int64)
        return ids[ids != self.bod].astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """Byte-pair encoding of V pieces, all 256 bytes among them, trained on the first 8 MB of text."""

    V: Annotated[int, Range(300, 2**31, "[)")] = 8192  # at least 256 bytes and some pieces

    def __post_init__(self):
        check_ranges(self)

    def fit(self, texts: Iterable[bytes], folder: pathlib.Path) -> "TrainedSentencePiece":
        """The tokenizer in `folder`, trained on `texts` if there is none; ValueError if they are too few."""

        def train(unfinished: pathlib.Path) -> dict[str, int]:
            (unfinished / MODEL).write_bytes(_train(training_lines(texts, TRAINED_ON), self.V))
            return {"V": self.V}

        cache.ensure(folder, train)
        cache.read_facts(folder)
        return TrainedSentencePiece((folder / MODEL).read_bytes())


class TrainedSentencePiece:
    """The tokenizer in the bytes of a sentencepiece model."""

    def __init__(self, model: bytes):
        self.proto = model
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.V: int = self.model.vocab_size()
        self.bod: int = self.model.bos_id()
        self.byte_ids: list[int] = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.texts: list[bytes] = [self._text(i) for i in range(self.V)]

    def encode(self, text: bytes) -> Int32[np.ndarray, "N"]:
        """Token ids; what the model cannot hold (its sign for a space, broken UTF-8) is given in bytes."""
        ids: list[int] = []
        for part in VERBATIM.split(text.decode("utf-8", "surrogateescape")):
            if VERBATIM.fullmatch(part):
                ids += [self.byte_ids[byte] for byte in part.encode("utf-8", "surrogateescape")]
            else:
                ids += self.model.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[SupportsInt] | np.ndarray) -> bytes:
        """The text of `ids`; begin-of-document and unknown tokens have none."""
        return b"".join(self.texts[int(i)] for i in ids)

    def _text(self, i: int) -> bytes:
        if self.model.is_control(i) or self.model.is_unknown(i):
            return b""
        piece = self.model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(i) else piece.replace(SPACE, " ").encode()


def training_lines(texts: Iterable[bytes], limit: int) -> Iterator[str]:
    """The lines of the first `limit` bytes of text, in parts that sentencepiece takes."""
    for text in texts:
        for line in text[:limit].decode("utf-8", "ignore").splitlines():
            yield from (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))
        limit -= len(text)
        if limit <= 0:
            return


def _train(sentences: Iterator[str], V: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=V,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            # nothing may be changed on the way, or decoding would not give the text back
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(f"SentencePiece(V={V}) cannot be trained on this text: {reason}") from None
    return model.getvalue()
