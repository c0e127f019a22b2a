"""A train step compiled for a slice of a TPU pod by the TPU's own compiler; no TPU is needed, only libtpu."""

import importlib.util
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from moe_jax import step
from moe_jax.audit.hlo import collectives
from moe_jax.config import Experiment
from moe_jax.core.traffic import Collective
from moe_jax.costs.chips import by_device_kind
from moe_jax.plan.kernels import Fills, Kernels, kernels, odd_fills
from moe_jax.plan.overlap import CLOCKS, Overlap, overlaps
from moe_jax.plan.roofline import used_fraction
from moe_jax.plan.schedule import Schedule
from moe_jax.plan.topology import topology as parse_topology

# Read by libtpu when it is loaded: no lock between processes, no queries to a cloud's metadata server.
ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The memory "required for HLO temporaries" counts arguments too.
REFUSED = (
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


class Compiled(NamedTuple):
    """Compiled train step as the compiler reports it: bytes and FLOPs of one device, None where it reports none."""

    fits: bool
    limit: int | None  # bytes that a program may use
    peak: int  # bytes that it needs, arguments and temporaries; rounded where it does not fit
    over: int  # bytes over the limit
    arguments: int | None  # parameters, optimizer state and batch
    temporaries: int | None  # peak of temporaries
    output: int | None
    alias: int | None  # of the output, bytes that reuse arguments
    collectives: list[Collective]
    flops: float | None  # of matrix multiplications, loops by their trips
    optimal_seconds: float | None  # estimated for compute and HBM of the whole schedule, loops by their trips
    overlaps: list[Overlap]
    lower_seconds: float  # to trace
    compile_seconds: float
    host_bytes: int  # peak memory of this process
    kernels: tuple[Kernels, ...] = ()  # without an estimate: not in optimal_seconds
    fills: Fills | None = None  # of memory, whose estimate is odd: in optimal_seconds

    @property
    def scheduled(self) -> float | None:
        """Seconds of compute and memory: the compiler's estimate of its schedule, and ours of its kernels."""
        if self.optimal_seconds is None:
            return None
        return self.optimal_seconds + sum(k.seconds for k in self.kernels)

    @property
    def without_fills(self) -> float | None:
        """`scheduled`, with oddly priced fills at the memory's bandwidth instead; None where there are none."""
        if self.scheduled is None or self.fills is None or not self.fills.count:
            return None
        return self.scheduled - self.fills.seconds + self.fills.at_bandwidth


def available() -> str | None:
    """Names what is missing to compile for TPUs; None if nothing is."""
    if importlib.util.find_spec("libtpu") is None:
        return "the TPU compiler is not installed (Linux only): pip install .[tpu]"
    return None


@cache
def devices(topology: str) -> tuple[jax.Device, ...]:
    """Devices of a slice like "v4:8x8x16", or of several, "2*v5e:16x16"; for compilation only.

    ValueError without libtpu, and for an unknown slice.
    """
    if missing := available():
        raise ValueError(f"{topology} cannot be compiled for: {missing}.")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:  # type: ignore[attr-defined] # with libtpu, JAX would look for a TPU here
        jax.config.update("jax_platforms", "cpu")
    many, _, name = topology.rpartition("*")
    given = slice_options(name) | ({"num_slices": int(many)} if many else {})
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **given)
    except Exception as error:
        raise ValueError(f"libtpu knows no slice {topology!r}: {first_line(error)}") from None
    return tuple(found.devices)


def slice_options(name: str) -> dict[str, Any]:
    """Options of libtpu for one slice, `v5p:4x4x4`: two cores of a v4 are one device, and sides close that do.

    libtpu takes a 3D slice to be open unless told so; 2D slices close as they are sold.
    """
    found: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        on = parse_topology(name)
    except ValueError:  # libtpu may know others
        return found
    return found | ({"wrap": on.closed} if len(on.shape) == 3 and all(on.closed) else {})


def compile_step(exp: Experiment, topology: str, options: Mapping[str, Any] | None = None) -> Compiled:
    """The experiment's train step, as training runs it, compiled for a slice that its mesh fills.

    options: of the compiler, like {"xla_tpu_enable_async_all_to_all": True}. ValueError where compilation fails for
    a reason other than memory.
    """
    began = time.monotonic()
    program = step.Program(exp, devices=devices(topology))
    lowered = program.lower(exp.data.shapes())
    lowering, began = time.monotonic() - began, time.monotonic()
    try:
        made = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        return refused(error, topology, lowering, time.monotonic() - began)
    return read_report(made, program.mesh, lowering, time.monotonic() - began, used_fraction(exp))


def read_report(
    made: jax.stages.Compiled, mesh: jax.sharding.Mesh, lowering: float, compiling: float, used: float = 1.0
) -> Compiled:
    """Reads the report of a compiled step; used: fraction of the rows of MoE layers that hold a token."""
    text, kind = made.as_text() or "", mesh.devices.flat[0].device_kind
    memory: Any = made.memory_analysis()
    schedule, clock, known = Schedule.of(text), CLOCKS.get(kind), by_device_kind(kind)
    # Newer compilers report the total allocation; their peak leaves out gaps between buffers.
    peak = getattr(memory, "total_allocation_bytes", 0) or memory.peak_memory_in_bytes
    return Compiled(
        fits=True,
        limit=int(known.usable) if known else None,
        peak=peak,
        over=0,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        collectives=collectives(text, mesh),
        flops=schedule.flops,
        optimal_seconds=schedule.cycles / clock if clock else None,
        overlaps=overlaps(schedule, clock),
        lower_seconds=lowering,
        compile_seconds=compiling,
        host_bytes=host_bytes(),
        kernels=tuple(kernels(schedule, known, used)) if known else (),
        fills=odd_fills(schedule, known, clock) if known and clock else None,
    )


def refused(error: Exception, topology: str, lowering: float, compiling: float) -> Compiled:
    """Reads the compiler's refusal of a step that does not fit; ValueError for any other error."""
    found = next((m for pattern in REFUSED if (m := pattern.search(str(error)))), None)
    if found is None:
        raise ValueError(f"The TPU compiler refuses this step for {topology}: {first_line(error)}") from None
    peak, limit = (int(float(n) * UNITS[unit]) for n, unit in (found.groups()[:2], found.groups()[2:]))
    return Compiled(
        fits=False,
        limit=limit,
        peak=peak,
        over=peak - limit,
        collectives=[],
        overlaps=[],
        lower_seconds=lowering,
        compile_seconds=compiling,
        host_bytes=host_bytes(),
        arguments=None,
        temporaries=None,
        output=None,
        alias=None,
        flops=None,
        optimal_seconds=None,
    )


def first_line(error: Exception) -> str:
    """First line of an error's message, without the compiler's internals."""
    return str(error).strip().partition("\n")[0][:300]


def host_bytes() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
