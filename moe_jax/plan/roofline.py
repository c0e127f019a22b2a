"""The least time that a train step can take: arithmetic, memory and network, each at the peak rate of the chips.

If all three overlap, a step takes as long as the longest; if none do, as long as their sum. These are the bounds.
Nothing is run or compiled.
"""

import dataclasses
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import costs
from moe_jax.config import Experiment
from moe_jax.core import dims
from moe_jax.core.shard import TOKEN_AXES
from moe_jax.core.traffic import Collective
from moe_jax.costs.communication import merged, step
from moe_jax.dispatch import Einsum
from moe_jax.exchanges import AllGather, RaggedAllToAll
from moe_jax.optim import names_of
from moe_jax.plan import torus
from moe_jax.plan.topology import Topology, rings
from moe_jax.step import State, init, state_specs

FLOAT32 = 4


class Timed(NamedTuple):
    """Collectives of one kind in a step, and their time without overlap."""

    what: Collective
    wire: float  # bytes that a device sends
    seconds: float


class Roofline(NamedTuple):
    """Times of a train step on one device, in seconds; `flops` and `executed` are per device too."""

    flops: float  # matmuls of active parameters: forward, and twice that backward
    executed: float  # with recomputation, empty slots, and dispatch by einsum
    memory: dict[str, float]  # bytes read and written, by purpose
    sent: list[Timed]
    compute: float
    hbm: float
    network: float
    tokens: int
    peak: float  # FLOPs a second of a device

    @property
    def parts(self) -> dict[str, float]:
        return {"compute": self.compute, "memory": self.hbm, "network": self.network}

    @property
    def bound(self) -> str:
        """Names the part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def best(self) -> float:
        """Seconds of a step with full overlap."""
        return max(self.parts.values())

    @property
    def worst(self) -> float:
        """Seconds of a step without overlap."""
        return sum(self.parts.values())

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes `seconds` (PaLM, arXiv:2204.02311, app. B)."""
        return self.flops / self.peak / seconds


def roofline(exp: Experiment, on: Topology) -> Roofline:
    """Roofline of an experiment whose mesh fills the topology."""
    chip, B = on.chip, exp.data.B
    cost, peak = costs.flops(exp.model, exp.data.shapes(1)), chip.flops / chip.devices
    executed = (cost.computed(exp.model.remat) + dispatch(exp)) * B / on.devices
    memory, sent = traffic(exp, dict(exp.mesh), cost), timed_collectives(exp, on)
    return Roofline(
        cost.training * B / on.devices,
        executed,
        memory,
        sent,
        compute=executed / peak,
        hbm=sum(memory.values()) / (chip.hbm_rate / chip.devices),
        network=sum(s.seconds for s in sent),
        tokens=cost.tokens * B,
        peak=peak,
    )


def dispatch(exp: Experiment) -> float:
    """FLOPs of a sequence that `Einsum` spends on bringing tokens to slots and back; other dispatchers copy."""
    model = exp.model
    if not isinstance(getattr(model.moe, "dispatch", None), Einsum):
        return 0.0
    sizes, stacks = dict(exp.mesh), model.stacks(exp.data.shapes(1))
    B = exp.data.B // exp.data.microbatches // math.prod(sizes[axis] for axis in TOKEN_AXES)
    C = [s.moe.slots(s.moe.group(B, s.L, training=True)) for s in stacks]
    slots = sum(s.L * s.moe.E * n for s, n in zip(stacks, C, strict=True))
    passes = 3 if model.remat == "none" else 4
    return passes * 2 * 2 * model.D * model.n_moe_layers / len(stacks) * slots


# ---------------------------------------------------------------- memory


def traffic(exp: Experiment, sizes: dict[str, int], cost: costs.Flops) -> dict[str, float]:
    """Least bytes that a device reads and writes in a step, by purpose.

    Every pass reads each matrix, its input rows and output rows; elementwise operations are assumed to be fused.
    """
    model, microbatches, again = exp.model, exp.data.microbatches, exp.model.remat != "none"
    width, tensor = jnp.dtype(model.dtype).itemsize, sizes["tensor"]
    B = exp.data.B / math.prod(n for axis, n in sizes.items() if axis != "tensor")
    stacks = model.stacks(exp.data.shapes(1))
    choices = model.routed.router.K * cost.slots if model.routed else 1

    def tokens(name: str) -> int:
        return next((s.L for s in stacks if name.startswith(s.prefix)), stacks[-1].L)

    params, opt_state = state(exp, sizes)
    found = [matrix(exp, leaf, sizes) for leaf in params if is_matrix(leaf.name, model)]
    weights = sum(m.layers * m.experts * m.D * m.other * (3 + again + (1 + again) * m.fetched) for m in found)
    rows = sum(m.layers * tokens(m.path) * (choices if m.routed else 1) * (m.D + m.other) for m in found)
    scores, logits = costs.score_flops(model, exp.data.shapes(1)), cost.kinds["head"] / (2 * model.D)
    param_bytes, state_bytes = sum(leaf.bytes for leaf in params), sum(leaf.bytes for leaf in opt_state)
    return {
        "weights": float(microbatches * width * weights),
        "activations": B * width * rows * (3 + again),
        "attention scores": B / tensor * scores * (2 * FLOAT32 + 2 * width) * (3 + again),
        "logits": B * logits * 4 * FLOAT32,
        "gradients": param_bytes * (2.0 + 2 * microbatches * (microbatches > 1)),
        "optimizer": 2.0 * (param_bytes + state_bytes),
    }


class Leaf(NamedTuple):
    """One array of a train state, and a device's part of it."""

    path: str
    name: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    bytes: int  # of the local part


@lru_cache(maxsize=8)
def train_state_shapes(exp: Experiment) -> State:
    """Shapes of a train state, which do not depend on the mesh."""
    tx, _ = exp.optim.build(exp.run.steps)
    return jax.eval_shape(partial(init, exp, tx))


def state(exp: Experiment, sizes: dict[str, int]) -> tuple[list[Leaf], list[Leaf]]:
    """Parameters and optimizer state on one device of a mesh."""
    shapes = train_state_shapes(dataclasses.replace(exp, mesh=(), optim=dataclasses.replace(exp.optim, zero1=False)))
    specs = state_specs(exp, shapes, sizes).state

    def leaves(tree: Any, tree_specs: Any) -> list[Leaf]:
        found = []
        for (path, x), spec in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(tree_specs), strict=True):
            local, axes = dims.local_shape(x.shape, spec, sizes), tuple(dims.axes(spec, x.ndim))
            names = names_of(path) or ("",)
            found.append(Leaf("/".join(names), names[-1], x.shape, local, axes, math.prod(local) * x.dtype.itemsize))
        return found

    return leaves(shapes.params, specs.params), leaves(shapes.opt_state, specs.opt_state)


def is_matrix(name: str, model: Any) -> bool:
    """Tells whether tokens are multiplied with a parameter of this name."""
    letters = dims.dims_of(name)
    looked_up = letters == "VD" and not model.tied
    return bool(dims.fsdp_dim(letters.removeprefix("E"))) and not looked_up


class Matrix(NamedTuple):
    """A parameter as a device multiplies with it: `layers` x `experts` matrices of D (or a latent's rank) x other."""

    path: str
    layers: int
    experts: int
    D: int
    other: int
    fetched: bool  # gathered from other devices: written before it is read
    routed: bool  # its rows are those of experts


def matrix(exp: Experiment, leaf: Leaf, sizes: dict[str, int]) -> Matrix:
    letters = dims.dims_of(leaf.name)
    n, front, width = len(letters), len(leaf.shape) - len(letters), dims.fsdp_dim(letters)
    local, full = dict(zip(letters, leaf.local[-n:], strict=True)), dict(zip(letters, leaf.shape[-n:], strict=True))
    routed = letters.startswith("E")
    gathers = routed and isinstance(exp.exchange, AllGather)
    experts = (full if gathers else local)["E"] if routed else 1
    held = math.prod(local[c] for c in letters if c != width and not (routed and c == "E"))
    fetched = local[width] < full[width] or (gathers and local["E"] < full["E"])
    return Matrix(leaf.path, math.prod(leaf.local[:front]), experts, full[width], held, fetched, routed)


# ---------------------------------------------------------------- network


def timed_collectives(exp: Experiment, on: Topology) -> list[Timed]:
    """Collectives that `communication.step` predicts, with their times on the links of their axes."""
    sizes = dict(exp.mesh)
    found = merged(step(exp, sizes, "tpu"), where=True)
    return sorted((timed(c, exp, on, sizes) for c in found if c.axes and c.bytes), key=lambda s: -s.seconds)


def network_seconds(found: list[Collective], exp: Experiment, on: Topology) -> float:
    """Seconds of a program's collectives, one after another; the compiler may have chosen others than predicted."""
    return sum(timed(c, exp, on, dict(exp.mesh)).seconds for c in merged(found) if c.axes and c.bytes)


def timed(c: Collective, exp: Experiment, on: Topology, sizes: dict[str, int]) -> Timed:
    """Times one kind of collective, without other traffic on the network."""
    moe = exp.model.routed
    wire = c.wire * (expected(c, moe.exchange, moe.E, moe.distinct) if moe else 1.0)
    inside = tuple(axis for axis in c.axes if axis != "slice")
    here = rings(on, sizes, inside) if inside else ()
    took = torus.collective_seconds(c.op, wire * on.chip.devices, here, on.chip.link)
    if "slice" in c.axes:
        took += across(c, wire, on, math.prod(sizes[a] for a in inside)) / on.chip.dcn
    return Timed(c, wire, took)


def across(c: Collective, wire: float, on: Topology, inside: int) -> float:
    """Bytes that a chip sends to other slices: reductions and gathers cross once per slice."""
    part = (on.slices - 1) / on.slices * c.size / (c.size - 1)
    return wire * part * on.chip.devices / (1 if c.op.endswith("all-to-all") else inside)


def used_fraction(exp: Experiment) -> float:
    """Fraction of the rows of MoE layers that hold a token where loads are balanced: the rest is room."""
    moe, X = exp.model.routed, math.prod(dict(exp.mesh)[axis] for axis in exp.exchange.over)
    if moe is None or X == 1 or not isinstance(moe.exchange, RaggedAllToAll):
        return 1.0
    return min(1.0, 1 / float(moe.exchange.relative_room(X, moe.E, moe.distinct)))


def expected(c: Collective, exchange: Any, E: int, distinct: int = 1) -> float:
    """Fraction of the reserved bytes that travel: a ragged exchange reserves far more than balanced rows.

    E, distinct: see `RaggedAllToAll.room`.
    """
    if c.op != "ragged-all-to-all" or not isinstance(exchange, RaggedAllToAll):
        return 1.0
    return min(1.0, 2 / (1 + float(exchange.relative_room(c.size, E, distinct))))  # there and back
