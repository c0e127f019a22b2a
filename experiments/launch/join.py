"""One process among several: it meets the others, and ends with them."""

import contextlib
import functools
import os
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import cloud_tpu_init, distributed  # whatever asks jax itself would start the devices
from jax._src.clusters import GceTpuCluster, GkeTpuCluster

LOOK = 1.0  # seconds between two looks at the others
DAY = 24 * 3600 * 1000  # milliseconds
PATIENCE = 10.0  # seconds that a failed process waits for what the others say
FAILED, SAID, LEFT = "moe_jax/failed/", "moe_jax/said/", "moe_jax/left/"  # keys of the coordinator
PROPOSED = "moe_jax/proposed/"
MET = threading.Event()  # there are others, and a connection to them
ENDING = threading.Lock()  # held by the thread that ends this process


class Place(NamedTuple):
    """Number of this process, and of all."""

    process: int = 0
    processes: int = 1


def connect(coordinator: str | None, place: Place, timeout: int) -> None:
    """Joins the others at HOST:PORT (None: where jax finds them on Cloud TPU), before any device is touched.

    A process that gives no sign for `timeout` seconds ends all. ValueError where they do not meet.
    """
    where: dict[str, Any] = {}
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator={coordinator} is no address; give the HOST:PORT of process 0.")
        where = {"coordinator_address": coordinator, "num_processes": place.processes, "process_id": place.process}
        where["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=timeout)
    except RuntimeError as error:
        raise ValueError(
            f"Process {place.process} of {place.processes} did not meet the others at {coordinator} "
            f"({' '.join(str(error).split())[:100]}); start all of them, with a port that is free."
        ) from error
    if place.processes > 1:
        MET.set()
        threading.Thread(target=_watch, daemon=True).start()


@functools.cache
def tpu_place() -> Place:
    """This host's place in its Cloud TPU slices, by their environment; the devices are not touched."""
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if not cloud_tpu_init.running_in_cloud_tpu_vm or platforms.startswith("cpu"):
        return Place()
    try:
        for cluster in (GkeTpuCluster, GceTpuCluster):
            if cluster.is_env_present():
                return Place(cluster.get_process_id(), cluster.get_process_count())
    except OSError:  # no metadata server: a host by itself
        pass
    return Place()


def connected() -> bool:
    """Tells whether this is one of several connected processes."""
    return MET.is_set()


def meet(name: str) -> None:
    """Waits, a day at most, until every process is here."""
    if (client := _client()) is not None:
        client.wait_at_barrier(f"moe_jax/{name}", DAY)


def agree(what: str, value: str) -> None:
    """ValueError where process 0 has another value, which would train another model without a word."""
    if (client := _client()) is None:
        return
    process = distributed.global_state.process_id
    if process == 0:
        client.key_value_set(f"moe_jax/{what}", value)
    elif client.blocking_key_value_get(f"moe_jax/{what}", DAY) != value:
        raise ValueError(
            f"The {what} of process {process} is not that of process 0; give all the same flags and files."
        )


def propose(what: str, value: str) -> None:
    """Proposes a value to all processes; the first one that any of them proposes holds."""
    with contextlib.suppress(RuntimeError):  # there is one already
        _client().key_value_set(f"{PROPOSED}{what}/value", value)


def proposed(what: str) -> str | None:
    """The value that holds, the same for all processes; None as long as nobody has proposed one."""
    found = _client().key_value_dir_get(f"{PROPOSED}{what}/")
    return found[0][1] if found else None


# ---------------------------------------------------------------- a mistake ends all


def leave(line: str, code: int) -> NoReturn:
    """Ends all processes with this exit code. Process 0 says why, and of whom, where it did not fail itself."""
    ENDING.acquire()
    with contextlib.suppress(RuntimeError):
        _set(FAILED, f"{code} {line}")
    if distributed.global_state.process_id == 0:
        _end(code, line)
    if not _wait(SAID, 1):
        print(line, file=sys.stderr)
    _end(code)


def abandon(code: int) -> NoReturn:
    """Ends this process at once: an ordinary exit would wait for the others, and these for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch() -> None:
    """Ends this process when another one has failed."""
    with contextlib.suppress(RuntimeError):  # the coordinator is gone, and jax ends this process
        while (client := _client()) is not None:
            time.sleep(LOOK)
            if failed := client.key_value_dir_get(FAILED):
                time.sleep(LOOK)  # this process may be about to say the same
                ENDING.acquire()
                key, said = failed[0]
                code, _, line = said.partition(" ")
                _end(int(code), f"error: process {key.rpartition('/')[2]}: {line.removeprefix('error: ')}")


def _end(code: int, line: str = "") -> NoReturn:
    """Says a line if this is process 0, which goes last: jax aborts those that lose it."""
    state = distributed.global_state
    with contextlib.suppress(RuntimeError):
        if state.process_id == 0:
            print(line, file=sys.stderr)
            _set(SAID)
            _wait(LEFT, state.num_processes - 1)
        else:
            _set(LEFT)
    abandon(code)


def _client() -> Any:
    """The connection to the coordinator; None where this process is alone."""
    return distributed.global_state.client


def _set(key: str, value: str = "yes") -> None:
    _client().key_value_set(f"{key}{distributed.global_state.process_id}", value)


def _wait(key: str, n: int) -> bool:
    """Waits until n processes have set a key; False when `PATIENCE` ends first."""
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end:
            if len(_client().key_value_dir_get(key)) >= n:
                return True
            time.sleep(0.1)
    return False
