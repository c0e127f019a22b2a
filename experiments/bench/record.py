"""Records of all figures, and comparison with an older record."""

import os
import pathlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax

from moe_jax.files import parse_json

FORMAT = 1
WORSE = 0.05  # larger relative growth of a ratio is reported
PASSES = {"forward": "forward", "both": "forward and backward"}
KEY = ("shape", "routing", "dispatch", "mesh")
Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of a measurement."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def processor() -> str:
    """Name of the CPU."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures, and the machine they were measured on."""
    return {"format": FORMAT, "machine": machine(), "rows": list(rows)}


def load(path: pathlib.Path) -> dict[str, Any]:
    """Loads a record; ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"There is no record {path}; give a file that --json has written.")
    try:
        record = parse_json(path.read_bytes())
        if record["format"] != FORMAT or not isinstance(record["machine"], dict):
            raise ValueError
        for row in record["rows"]:
            key(row), [float(row[what]["tau"]) for what in PASSES]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a record of this program; give a file that --json has written.") from None
    return record


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def worse(rows: Sequence[Row], old: Sequence[Row], by: float = WORSE) -> list[str]:
    """A line for every layer whose ratio to its dense baseline has grown by more than the fraction `by`."""
    before, lines = {key(row): row for row in old}, []
    for row in rows:
        if key(row) not in before:
            continue
        for what, words in PASSES.items():
            now, then = row[what]["tau"], before[key(row)][what]["tau"]
            if now > then * (1 + by):
                name = " ".join(part for part in key(row) if part)
                lines.append(
                    f"slower: {name}, {words}: {now:.2f} times its dense baseline, was {then:.2f} "
                    f"({now / then - 1:+.1%})"
                )
    return lines


def against(rows: Sequence[Row], path: str, record: dict[str, Any]) -> list[str]:
    """Compares rows with a record, a line each."""
    known = {key(row) for row in record["rows"]}
    common = sum(key(row) in known for row in rows)
    lines = worse(rows, record["rows"])
    if (here := machine()) != record["machine"]:
        changed = [name for name in here if here[name] != record["machine"].get(name)]
        lines.append(f"{path} was measured with another {', '.join(changed)}.")
    found = f"{common} of {len(rows)} rows are in {path}"
    return [*lines, f"{found}; {'see above' if worse(rows, record['rows']) else f'none is over {WORSE:.0%} slower'}."]
