"""A trained language model from inside: where its MoE layers' parameters lie, what each layer saw and decided."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.context import Context
from moe_jax.core.routing import TokenChoice
from moe_jax.models import cross_entropy
from moe_jax.models.layout import sparse_layers, stacks
from moe_jax.moe import MoEConfig, State

PREFIXES = {1: ("",), 2: ("encoder_", "decoder_")}  # of a model's stacks, by their number


class Place(NamedTuple):
    """Where the parameters of a MoE layer lie: params[stack][module][name][repeat]."""

    stack: str
    module: str
    repeat: int


def places(model: Any) -> list[Place]:
    """Those of all MoE layers, in the order of their numbers."""
    blocks = [
        (f"{prefix}stack_{i}", block, n)
        for prefix in PREFIXES[model.STACKS]
        for i, (block, n) in enumerate(stacks(sparse_layers(model.layout, model.N)))
    ]
    layers = ((name, i, j) for name, block, n in blocks for j in range(n) for i, sparse in enumerate(block) if sparse)
    return [Place(name, f"moe_{i}", j) for name, i, j in layers] if isinstance(model.moe, MoEConfig) else []


def place(model: Any, layer: int) -> Place:
    """That of MoE layer number `layer`; ValueError where there is none."""
    found = places(model)
    if not 0 <= layer < len(found):
        raise ValueError(f"There is no MoE layer {layer}; the model has {len(found)}, counted from 0 among themselves.")
    return found[layer]


def check_expert(model: Any, layer: int, expert: int) -> None:
    """Refuses an expert that is not in the model."""
    place(model, layer)
    if not 0 <= expert < model.moe.E:
        raise ValueError(f"There is no expert {expert} in layer {layer}; it has {model.moe.E}, counted from 0.")


def layer_params(model: Any, params: Any, layer: int) -> dict[str, Any]:
    """The parameters of one MoE layer, by name."""
    at = place(model, layer)
    return {name: w[at.repeat] for name, w in params[at.stack][at.module].items()}


def check_language_model(model: Any) -> None:
    """Refuses a model that is no language model with experts that tokens choose."""
    if model.takes != "tokens" or not model.moe_layers:
        raise ValueError(f"{type(model).__name__} is no language model with MoE layers; give an LMConfig with some.")
    if getattr(model.moe.router, "makes", TokenChoice) is not TokenChoice:
        raise ValueError(f"{type(model.moe.router).__name__}() lets no token choose; use a router of token choice.")


# ---------------------------------------------------------------- what layers see


class Seen(NamedTuple):
    """What N MoE layers saw and decided of T real tokens, in the order of the data."""

    input_NTD: Float[np.ndarray, "N T D"]  # what router and experts are given
    logits_NTE: Float[np.ndarray, "N T E"]
    probs_NTE: Float[np.ndarray, "N T E"]
    expert_NTK: Int[np.ndarray, "N T K"]  # E nowhere
    weight_NTK: Float[np.ndarray, "N T K"]
    kept_NTK: Bool[np.ndarray, "N T K"]
    token_T: Int[np.ndarray, "T"]
    position_T: Int[np.ndarray, "T"]
    domain_T: Int[np.ndarray, "T"]
    sequence_T: Int[np.ndarray, "T"]
    loss_T: Float[np.ndarray, "T"]  # nats of the target; NaN where there is none


@functools.lru_cache
def tapped(moe: MoEConfig) -> MoEConfig:
    """The same layer on one device; `sums` of its statistics hold what its router is given of tokens, and logits."""
    kind = type(moe.router)

    def call(self, params, x_GSD, mask_GS, ctx=Context()):
        routing = kind.__call__(self, params, x_GSD, mask_GS, ctx)
        return routing._replace(sums={"input": x_GSD, "logits": routing.logits_GSE})

    router = type(kind.__name__, (kind,), {"__call__": call})
    fields = {f.name: getattr(moe.router, f.name) for f in dataclasses.fields(moe.router)}
    return dataclasses.replace(moe, router=router(**fields))


def peek(model: Any, params: Any, router: State | None, batch: Any) -> tuple[dict[str, Array], Float[Array, "B L V"]]:
    """What the MoE layers saw and decided of a batch, each [N, B, L, ...], and the logits of the model."""
    tap = dataclasses.replace(model, moe=tapped(model.moe))
    logits_BLV, aux = tap.apply(params, batch, router=router, record=True)
    tapped_NGS = {name: a.reshape(len(a), *batch.tokens_BL.shape, a.shape[-1]) for name, a in aux.stats.sums.items()}
    it = aux.recorded
    decided = {"expert": aux.expert_BLK, "weight": it.weight_BLK, "kept": it.kept_BLK, "probs": it.probs_BLE}
    return tapped_NGS | decided, logits_BLV


@partial(jax.jit, static_argnums=0)
def _look(model: Any, params: Any, router: State | None, batch: Any) -> tuple[dict[str, Array], Array]:
    sums, logits_BLV = peek(model, params, router, batch)
    return sums, jnp.where(batch.loss_mask_BL, cross_entropy(logits_BLV, batch.target_BL), jnp.nan)


def look(model: Any, params: Any, batches: Iterable[Any], router: Mapping[str, Any] | None = None) -> Seen:
    """What the MoE layers of a language model see of batches, in evaluation, on one device.

    model: with its limit of slots, or `model.dropless()`. router: what its routers remember. ValueError for other
    models, and without a token.
    """
    check_language_model(model)
    parts, rows = [], 0
    for batch in batches:
        sums, nats_BL = jax.device_get(_look(model, params, dict(router or {}), batch))
        real_BL, B = np.asarray(batch.segment_BL) > 0, len(batch.tokens_BL)
        names = ("input", "logits", "probs", "expert", "weight", "kept")
        columns = [np.asarray(sums[name])[:, real_BL] for name in names]
        of_row = lambda a_B, real_BL=real_BL: np.broadcast_to(np.asarray(a_B)[:, None], real_BL.shape)[real_BL]  # noqa: E731
        of_token = [np.asarray(a)[real_BL] for a in (batch.tokens_BL, batch.position_BL)]
        parts.append((*columns, *of_token, of_row(batch.domain_B), of_row(rows + np.arange(B)), nats_BL[real_BL]))
        rows += B
    if not parts or not sum(len(part[-1]) for part in parts):
        raise ValueError("The batches hold no token to look at; give some text.")
    joined = [np.concatenate(column, axis=int(column[0].ndim == 3)) for column in zip(*parts, strict=True)]
    return Seen(*joined)
