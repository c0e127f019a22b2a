"""Traces of a trained language model: inputs and decisions of its MoE layers."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.routing import TokenChoice
from moe_jax.data import predictions
from moe_jax.models import Call
from moe_jax.moe import RECORDED, LayerState


def check_language_model(model: Any) -> None:
    """Refuses a model that is no language model with experts that tokens choose."""
    if model.batch_kind != "tokens" or not model.n_moe_layers:
        raise ValueError(f"{type(model).__name__} is no language model with MoE layers; give an LMConfig with some.")
    if model.moe.traits.routing is not TokenChoice:
        raise ValueError(f"{type(model.moe.router).__name__}() lets no token choose; use a router of token choice.")


# ---------------------------------------------------------------- traces of layers


class LayerTrace(NamedTuple):
    """Inputs and decisions of N MoE layers on T real tokens, in the order of the data."""

    input_NTD: Float[np.ndarray, "N T D"]  # inputs of router and experts
    logits_NTE: Float[np.ndarray, "N T E"]
    probs_NTE: Float[np.ndarray, "N T E"]
    expert_NTK: Int[np.ndarray, "N T K"]  # E is the padding id
    weight_NTK: Float[np.ndarray, "N T K"]
    kept_NTK: Bool[np.ndarray, "N T K"]
    token_T: Int[np.ndarray, "T"]
    position_T: Int[np.ndarray, "T"]
    domain_T: Int[np.ndarray, "T"]
    sequence_T: Int[np.ndarray, "T"]
    loss_T: Float[np.ndarray, "T"]  # nats of the target; NaN where there is none


def trace_batch(
    model: Any, params: Any, router: LayerState | None, batch: Any
) -> tuple[dict[str, Array], Float[Array, "B L V"]]:
    """Returns inputs and decisions of the MoE layers on a batch, each [N, B, L, ...], and the logits of the model."""
    record = ("input", "logits", "probs", "weight", "kept")
    logits_BLV, aux = model.apply(params, batch, Call(router=router, record=record))
    details = {name: getattr(aux.recorded, RECORDED[name]) for name in record}
    return details | {"expert": aux.expert_BLK}, logits_BLV


@partial(jax.jit, static_argnums=0)
def _trace(model: Any, params: Any, router: LayerState | None, batch: Any) -> tuple[dict[str, Array], Array]:
    traced, logits_BLV = trace_batch(model, params, router, batch)
    return traced, predictions(logits_BLV, batch).nats_BL


def trace_layers(
    model: Any, params: Any, batches: Iterable[Any], router: Mapping[str, Any] | None = None
) -> LayerTrace:
    """Runs a language model on batches, in evaluation, on one device; returns inputs and decisions of its MoE layers.

    model: with its capacity limit, or `model.dropless()`. router: state of its routers. ValueError for other models,
    and without a token.
    """
    check_language_model(model)
    parts, rows = [], 0
    for batch in batches:
        traced, nats_BL = jax.device_get(_trace(model, params, dict(router or {}), batch))
        nats_BL = np.where(batch.loss_mask_BL, nats_BL, np.nan)
        real_BL, B = np.asarray(batch.segment_BL) > 0, len(batch.tokens_BL)
        names = ("input", "logits", "probs", "expert", "weight", "kept")
        columns = [np.asarray(traced[name])[:, real_BL] for name in names]
        per_token = lambda a_B, real_BL=real_BL: np.broadcast_to(np.asarray(a_B)[:, None], real_BL.shape)[real_BL]  # noqa: E731
        of_token = [np.asarray(a)[real_BL] for a in (batch.tokens_BL, batch.position_BL)]
        parts.append((*columns, *of_token, per_token(batch.domain_B), per_token(rows + np.arange(B)), nats_BL[real_BL]))
        rows += B
    if not parts or not sum(len(part[-1]) for part in parts):
        raise ValueError("The batches hold no token to look at; give some text.")
    joined = [np.concatenate(column, axis=int(column[0].ndim == 3)) for column in zip(*parts, strict=True)]
    return LayerTrace(*joined)
