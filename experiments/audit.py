"""Audits your own experiment: runs it at small widths on simulated devices, and tells which laws hold.

    python -m experiments.audit --config=configs/glam_nano.py
    python -m experiments.audit --config=configs/glam_pod.py --report=runs/audit.html
    python -m experiments.audit --config=configs/glam_nano.py --quick
    python -m experiments.audit --config=configs/glam_nano.py --law=4 --law=11
    python -m experiments.audit --config=configs/glam_pod.py --placement

One model on every mesh (outputs, losses, drops, gradients, one step), replicas that stay replicas, padding that is
nowhere, the same numbers from every dispatcher, routers that train, no leak of the future or of other documents,
choices and drops that are counted, and communication: what arithmetic predicts against what the compiled program says.
It says what it had to shrink. The exit code is 1 where a law is broken, and the line names the layer, the parameter or
the collective. Two minutes of two cores; with --quick, on the experiment's own mesh alone, one. The devices are eight,
or as many as --devices says.

--placement only shows which parameter lies where, and the bytes on a device, of the experiment as configured.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
from absl import flags

from experiments import cli
from moe_jax.audit.communication import ComparedCollective
from moe_jax.audit.communication import audit as communication
from moe_jax.audit.experiment import EVERYTHING, Finding, Scope, findings
from moe_jax.audit.laws import LAWS
from moe_jax.audit.page import findings_page
from moe_jax.audit.placement import ParamPlacement, placement
from moe_jax.audit.shrink import shrink
from moe_jax.config import Experiment
from moe_jax.files import write_file

cli.define_config()
REPORT = cli.report()
JSON = cli.as_json()
DEVICES = cli.devices()
STOP = flags.DEFINE_bool("stop", False, "Stop at the first law that is broken.")
QUICK = flags.DEFINE_bool("quick", False, "Try the laws on the config's own mesh only, and layers in fewer trials.")
LAW = flags.DEFINE_multi_integer("law", [], "Try this law alone (docs/laws.md); may be repeated.")
PLACEMENT = flags.DEFINE_bool("placement", False, "Show which parameter lies where, and stop.")


def main() -> None:
    exp = cli.experiment()
    page, table = cli.file("report", REPORT.value), cli.file("json", JSON.value)
    if PLACEMENT.value:
        print(placement_table(placed := placement(exp)))
        cli.write_json(table, [parameter._asdict() for parameter in placed])
        return
    chosen = Scope(frozenset(map(audited, LAW.value)), QUICK.value)
    compile_fast()
    jax.config.update("jax_num_cpu_devices", DEVICES.value or 8)
    sys.exit(check(exp, page, table, STOP.value, chosen))


def audited(number: int) -> int:
    """The number of a law that the audit tries; ValueError for others."""
    found = {law.number: law for law in LAWS}.get(number)
    if found is None:
        raise ValueError(f"--law={number} is no law; the laws are 1 to {len(LAWS)} (docs/laws.md).")
    if found.unaudited:
        raise ValueError(f"--law={number} is not in the audit: {found.unaudited}")
    return number


def compile_fast() -> None:
    """Has XLA compile for CPUs without its fusion emitters, in half the time; later versions do not know the flag."""
    given, flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters"
    if version("jaxlib") < "0.11" and flag not in given:
        os.environ["XLA_FLAGS"] = f"{given} {flag}=false"


def check(
    exp: Experiment,
    page: pathlib.Path | None = None,
    table: pathlib.Path | None = None,
    stop: bool = False,
    scope: Scope = EVERYTHING,
) -> int:
    """Says what holds of an experiment, and writes it to files; 1 if something does not that its config claims."""
    began, devices = time.monotonic(), jax.devices()
    small, shrunk = shrink(exp, len(devices))
    print(f"{len(devices)} {devices[0].platform} devices; {'; '.join(shrunk) or 'as configured'}", flush=True)
    found: list[Finding] = []
    with few_optimizations():
        for finding in findings(exp, small, devices, scope):
            found.append(finding)
            print(line(finding), flush=True)
            if stop and finding.broken:
                break
        stopped = stop and any(f.broken for f in found)
        rows = [] if stopped or not scope.tries(6) else communication(small)
    for row in rows:
        print(row_line(row), flush=True)
    broken = sum(f.broken for f in found) + sum(not row.holds for row in rows)
    print(f"{len(found) + len(rows)} findings, {broken} broken, {time.monotonic() - began:.0f} s")
    if page is not None:
        write_file(page, findings_page(exp, shrunk, found, rows, placement(exp)))
        print(f"report: {page}")
    cli.write_json(table, as_json(shrunk, found, rows))
    return int(broken > 0)


def as_json(shrunk: list[str], found: list[Finding], rows: list[ComparedCollective]) -> dict[str, Any]:
    """All findings as plain values."""
    laws = [{"law": f.law, "subject": f.subject, "claimed": f.claimed, **f.verdict._asdict()} for f in found]
    sent = [
        {"part": row.part, "holds": row.holds, "detail": row.detail}
        | {"predicted": row.predicted._asdict(), "compiled": row.compiled._asdict()}
        for row in rows
    ]
    broken = sum(f.broken for f in found) + sum(not row.holds for row in rows)
    return {"shrunk": shrunk, "findings": laws, "communication": sent, "broken": broken}


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
    """Laws about numbers and collectives hold without XLA's optimizations too, and compile several times faster."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def line(finding: Finding) -> str:
    held = "yes" if finding.verdict.holds else "NO" if finding.claimed else "no"
    text = f"{finding.law}, {finding.subject}"
    return f"{text:<60} {held:<4} {finding.verdict.detail}{'' if finding.claimed else '; not claimed'}"


def row_line(row: ComparedCollective) -> str:
    predicted, compiled = row.predicted, row.compiled
    text = f"communication, {row.part}: {compiled.op} over {' x '.join(compiled.axes)}"
    sizes = f"{compiled.count} of {compiled.bytes:,} bytes, predicted {predicted.bytes:,}, sent {compiled.wire:,.0f}"
    return f"{text:<60} {'yes' if row.holds else 'NO':<4} {sizes}{'; ' + row.detail if row.detail else ''}"


def placement_table(placed: list[ParamPlacement]) -> str:
    """A line for each parameter, and what a device holds."""
    lines = [f"{'parameter':<44} {'shape':<24} {'spread over':<28} {'bytes':>14} {'optimizer':>14}"]
    for p in placed:
        name, shape, axes = p.words
        lines.append(f"{name:<44} {shape:<24} {axes:<28} {p.device_bytes:>14,} {p.optimizer_bytes:>14,}")
    total, beside = sum(p.device_bytes for p in placed), sum(p.optimizer_bytes for p in placed)
    lines.append(f"{'on a device':<98} {total:>14,} {beside:>14,}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
