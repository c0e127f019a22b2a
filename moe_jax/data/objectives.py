"""Objectives: each makes examples of a source, batches of them for one kind of model, and their loss."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.data.preparation import SERIAL, Preparation
from moe_jax.data.terms import loss_mask, predictions
from moe_jax.data.windows import Batch, Windows, prepare


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Every token from those before it."""

    batch_kind: ClassVar = "tokens"  # the kind of batch, as models say what they take
    targets: ClassVar = staticmethod(loss_mask)
    terms: ClassVar = staticmethod(predictions)

    def sizes(self, source: Any, tokenizer: Any) -> dict[str, Any]:
        """Sizes of the model that follow from the data."""
        check_source(self, source, "documents")
        return {"V": tokenizer.V}

    def shapes(self, source: Any, B: int, L: int) -> Batch:
        """Shapes of a batch, as arrays without values."""
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        tokens = of(jnp.int32, B, L)
        return Batch(tokens, tokens, tokens, tokens, of(jnp.bool, B, L), of(jnp.int32, B))  # type: ignore[arg-type]

    def prepare(
        self, source: Any, tokenizer: Any, L: int, directory: pathlib.Path, how: Preparation = SERIAL
    ) -> tuple[Windows, Windows]:
        """The training and the held-out examples."""
        return prepare(source, tokenizer, L, directory, how)


def check_source(objective: Any, source: Any, gives: str) -> None:
    """Refuses a source that does not give what is to be predicted: `documents` or `pairs`."""
    if not hasattr(type(source), gives):
        known = {"documents": "Corpus(), Folder(...) or Tfds(...)", "pairs": "ToyTranslation() or Parallel(...)"}
        raise ValueError(
            f"config.data.objective={objective} needs a source of {gives}, which {source} is not; set "
            f"config.data.source to {known[gives]}, or choose another objective."
        )
