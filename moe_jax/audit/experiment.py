"""Every law, tried on one experiment."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax.audit import meshes, single_device
from moe_jax.audit.dispatchers import dispatchers
from moe_jax.audit.laws import law
from moe_jax.audit.routing import Verdict, batch_independent, causal, trainable
from moe_jax.audit.samples import sample
from moe_jax.audit.slopes import gradients_are_slopes
from moe_jax.config import Experiment

D = 8  # width of a layer in its own trials
TRIAL_TOKENS = 50_000  # in all trials of a layer


class Finding(NamedTuple):
    """Finding about a law: the result, where it was tried, and whether the config claims the law."""

    law: str
    subject: str
    claimed: bool
    verdict: Verdict

    @property
    def broken(self) -> bool:
        return self.claimed and not self.verdict.holds


def findings(exp: Experiment, small: Experiment, devices: list[jax.Device]) -> Iterator[Finding]:
    """Yields all findings of an experiment, the cheap ones first; small: the experiment shrunk for these devices."""
    yield from routing_findings(exp, small)
    yield from mesh_findings(small, devices)


def mesh_findings(exp: Experiment, devices: list[jax.Device]) -> Iterator[Finding]:
    """Yields findings on laws 1, 4, 5, 7 and 8 of an experiment that fits on these devices."""
    state, batch = meshes.start(exp), sample(exp)
    trial = meshes.Trial(meshes.on_one_device(exp), devices[:1])
    one = jax.device_get(trial(state, batch))
    yield Finding(law(7).name, "one device", True, single_device.padding(trial, exp, state, batch))
    if exp.data.objective.batch_kind != "images":  # images have no order
        verdict = single_device.step_is_causal(trial, exp, state, batch)
        yield Finding(law(4).name, "the whole model", exp.model.causal, verdict)
    yield Finding(law(8).name, "one device", True, single_device.drops(one))
    if (found := single_device.microbatches(exp, state, batch, devices)) is not None:
        yield Finding("one batch, any microbatches", "one device", True, together(found))
    for name, on_mesh in meshes.meshes(exp, devices):
        many = meshes.run_on(on_mesh, state, batch, devices)
        yield Finding(law(1).name, name, True, together(meshes.compare_with_one_device(one, many, state)))
    name, on_mesh = next(meshes.meshes(exp, devices), ("", exp))
    if name:
        used = devices[: math.prod(n for _, n in on_mesh.mesh)]
        yield Finding(law(5).name, name, True, meshes.replicas(on_mesh, state, batch, used))


def together(verdicts: dict[str, Verdict]) -> Verdict:
    """Merges verdicts into one; those that do not hold come first."""
    order = sorted(verdicts, key=lambda name: verdicts[name].holds)
    words = [f"{'' if verdicts[name].holds else 'NOT '}{name} {verdicts[name].detail}" for name in order]
    return Verdict(all(v.holds for v in verdicts.values()), "; ".join(words))


def routing_findings(exp: Experiment, small: Experiment) -> Iterator[Finding]:
    """Yields findings on laws 2, 3 and 4 of an experiment's layer, at the widths of the small one and full length."""
    cfg, length = small.model.routed, max(s.L for s in exp.model.stacks(exp.data.shapes(1)))
    if cfg is None:
        return
    cfg = dataclasses.replace(cfg, S=exp.model.moe.S)
    sizes = {"B": max(2, cfg.sequences(length)), "L": length, "D": D}
    trials = max(20, min(200, TRIAL_TOKENS // (sizes["B"] * length)))
    yield Finding(law(2).name, "training", True, dispatchers(cfg, **sizes))
    yield Finding(law(3).name, "training", True, trainable(cfg, **sizes))
    yield Finding(law(3).name, "gradients", True, gradients_are_slopes(cfg))
    modes = {"training": (cfg, True), "evaluation": (cfg, False)}
    if cfg.dropless() != cfg:
        modes["evaluation without a limit"] = (cfg.dropless(), False)
    for mode, (layer, training) in modes.items():
        verdict = causal(layer, training, **sizes, trials=trials)
        yield Finding(law(4).name, mode, exp.model.causal, verdict)
    for mode, (layer, training) in modes.items():
        verdict = batch_independent(layer, training, **sizes, trials=trials)
        yield Finding("batch-independent", mode, False, verdict)
