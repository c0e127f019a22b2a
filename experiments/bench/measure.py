"""Rows of the table: one layer, by one routing and one dispatcher, against its dense baseline."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.bench import stages, timing
from experiments.bench.layers import (
    Passes,
    Placement,
    baseline_inputs,
    baseline_passes,
    batched_passes,
    layer_inputs,
    layer_passes,
)
from experiments.bench.record import PASSES
from experiments.bench.shapes import GiB, Shape, masks_bytes
from experiments.bench.tokens import ROUTINGS, Tokens
from experiments.bench.work import work
from moe_jax.dispatch import Einsum
from moe_jax.moe import check_mesh


@dataclasses.dataclass(frozen=True)
class Job:
    """A job: layers to measure, and their placement."""

    shapes: dict[str, Shape]
    routings: tuple[str, ...]
    dispatchers: dict[str, Any]
    placement: Placement = Placement()
    mesh: str = ""  # as given on the command line
    repeats: int = 15
    patience: float = timing.PATIENCE
    stages: bool = False

    def check(self) -> None:
        """Refuses, before anything is compiled, shapes that do not fit the mesh."""
        for shape in self.shapes.values() if self.placement.mesh else ():
            for dispatch in self.dispatchers.values():
                check_mesh(shape.layer(dispatch), dict(self.placement.mesh.shape), shape.D)
            if shape.T // shape.L % self.placement.shards:
                raise ValueError(
                    f"{shape.name} has {shape.T // shape.L} sequences, which do not spread evenly over "
                    f"{self.placement.shards} shards; choose other --shapes, or another --mesh."
                )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields measurements; a dense baseline is compiled once per shape, a layer once for all routings."""
        self.check()
        for shape in self.shapes.values():
            tokens = {name: ROUTINGS[name](shape) for name in self.routings}
            baseline_args = baseline_inputs(shape, self.placement)
            dense = baseline_passes(shape, self.placement, *baseline_args)
            least = None if self.placement.mesh else self.batched(shape, dense, baseline_args)
            for name, dispatch in self.dispatchers.items():
                if self.fits(shape, name, dispatch):
                    for row in self.layer_rows(shape, name, dispatch, tokens, dense, baseline_args):
                        yield row | {"batched": least}

    def batched(self, shape: Shape, dense: Passes, baseline_args: Any) -> dict[str, float]:
        """tau of the experts' matmuls alone: that of a layer with free routing and moving of rows."""
        passes, inputs = batched_passes(shape)
        calls = ((layer.bind(*inputs), base.bind(*baseline_args)) for layer, base in zip(passes, dense, strict=True))
        return {what: self.compare(c)["tau"] for what, c in zip(PASSES, calls, strict=True)}

    def compare(self, calls: tuple[Callable, Callable]) -> dict[str, Any]:
        """Times of a layer and of its dense baseline, see `timing.compare`."""
        return timing.compare(timing.in_turn(calls, self.repeats, self.patience, timing.in_a_row()))

    def fits(self, shape: Shape, name: str, dispatch: Any) -> bool:
        """Tells whether dense masks are small enough; prints a line if not."""
        if not isinstance(dispatch, Einsum):
            return True
        C = dispatch.slots(shape.L, shape.K, shape.E)
        if (size := masks_bytes(shape, C)) <= GiB:
            return True
        say(f"{shape.name} {name}: left out, its masks take {size / GiB:.1f} GiB")
        return False

    def layer_rows(
        self, shape: Shape, name: str, dispatch: Any, tokens: dict[str, Tokens], dense: Passes, baseline_args: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields a row for each routing."""
        cfg, passes, inputs, known = shape.layer(dispatch), None, None, {}
        for routing, given in tokens.items():
            inputs = layer_inputs(cfg, shape, given, self.placement, inputs and inputs[0])
            passes = passes or layer_passes(cfg, self.placement, *inputs)
            count_GE = given.count_GE(shape.L)
            row: dict[str, Any] = {"shape": shape.name, "routing": routing, "dispatch": name, "mesh": self.mesh}
            row["load"] = given.load
            sharded = bool(self.placement.here(cfg.exchange).experts)
            row |= work(cfg, shape, count_GE, jax.default_backend(), sharded, self.placement.shards)
            for what, layer, base in zip(("forward", "both"), passes, dense, strict=True):
                row[what] = self.compare((layer.bind(*inputs), base.bind(*baseline_args)))
            row["compile_seconds"] = {"layer": passes.seconds, "dense": dense.seconds}
            row["temp_bytes"] = {"layer": passes.both.temp_bytes, "dense": dense.both.temp_bytes}
            if self.stages:
                row["stages"] = stages.measure(cfg, shape, given, self.placement, inputs, self.repeats, known)
            say(f"{shape.name} {routing} {name}: {row['forward']['tau']:.2f} forward, {row['both']['tau']:.2f} both")
            yield row


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
