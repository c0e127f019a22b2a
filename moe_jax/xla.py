"""Options of XLA's compiler: those that all programs for a TPU get, and those of `config.run.xla`.

`compiler_options(device, wanted)` is for `jax.jit(..., compiler_options=...)`; train, plan and bench compile with it.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

# Grouped matmuls are kernels. Without it the default of some versions of libtpu (0.0.46, 0.0.52) on v5e and v6e is one
# product with the matrices of all experts: E times the work.
ALWAYS: dict[str, Any] = {"xla_tpu_enable_ragged_dot_kernel": True}

# Collectives beside computation, as MaxText's scripts for v5p and v6e set them.
ASYNC_COLLECTIVES: dict[str, Any] = {
    "xla_enable_async_all_gather": True,
    "xla_enable_async_collective_permute": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# KiB of vector memory for one fused computation, by device kind: Marin's for v5p, MaxText's for v6e, and those of
# AI-Hypercomputer's microbenchmarks for tpu7x.
SCOPED_VMEM = {"TPU v5": 50000, "TPU v6 lite": 98304, "TPU7x": 65536}
SETS = ("async_collectives", "scoped_vmem")


def compiler_options(device: Any, wanted: str = "") -> dict[str, Any]:
    """Options to compile programs for this kind of device with; {} for other platforms than TPU.

    wanted: sets of options and single ones, as `config.run.xla` has them. ValueError where the compiler refuses one;
    of those that nobody asked for, an option that it does not know is left out.
    """
    if device.platform != "tpu":
        return {}
    given = parse_options(wanted, device.device_kind)
    for name, value in given.items():
        if refusal := _refusal(device, name, value):
            raise ValueError(f"config.run.xla: {name}={value} is refused for {device.device_kind}: {refusal}")
    return {name: value for name, value in ALWAYS.items() if not _refusal(device, name, value)} | given


def check_options(wanted: str) -> None:
    """Refuses text that is neither sets of options nor options, whatever they are compiled for."""
    for name, equals, _ in _parts(wanted):
        if not (name.startswith("xla_") if equals else name in SETS):
            raise ValueError(
                f"config.run.xla has {(name + equals)[:100]!r}, which is neither a set of options ({', '.join(SETS)}) "
                "nor xla_name=value; separate several by commas."
            )


def parse_options(wanted: str, kind: str) -> dict[str, Any]:
    """Parses "async_collectives,xla_name=value": sets by name, as they are for a device kind, and single options.

    Later ones win. ValueError for a set that has nothing for this kind.
    """
    check_options(wanted)
    found: dict[str, Any] = {}
    for name, equals, value in _parts(wanted):
        found |= {name: option_value(value)} if equals else named_set(name, kind)
    return found


def _parts(wanted: str) -> list[tuple[str, str, str]]:
    """Names, equality signs and values, of every option or set."""
    return [part.strip().partition("=") for part in wanted.split(",") if part.strip()]


def named_set(name: str, kind: str) -> dict[str, Any]:
    """Options of a set, for a device kind; ValueError where nobody has published a value for it."""
    if name == "async_collectives":
        return ASYNC_COLLECTIVES
    if kind not in SCOPED_VMEM:
        raise ValueError(
            f"config.run.xla: scoped_vmem has values for {', '.join(SCOPED_VMEM)}, and none for {kind}; "
            "set xla_tpu_scoped_vmem_limit_kib=N yourself."
        )
    return {"xla_tpu_scoped_vmem_limit_kib": SCOPED_VMEM[kind]}


def option_value(text: str) -> bool | int | str:
    """An option's value: true or false, a whole number, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.removeprefix("-").isdecimal() else text


@cache
def _refusal(device: Any, name: str, value: Any) -> str:
    """Sentence by which the compiler refuses an option; empty where it takes it. A tiny program is compiled."""
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(x).compile(compiler_options={name: value})
    except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
        return str(error).strip().partition("\n")[0][:200]
    return ""
