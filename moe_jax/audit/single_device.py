"""Checks of laws 4, 7 and 8 of an experiment, and of microbatches, on one device."""

import dataclasses
from typing import Any

import jax
import numpy as np

from moe_jax import step
from moe_jax.audit.meshes import CLOSE, StepTrace, Trial, Worst, at_most, compare_with_one_device, on_one_device, worst
from moe_jax.audit.routing import ROUNDING, Verdict
from moe_jax.audit.samples import fill_padding, is_padding, keep_rows, padding_mask
from moe_jax.audit.shrink import rows_of_a_group
from moe_jax.config import Experiment
from moe_jax.core.stats import Stats
from moe_jax.data import AnyBatch, Images
from moe_jax.losses import is_additive


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


def drops(trace: StepTrace) -> Verdict:
    """Law 8: evaluation drops nothing."""
    stats = trace.evaluated.stats
    if stats is None:
        return Verdict(True, "nothing routes")
    asked_N = np.asarray(stats.choices_E, np.float64).sum(-1)
    lost = float(np.abs(asked_N - stats.kept).sum())
    return Verdict(lost <= CLOSE * asked_N.sum(), f"{lost:.0f} of {asked_N.sum():.0f} in evaluation")


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
    of_batch, *of_parts = (np.asarray(loss(s, router_state, cfg.router)) for s in (whole, *parts))
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
