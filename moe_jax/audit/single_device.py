"""Checks of laws 4, 7, 8 and 11 of an experiment, and of microbatches, on one device."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import step
from moe_jax.audit.meshes import (
    CLOSE,
    SURE,
    StepTrace,
    Trial,
    Worst,
    at_most,
    compare_with_one_device,
    on_one_device,
    worst,
)
from moe_jax.audit.routing import ROUNDING, Verdict
from moe_jax.audit.samples import change_document, fill_padding, is_padding, keep_rows, layer_segments, padding_mask
from moe_jax.audit.shrink import rows_of_a_group
from moe_jax.config import Experiment
from moe_jax.core.stats import Stats
from moe_jax.data import AnyBatch, Images
from moe_jax.losses import is_additive
from moe_jax.models import Call, Model


def step_is_causal(trial: Trial, exp: Experiment, state: step.State, batch: AnyBatch) -> Verdict:
    """Law 4 of the whole model: other tokens later in the last sequence of a group change nothing before them."""
    assert not isinstance(batch, Images), "an image has no order"
    rng, (B, L), n = np.random.default_rng(2), batch.tokens_BL.shape, rows_of_a_group(exp.model, batch)
    last_B1 = (np.arange(B) % n == n - 1)[:, None]
    later_BL = np.arange(L) >= rng.integers(1, L // 2 + 1, (B, 1))
    other_BL = np.where(last_B1 & later_BL, (batch.tokens_BL + 1) % exp.model.V, batch.tokens_BL)
    one, other = (jax.device_get(trial(state, b)) for b in (batch, batch._replace(tokens_BL=other_BL)))
    watched_BL = last_B1 & ~later_BL & (batch.segment_BL > 0)
    moved_BL = np.abs(one.logits_BLV - other.logits_BLV).max(-1) > ROUNDING * np.abs(one.logits_BLV).max()
    if one.expert_NBLK is not None:
        moved_BL |= np.not_equal(one.expert_NBLK, other.expert_NBLK)[:, :, :L].any((0, 3))
    changed = int((moved_BL & watched_BL).sum())
    return Verdict(not changed, f"{changed} of {watched_BL.sum()} tokens changed")


def documents(exp: Experiment, state: step.State, batch: AnyBatch) -> Verdict:
    """Law 11: without a capacity limit, other tokens of one document change nothing in the others of its row."""
    assert not isinstance(batch, Images), "an image is no document"
    run = jax.jit(partial(outputs_of, exp.model.dropless()))
    logits_BLV, expert_NBLK = jax.device_get(run(state.params, state.router, batch))
    moved = chosen = watched = 0
    for document in range(1, int(batch.segment_BL.max()) + 1):
        changed = change_document(exp, batch, document)
        others_BLV, others_NBLK = jax.device_get(run(state.params, state.router, changed))
        apart_BL = (batch.segment_BL > 0) & (batch.segment_BL != document)
        differs_BL = np.abs(logits_BLV - others_BLV).max(-1) > ROUNDING * np.abs(logits_BLV).max()
        moved, watched = moved + int((differs_BL & apart_BL).sum()), watched + int(apart_BL.sum())
        if expert_NBLK is not None:
            segment_NBL = layer_segments(exp, batch)
            apart_NBL = (segment_NBL > 0) & (segment_NBL != document)
            chosen += int((np.not_equal(expert_NBLK, others_NBLK).any(-1) & apart_NBL).sum())
    routed = f", and the choices of {chosen}" if chosen else ""
    return Verdict(not moved and not chosen, f"{moved} of {watched} tokens changed{routed}")


def outputs_of(model: Model, params: Any, router: Any, batch: AnyBatch) -> tuple[Any, Any]:
    """Logits of a model in evaluation, and the choices of all MoE layers, None where none is made."""
    logits_BLV, aux = model.apply(params, batch, Call(router=router))
    return logits_BLV, None if aux is None else aux.expert_BLK


def drops(exp: Experiment, state: step.State, trace: StepTrace) -> Verdict:
    """Law 8: evaluation drops nothing, and a step's statistics and auxiliary loss are of the choices it has made."""
    stats, trained, cfg = trace.evaluated.stats, trace.metrics.stats, exp.model.routed
    if stats is None or trained is None or cfg is None:
        return Verdict(True, "nothing routes")
    asked_N = np.asarray(stats.choices_E, np.float64).sum(-1)
    lost = float(np.abs(asked_N - stats.kept).sum())
    if lost > CLOSE * asked_N.sum():
        return Verdict(False, f"{lost:.0f} of {asked_N.sum():.0f} in evaluation")
    said = f"{lost:.0f} of {asked_N.sum():.0f} in evaluation"
    # Noise is drawn, and groups are formed, for each microbatch.
    comparable = exp.data.microbatches == 1 or not (cfg.random or cfg.traits.grouped)
    if trace.expert_NBLK is None or not comparable:
        return Verdict(True, said)
    made_NE = np.stack([np.bincount(e.reshape(-1), minlength=cfg.E + 1)[: cfg.E] for e in trace.expert_NBLK])
    counted, made = trained.choices_E.sum(), made_NE.sum()
    if np.not_equal(made_NE, np.round(trained.choices_E)).any():
        return Verdict(False, f"a step's statistics count {counted:.0f} choices, of {made} that are made, by expert")
    said_loss, loss = float(trace.metrics.aux_loss), loss_of_stats(exp, state, trained)
    if exp.data.microbatches == 1 and abs(said_loss - loss) > CLOSE * max(abs(loss), SURE):
        return Verdict(False, f"a step's auxiliary loss is {said_loss:.6f}, but {loss:.6f} of its routing")
    return Verdict(True, f"{said}; {made - np.sum(trained.kept):.0f} of {made} in training, all counted")


def loss_of_stats(exp: Experiment, state: step.State, stats: Stats) -> float:
    """Auxiliary loss of a model with these statistics of its MoE layers."""
    cfg = exp.model.routed
    assert cfg is not None
    by_layer, router = jax.tree.map(jnp.asarray, stats), jax.tree.map(jnp.asarray, state.router)
    layers_N = sum((part.weight * part(by_layer, router, cfg.router) for part in cfg.losses), jnp.zeros(()))
    return float(layers_N.sum() if exp.model.aux_over_layers == "sum" else layers_N.mean())


def microbatches(
    exp: Experiment, state: step.State, batch: AnyBatch, devices: list[jax.Device]
) -> dict[str, Verdict] | None:
    """Law 1: checks that a batch in microbatches is the same step as at once; None where this does not apply.

    Auxiliary losses that are no means over tokens are left out (`loss_of_parts` has them), and so is noise, which is
    drawn for each microbatch. Routing groups are single sequences, since a microbatch groups sequences in another way.
    """
    model, left_out = exp.model, ()
    if model.routed is not None and not model.routed.traits.untrained:
        gating = tuple(t for t in model.moe.gating if not t.random)
        left_out = tuple(loss for loss in model.moe.losses if not is_additive(loss))
        losses = tuple(filter(is_additive, model.moe.losses))
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, losses=losses, gating=gating, S=None))
    routed = model.routed
    if exp.data.microbatches == 1 or (routed and (routed.random or not all(map(is_additive, routed.losses)))):
        return None
    several = dataclasses.replace(on_one_device(exp), model=model)
    at_once = dataclasses.replace(several, data=dataclasses.replace(exp.data, microbatches=1))
    state = state._replace(router=jax.device_get(model.init_router()))
    trials = [Trial(e, devices[:1]) for e in (at_once, several)]
    one, many = (jax.device_get(trial(state, batch)) for trial in trials)
    found = compare_with_one_device(one, many, state)
    if left_out:
        parts = [trials[0](state, keep_rows(batch, rows_B1)) for rows_B1 in microbatch_rows(exp)]
        parts_stats = jax.device_get([trace.metrics.stats for trace in parts])
        said = (loss_of_parts(loss, exp, one.metrics.stats, parts_stats) for loss in left_out)
        found["auxiliary losses"] = Verdict(True, "by microbatch: " + ", ".join(said))
    return found


def microbatch_rows(exp: Experiment) -> list[np.ndarray]:
    """Masks [B, 1] of the rows of each microbatch."""
    A, row_B1 = exp.data.microbatches, np.arange(exp.data.B)[:, None]
    return [row_B1 % A == i for i in range(A)]


def loss_of_parts(loss: Any, exp: Experiment, whole: Stats, parts: list[Stats]) -> str:
    """Says a loss as the mean over the parts of a batch by their tokens, which a step uses, and that of the batch."""
    cfg, router_state = exp.model.moe, exp.model.init_router()
    sums = (jax.tree.map(jnp.asarray, s) for s in (whole, *parts))
    of_batch, *of_parts = (np.asarray(loss(s, router_state, cfg.router)) for s in sums)
    tokens_PN = np.array([s.tokens for s in parts])
    mean_N = (tokens_PN * of_parts).sum(0) / np.maximum(tokens_PN.sum(0), 1)
    return f"{type(loss).__name__} {mean_N.mean():.4g} for {of_batch.mean():.4g}"


def padding(trial: Trial, exp: Experiment, state: step.State, batch: AnyBatch) -> Verdict:
    """Law 7: the content of padded positions changes no loss, count, gradient or parameter, bit for bit."""
    empty_BL, other = is_padding(batch, "target_BL"), fill_padding(batch, np.random.default_rng(1))
    traces = [jax.device_get(trial(state, b)) for b in (batch, other)]
    if isinstance(traces[0].expert_NBLK, np.ndarray):
        E = len(traces[0].metrics.stats.choices_E[0])
        if (traces[0].expert_NBLK[padding_mask(exp, batch)] < E).any():
            return Verdict(False, "a padded token has been given an expert")
    real = [s._replace(logits_BLV=np.where(empty_BL[..., None], 0, s.logits_BLV), expert_NBLK=None) for s in traces]
    found = worst(*(s._asdict() for s in real))
    where = f"differs in {found.where}" if found.error else f"{int(empty_BL.sum())} of {empty_BL.size} positions tried"
    if found.error:
        return Verdict(False, where)
    sums = at_most(CLOSE, halves(trial, exp, state, batch))
    return Verdict(sums.holds, f"{where}; sums of halves {sums.detail}")


def halves(trial: Trial, exp: Experiment, state: step.State, batch: AnyBatch) -> Worst:
    """Differences between sums over a batch and over its halves, each with padding in place of the other."""
    B, unit = len(batch.target_BL), exp.data.microbatches * rows_of_a_group(exp.model, batch)
    first_B1 = (np.arange(B) < B // (2 * unit) * unit)[:, None]
    if not first_B1.any():  # one routing group, which cannot be cut
        return Worst(0.0, "")
    parts = [keep_rows(batch, rows_B1) for rows_B1 in (first_B1, ~first_B1)]

    def sums(batch: AnyBatch) -> Any:
        trace = jax.device_get(trial(state, batch))
        m = trace.metrics
        return {"targets": m.targets, "nats": m.loss * m.targets, "stats": m.stats, "evaluated": trace.evaluated}

    return worst(sums(batch), jax.tree.map(np.add, *map(sums, parts)))
