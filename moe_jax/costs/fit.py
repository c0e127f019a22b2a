"""The memory of a device against what a train step needs by arithmetic, before anything is allocated or compiled."""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping

import jax

from moe_jax.config import Experiment
from moe_jax.costs.activations import FLOAT
from moe_jax.costs.chips import CHIPS
from moe_jax.costs.memory import activation_memory, memory
from moe_jax.costs.parameters import parameters

MOST = 6  # times a parameter is held, unsharded: itself, its gradients, moments, updates
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, 1


def check_fits(exp: Experiment, sizes: Mapping[str, int], room: float) -> None:
    """ValueError where an experiment cannot be trained on a mesh of these sizes with `room` bytes on each device.

    What can be seen at once is: parameters alone, if they were sharded over all devices, and activations alone. Where
    these do not settle it, the largest phase of a step decides, see `costs.memory`, whose parameters are traced.
    """
    devices, count = math.prod(sizes.values()), parameters(exp.model).total
    where = f"on each of {devices:,} devices" if devices > 1 else "on the device"
    if (needed := FLOAT * count // devices) > room:
        what = f"its {_short(count)} parameters alone take {size_words(needed)} {where}"
    elif (activations := activation_memory(exp, sizes)) > room:
        what = f"the activations of a step alone take {size_words(activations)} {where}"
    elif MOST * FLOAT * count + activations > room and (needed := memory(exp, sizes).total) > room:
        what = f"a train step of its {_short(count)} parameters takes {size_words(needed)} {where}"
    else:
        return
    raise ValueError(
        f"The model cannot fit: {what}, where there are {size_words(room)}; make it or its batch smaller, shard it "
        "over more devices (config.mesh.fsdp, expert, tensor), or say --force to try it."
    )


def check_size(exp: Experiment) -> None:
    """ValueError where the parameters alone are more than all memory of the largest slice of `CHIPS` could hold."""
    largest = max(CHIPS, key=lambda chip: chip.largest * chip.hbm)
    needed, room = FLOAT * parameters(exp.model).total, largest.largest * largest.hbm
    if needed > room:
        raise ValueError(
            f"The model fits nowhere: its parameters alone take {size_words(needed)}, and the largest slice known, "
            f"{largest.largest:,} chips of {largest.name}, has {size_words(room)}; make the model smaller."
        )


def device_memory() -> float:
    """Bytes of memory of a local device: what its driver says; of a CPU its share of the machine's, inf if unknown."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":
        return host_memory() / jax.local_device_count()
    return float(limit or math.inf)


def host_memory() -> float:
    """Bytes of memory of this machine, or of the part of it that this process may use; inf where neither is known."""
    found = [math.inf]
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in map(pathlib.Path, CGROUPS):
        with contextlib.suppress(ValueError, OSError):  # "max" is no limit
            found.append(int(file.read_text()))
    return float(min(found))


def size_words(size: float | int) -> str:
    """3221225472 as "3.0 GiB"."""
    power = 0
    while size >= 1024 and power + 1 < len(UNITS):
        size, power = size / 1024, power + 1
    return f"{size:,.1f} {UNITS[power]}" if size < 1e6 else f"{size:.1e} {UNITS[power]}"


def _short(count: int) -> str:
    return f"{count:,}" if count < 1e15 else f"{float(count):.1e}"
