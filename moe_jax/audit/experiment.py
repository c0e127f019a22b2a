"""Every law, tried on one experiment."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax.audit import meshes, single_device
from moe_jax.audit.counts import routing_counts
from moe_jax.audit.dispatchers import dispatchers
from moe_jax.audit.laws import law
from moe_jax.audit.routing import Verdict, batch_independent, causal, trainable
from moe_jax.audit.samples import sample
from moe_jax.audit.slopes import gradients_are_slopes
from moe_jax.config import Experiment
from moe_jax.data import AnyBatch, Images
from moe_jax.step import State

D = 8  # width of a layer in its own trials
TRIAL_TOKENS = 50_000  # in all trials of a layer
FEWEST = 20  # trials of a layer


class Scope(NamedTuple):
    """Selection of what an audit tries.

    laws: their numbers; empty for all, and for what is found besides the laws.
    quick: only the experiment's own mesh, few trials of a layer, and the laws alone.
    """

    laws: frozenset[int] = frozenset()
    quick: bool = False

    def tries(self, number: int) -> bool:
        """Tells whether a law is tried."""
        return not self.laws or number in self.laws

    @property
    def besides(self) -> bool:
        """Tells whether properties are tried that are no laws."""
        return not self.laws and not self.quick


EVERYTHING = Scope()


class Finding(NamedTuple):
    """Finding about a law: the result, where it was tried, and whether the config claims the law."""

    law: str
    subject: str
    claimed: bool
    verdict: Verdict

    @property
    def broken(self) -> bool:
        return self.claimed and not self.verdict.holds


def findings(
    exp: Experiment, small: Experiment, devices: list[jax.Device], scope: Scope = EVERYTHING
) -> Iterator[Finding]:
    """Yields all findings of an experiment, the cheap ones first; small: the experiment shrunk for these devices."""
    yield from routing_findings(exp, small, scope)
    yield from model_findings(small, devices, scope)


def model_findings(exp: Experiment, devices: list[jax.Device], scope: Scope = EVERYTHING) -> Iterator[Finding]:
    """Yields findings on laws 1, 4, 5, 7, 8 and 11 of an experiment that fits on these devices."""
    if not any(map(scope.tries, (1, 4, 5, 7, 8, 11))):
        return
    state, batch = meshes.start(exp), sample(exp)
    trial = meshes.Trial(meshes.on_one_device(exp), devices[:1])  # compiled where it is first run
    yield from device_findings(trial, exp, state, batch, scope)
    if scope.tries(1):
        if (found := single_device.microbatches(exp, state, batch, devices)) is not None:
            yield Finding("one batch, any microbatches", "one device", True, together(found))
        one = jax.device_get(trial(state, batch))
        for name, on_mesh in itertools.islice(meshes.meshes(exp, devices), 1 if scope.quick else None):
            many = meshes.run_on(on_mesh, state, batch, devices)
            yield Finding(law(1).name, name, True, together(meshes.compare_with_one_device(one, many, state)))
    name, on_mesh = next(meshes.meshes(exp, devices), ("", exp))
    if name and scope.tries(5):
        used = devices[: math.prod(n for _, n in on_mesh.mesh)]
        yield Finding(law(5).name, name, True, meshes.replicas(on_mesh, state, batch, used))


def device_findings(
    trial: meshes.Trial, exp: Experiment, state: State, batch: AnyBatch, scope: Scope
) -> Iterator[Finding]:
    """Yields findings on laws 4, 7, 8 and 11, for which one device is enough."""
    ordered = not isinstance(batch, Images)  # images have no order, and no documents
    if scope.tries(7):
        yield Finding(law(7).name, "one device", True, single_device.padding(trial, exp, state, batch))
    if scope.tries(4) and ordered:
        verdict = single_device.step_is_causal(trial, exp, state, batch)
        yield Finding(law(4).name, "the whole model", exp.model.causal, verdict)
    if scope.tries(11) and ordered:
        apart = exp.model.routed is None or exp.model.routed.traits.causal
        yield Finding(law(11).name, "the whole model", apart, single_device.documents(exp, state, batch))
    if scope.tries(8):
        verdict = single_device.drops(exp, state, jax.device_get(trial(state, batch)))
        yield Finding(law(8).name, "one device", True, verdict)


def together(verdicts: dict[str, Verdict]) -> Verdict:
    """Merges verdicts into one; those that do not hold come first."""
    order = sorted(verdicts, key=lambda name: verdicts[name].holds)
    words = [f"{'' if verdicts[name].holds else 'NOT '}{name} {verdicts[name].detail}" for name in order]
    return Verdict(all(v.holds for v in verdicts.values()), "; ".join(words))


def routing_findings(exp: Experiment, small: Experiment, scope: Scope = EVERYTHING) -> Iterator[Finding]:
    """Yields findings on laws 2, 3, 4 and 8 of an experiment's layer, at small widths and full length."""
    cfg, length = small.model.routed, max(s.L for s in exp.model.stacks(exp.data.shapes(1)))
    if cfg is None:
        return
    cfg = dataclasses.replace(cfg, S=exp.model.moe.S)
    sizes = {"B": max(2, cfg.sequences(length)), "L": length, "D": D}
    trials = FEWEST if scope.quick else max(FEWEST, min(200, TRIAL_TOKENS // (sizes["B"] * length)))
    if scope.tries(2):
        yield Finding(law(2).name, "training", True, dispatchers(cfg, **sizes))
    if scope.tries(3):
        yield Finding(law(3).name, "training", True, trainable(cfg, **sizes))
        yield Finding(law(3).name, "gradients", True, gradients_are_slopes(cfg))
    if scope.tries(8):
        yield Finding(law(8).name, "training", True, routing_counts(cfg, **sizes))
    modes = {"training": (cfg, True), "evaluation": (cfg, False)}
    if cfg.dropless() != cfg:
        modes["evaluation without a limit"] = (cfg.dropless(), False)
    for mode, (layer, training) in modes.items() if scope.tries(4) else ():
        verdict = causal(layer, training, **sizes, trials=trials)
        yield Finding(law(4).name, mode, exp.model.causal, verdict)
    for mode, (layer, training) in modes.items() if scope.besides else ():
        verdict = batch_independent(layer, training, **sizes, trials=trials)
        yield Finding("batch-independent", mode, False, verdict)
