"""Law 6 of an experiment: its compiled train step sends what its config predicts, byte for byte."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax

from moe_jax import step
from moe_jax.audit.hlo import collectives
from moe_jax.config import Experiment
from moe_jax.core.traffic import Collective
from moe_jax.costs.communication import merged, passes
from moe_jax.data import AnyBatch


class ComparedCollective(NamedTuple):
    """Collectives of one kind over the same axes, in one pass of a train step; 0 and 0 where there are none."""

    part: str
    predicted: Collective
    compiled: Collective

    @property
    def holds(self) -> bool:
        """Tells whether both move the same bytes; their number depends on which ones XLA combines."""
        return self.predicted.bytes == self.compiled.bytes

    @property
    def detail(self) -> str:
        """Describes what is wrong, and where; "" if nothing is."""
        predicted, compiled = self.predicted, self.compiled
        if self.holds:
            return ""
        what = f"{compiled.op} over {' x '.join(compiled.axes)}"
        if not predicted.bytes:
            return f"{what}: {compiled.bytes} bytes that nothing predicts, at {compiled.where}"
        if not compiled.bytes:
            return f"{what}: {predicted.bytes} bytes are predicted for {predicted.where}, and the program has none"
        return (
            f"{what}: {predicted.bytes} bytes are predicted for {predicted.where}, "
            f"and the program has {compiled.bytes}, at {compiled.where}"
        )


def compare_collectives(
    predicted: Iterable[Collective], compiled: Iterable[Collective], part: str = ""
) -> list[ComparedCollective]:
    """Compares by op and axes; collectives without axes send nothing and are left out."""
    sides = [{(c.op, c.axes): c for c in grouped(side)} for side in (predicted, compiled)]
    kinds = sorted({kind for side in sides for kind in side})
    return [ComparedCollective(part, *(side.get(kind, empty(*kind, sides)) for side in sides)) for kind in kinds]


def grouped(found: Iterable[Collective]) -> list[Collective]:
    """Sums by op and axes, with all their origins."""
    found = [c for c in found if c.axes]
    origins: dict[tuple, list[str]] = {}
    for c in merged(found, where=True):
        if c.count or c.bytes:
            origins.setdefault((c.op, c.axes), []).append(c.where)
    return [c._replace(where="; ".join(origins[c.op, c.axes])) for c in merged(found) if c.count or c.bytes]


def empty(op: str, axes: tuple[str, ...], sides: list[dict]) -> Collective:
    """Returns a collective of this kind with count and bytes 0."""
    return Collective(op, axes, next(side[op, axes].size for side in sides if (op, axes) in side), 0, 0)


def subtract(program: list[Collective], part: list[Collective]) -> list[Collective]:
    """Subtracts the collectives of a part of a program."""
    return program + [c._replace(count=-c.count, bytes=-c.bytes) for c in part]


def audit(
    exp: Experiment, batch: AnyBatch | None = None, devices: Sequence[jax.Device] | None = None
) -> list[ComparedCollective]:
    """Compares prediction and program pass by pass: "forward", "backward" (with it, less without), "step" (all of it).

    batch: shapes of a batch; by default the experiment's. devices: to compile for; by default all devices.
    """
    program = step.Program(exp, devices=devices)
    shapes, sizes = batch or exp.data.shapes(), dict(program.mesh.shape)

    def compiled(lowered: jax.stages.Lowered) -> list[Collective]:
        return collectives(lowered.compile().as_text() or "", program.mesh)

    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=program.rows), shapes)
    gradients = partial(step.gradients, exp, program.specs)
    with jax.set_mesh(program.mesh):
        parts = (lambda *given: gradients(*given)[1], gradients)
        forward, both = (compiled(jax.jit(part).lower(program.abstract_state(), rows)) for part in parts)
    expected = passes(exp, sizes, program.mesh.devices.flat[0].platform)
    return [
        *compare_collectives(expected.forward, forward, "forward"),
        *compare_collectives(expected.backward, subtract(both, forward), "backward"),
        *compare_collectives([c for part in expected for c in part], compiled(program.lower(shapes)), "step"),
    ]
