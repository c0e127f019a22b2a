"""The identity of prepared data, by which a run knows it again, and the tokenizers that a run keeps in its workdir.

Token ids mean something by their tokenizer alone, so a trained one belongs to the run: it does not depend on a cache,
on the text that it was trained on, or on the version of the library that has trained it.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from moe_jax.data.tokenizers import TokenizerConfig, TrainedSentencePiece
from moe_jax.files import write_file

TOKENIZERS = ("tokenizer", "source_tokenizer")  # attributes of a split


def data_identity(train: Any, held_out: Any) -> dict[str, str]:
    """Digests of the splits that `DataConfig.prepare` has made, and of their tokenizers, by name."""
    tokenizers = {name: tokenizer.fingerprint for name, tokenizer in tokenizers_of(train).items()}
    return {"train": train.fingerprint, "held_out": held_out.fingerprint, **tokenizers}


def tokenizers_of(split: Any) -> dict[str, Any]:
    """The tokenizers of a split by name: none of images, two of pairs whose sources have a vocabulary of their own."""
    found = {name: getattr(split, name, None) for name in TOKENIZERS}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


@dataclasses.dataclass(frozen=True)
class KeptTokenizer:
    """A trained tokenizer in place of its config: `fit` gives the one that has been kept, whatever the text."""

    config: TokenizerConfig
    file: pathlib.Path

    @property
    def V(self) -> int:
        return self.config.V

    def fit(self, texts: Iterable[bytes], folder: pathlib.Path) -> TrainedSentencePiece:
        """The kept tokenizer; ValueError where its file is damaged."""
        try:
            return TrainedSentencePiece(self.file.read_bytes())
        except RuntimeError:
            raise ValueError(
                f"{self.file} is damaged, so that the token ids of the run mean nothing; restore it, or delete it "
                "and the tokenizer is trained again."
            ) from None


def keep_tokenizers(split: Any, workdir: pathlib.Path) -> None:
    """Writes the trained tokenizers of a split into the workdir of a run, and deletes those of another one."""
    tokenizers = tokenizers_of(split)
    for name in TOKENIZERS:
        if (model := getattr(tokenizers.get(name), "proto", None)) is None:
            kept_file(workdir, name).unlink(missing_ok=True)
        elif not kept_file(workdir, name).is_file() or kept_file(workdir, name).read_bytes() != model:
            write_file(kept_file(workdir, name), model)


def with_kept_tokenizers(data: Any, workdir: pathlib.Path) -> Any:
    """A `DataConfig` whose tokenizers are those that a run has kept in its workdir, where it has."""
    if (file := kept_file(workdir, "tokenizer")).is_file():
        data = dataclasses.replace(data, tokenizer=KeptTokenizer(data.tokenizer, file))
    if (file := kept_file(workdir, "source_tokenizer")).is_file():
        source = KeptTokenizer(data.objective.source, file)
        data = dataclasses.replace(data, objective=dataclasses.replace(data.objective, source=source))
    return data


def kept_file(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """The file of a kept tokenizer."""
    return workdir / f"{name}.model"
