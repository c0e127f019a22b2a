"""The log of a run: `metrics.jsonl` is the truth, TensorBoard files and a line in the terminal follow it.

A record is one dict per line with at least `kind` ("start", "train", "eval", "interrupted" or "end"), `step` and
`seconds`. Losses are nats per token, rates fractions; `moe` holds lists with an entry per MoE layer, `moe.layer` their
numbers. A start has the fingerprint of the data and, where they are known, the question, the command and what has
`changed` of the config; an end may be `diverged`.

Every checkpoint keeps the length and the digest of the log as it was then (`log_state`), so that a continuation can say
where the log differs (`log_difference`).
"""

import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

from moe_jax.files import parse_json, write_file

FILE = "metrics.jsonl"
KEPT = "metrics.*.jsonl"  # earlier logs, whose checkpoints were lost
log = logging.getLogger(__name__)
PERCENTILES = "load_percentiles"  # a list per layer that is no distribution over experts
SECONDS_BETWEEN_LINES = 10.0  # in CI and pipes

# What the terminal line shows of a record, in its order.
SHOWN = {
    "loss": "loss {:.4f}",
    "bits_per_byte": "{:.4f} bits/byte",
    "accuracy": "{:.1%} right",
    "loss_capacity": "with capacity {:.4f}",
    "drop_rate": "dropped {:.1%}",
    "drop_rate_capacity": "dropped {:.1%}",
    "load_max_over_mean": "load {:.2f}x mean",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "skipped": "skipped {:.0f}",
    "spikes": "loss spikes {:.0f}",
}
UNLESS_0 = ("skipped", "spikes")
NAMES = {"train": "step", "eval": "held-out at", "end": "ended at"}


class Logger:
    """Writes records into `workdir`; only process 0 does anything. A context manager.

    Without `resume_step` the log starts anew, and one that has records is kept as metrics.1.jsonl, ...; with it, what
    the interrupted run wrote later is dropped.
    """

    def __init__(self, workdir: str | Path, total_steps: int, resume_step: int | None = None, quiet: bool = False):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # here, so that readers do not wait for it

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            _begin_anew(workdir)
            shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        else:
            _drop_after(workdir / FILE, resume_step)
        self._file = open(workdir / FILE, "a", buffering=1, encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge, max_queue=10_000, flush_secs=10)
        self._terminal = None if quiet else _Terminal(total_steps)

    def write(self, record: dict) -> None:
        """Appends one record, at once on disk; NaN and infinity become null, arrays become lists."""
        if not self._active:
            return
        record = to_json(record)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        for tag, value in _scalars(record):
            self._board.add_scalar(tag, value, record["step"])
        for tag, values in _histograms(record):
            self._board.add_histogram(tag, values, record["step"], bins=20)
        if self._terminal:
            self._terminal.show(record)

    def close(self) -> None:
        """Ends the terminal line and closes the files."""
        if self._active:
            if self._terminal:
                self._terminal.close()
            self._file.close()
            self._board.close()
            self._active = False

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Terminal:
    """One live line where a person watches, a plain line now and then where nobody does."""

    def __init__(self, total_steps: int):
        self.total = total_steps
        self.start: tuple[int, float] | None = None  # the first record: its step, and when it came
        self.last_line = -math.inf
        self.bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            columns = (rich.progress.BarColumn(bar_width=10), rich.progress.TextColumn("{task.description}"))
            console = rich.console.Console(stderr=True)
            self.bar = rich.progress.Progress(*columns, console=console, auto_refresh=False)
            self.task = self.bar.add_task("compiling", total=total_steps)
            self.bar.start()

    def show(self, record: dict) -> None:
        now = time.monotonic()
        self.start = self.start or (record["step"], now)
        line = self._line(record, now)
        if self.bar and record["kind"] == "train":
            self.bar.update(self.task, completed=record["step"], description=line, refresh=True)
        elif self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        elif record["kind"] != "train" or record.get("spikes") or now - self.last_line >= SECONDS_BETWEEN_LINES:
            print(line, file=sys.stderr, flush=True)
            self.last_line = now

    def _line(self, record: dict, now: float) -> str:
        assert self.start is not None
        kind, step = record["kind"], record["step"]
        parts = [f"{NAMES.get(kind, kind)} {step}/{self.total}"]
        steps, seconds = step - self.start[0], now - self.start[1]
        if kind == "train" and steps > 0:
            parts.append(f"{duration(seconds / steps * (self.total - step))} left")
        for key, words in SHOWN.items():
            if key in record and not (key in UNLESS_0 and not record[key]):
                value = record[key]
                parts.append(words.format(math.nan if value is None else value))
        return "  ".join(parts)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def read(workdir: str | Path) -> list[dict]:
    """The records of a run, oldest first, without a last line torn by a kill. ValueError without a log."""
    path = Path(workdir) / FILE
    if not path.is_file():
        raise ValueError(f"there is no {FILE} in {workdir}: give the workdir of a run that has started")
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yields the lines of a log and their records; ValueError for one that is none, unless it is the last and torn."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            yield line, _record(line)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not a record: remove that line") from None


def _record(line: bytes) -> dict:
    """The record of a line; ValueError where it is none."""
    record = parse_json(line)
    if not (isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int):
        raise ValueError
    if not isinstance(record.get("seconds"), int | float | None):
        raise ValueError
    return record


def log_state(workdir: str | Path) -> dict[str, Any] | None:
    """The numbers of whole records and of bytes of a run's log, and their SHA-256 digest; None without a log."""
    path = Path(workdir) / FILE
    if not path.is_file():
        return None
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return {"records": whole.count(b"\n"), "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


def log_difference(workdir: str | Path, saved: Mapping[str, Any] | None) -> str | None:
    """Says how the beginning of a log differs from its `log_state` of then; None where it does not."""
    path = Path(workdir) / FILE
    if saved is None:
        return None
    if not path.is_file():
        return f"{FILE} is missing, which had {saved['records']:,} records when the checkpoint was saved"
    data = path.read_bytes()
    if (there := data.count(b"\n")) < saved["records"]:
        return f"{FILE} has {there:,} of the {saved['records']:,} records it had when the checkpoint was saved"
    if hashlib.sha256(data[: saved["bytes"]]).hexdigest() != saved["sha256"]:
        return f"the first {saved['records']:,} records of {FILE} have been changed since the checkpoint was saved"
    return None


def curve(records: list[dict], key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """(steps [n], values [n] or [n, layers, ...]) of a key ("loss", "moe.drop_rate"); null becomes NaN."""
    found = [(r["step"], _lookup(r, key)) for r in records if r["kind"] == kind and _lookup(r, key) is not _MISSING]
    return np.array([step for step, _ in found], int), np.array([value for _, value in found], float)


def last(records: list[dict], kind: str) -> dict:
    """The newest record of a kind, {} without one."""
    return next((record for record in reversed(records) if record["kind"] == kind), {})


def median_speed(records: list[dict]) -> float | None:
    """Median of the tokens per second in training; None without one."""
    speeds = curve(records, "tokens_per_second")[1]
    return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None


def wall_time(records: list[dict]) -> float | None:
    """Seconds of a run until its last record, without its interruptions; None where none are recorded."""
    return max((r["seconds"] for r in records if r.get("seconds") is not None), default=None)


def summary_rows(records: list[dict]) -> list[tuple[str, str]]:
    """Results of a run as rows (words, value), without rows that do not apply."""
    train, held_out = last(records, "train"), last(records, "eval")
    moe, energy = held_out.get("moe") or train.get("moe") or {}, last(records, "end").get("energy") or {}
    values = [
        ("steps", "{:,}", max((r["step"] for r in records), default=None)),
        ("train loss, nats per token", "{:.4f}", train.get("loss")),
        ("held-out loss, nats per token", "{:.4f}", held_out.get("loss")),
        ("held-out bits per byte", "{:.4f}", held_out.get("bits_per_byte")),
        ("held-out accuracy", "{:.1%}", held_out.get("accuracy")),
        ("held-out loss with capacity", "{:.4f}", held_out.get("loss_capacity")),
        ("held-out bits per byte with capacity", "{:.4f}", held_out.get("bits_per_byte_capacity")),
        ("dropped with capacity, held-out", "{:.2%}", held_out.get("drop_rate_capacity")),
        ("dropped in training", "{:.2%}", train.get("drop_rate")),
        ("load, busiest expert over mean", "{:.2f}", train.get("load_max_over_mean")),
        (
            "dead experts, all layers",
            "{:.0f}",
            np.sum(moe["dead_experts"]) if "dead_experts" in moe else None,
        ),
        ("updates skipped", "{:.0f}", train.get("skipped") or None),
        ("loss spikes", "{:.0f}", sum(r.get("spikes") or 0 for r in records if r["kind"] == "train") or None),
        ("tokens per second, median", "{:,.0f}", median_speed(records)),
        ("model FLOPs utilisation", "{:.1%}", train.get("mfu")),
    ]
    rows = [(words, form.format(value)) for words, form, value in values if value is not None]
    wall = wall_time(records)
    rows += [] if wall is None else [("wall time", duration(wall))]
    if energy.get("kwh") is not None:
        rows.append(("energy", f"{energy['kwh']:.3g} kWh, {energy['kg_co2e']:.3g} kg CO2e"))
    return [*rows, ("energy, by", energy["basis"])] if energy.get("basis") else rows


def summary_table(records: list[dict]) -> rich.table.Table:
    """The table that ends a run in the terminal."""
    table = rich.table.Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for row in summary_rows(records):
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """3725.2 as "1:02:05"."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


# ---- records


_MISSING = object()


def _lookup(record: dict, key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def to_json(value: Any, digits: int = 17) -> Any:
    """Converts to strict JSON: arrays to lists, numbers that are not finite to None, others to so many digits."""
    if isinstance(value, dict):
        return {str(key): to_json(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, digits) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and JAX
        return to_json(value.tolist(), digits)
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _drop_after(path: Path, step: int) -> None:
    """Rewrites a log without what came after `step`, without its end and without a torn line, in one move."""
    if path.is_file():
        kept = [line for line, record in _records(path) if record["step"] <= step and record["kind"] != "end"]
        write_file(path, b"".join(kept))


def _begin_anew(workdir: Path) -> None:
    """Empties a log; one that has records of steps is kept under the next number, since no checkpoint repeats it."""
    path = workdir / FILE
    if not path.is_file():
        return
    if any(not _is_start(line) for line in path.read_bytes().splitlines()):
        number = next(n for n in itertools.count(1) if not (workdir / KEPT.replace("*", str(n))).exists())
        kept = write_file(workdir / KEPT.replace("*", str(number)), path.read_bytes())
        log.warning("%s is of a run without a checkpoint: it is kept as %s, and the run begins anew", path, kept.name)
    write_file(path, "")


def _is_start(line: bytes) -> bool:
    try:
        return _record(line)["kind"] == "start"
    except ValueError:
        return False


# ---- TensorBoard


def _scalars(record: dict) -> Iterator[tuple[str, float]]:
    """("train/loss", 1.2), ("eval/loss_by_domain/prose", 1.3), ("moe/layer_01/drop_rate", 0.02), ..."""
    kind = record["kind"]
    for key, value in record.items():
        if isinstance(value, int | float) and key != "step":
            yield f"{kind}/{key}", value
        elif isinstance(value, dict) and key != "moe":
            yield from ((f"{kind}/{key}/{name}", v) for name, v in value.items() if isinstance(v, int | float))
    for layer, key, value in _per_layer(record):
        if isinstance(value, int | float):
            yield f"{layer}/{key}", value
        elif key == PERCENTILES:
            yield from ((f"{layer}/{key}/{number}", v) for number, v in enumerate(value) if v is not None)


def _histograms(record: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The load of each layer, over its experts."""
    for layer, key, value in _per_layer(record):
        if isinstance(value, list) and value and None not in value and key != PERCENTILES:
            yield f"{layer}/{key}", np.asarray(value, float)


def _per_layer(record: dict) -> Iterator[tuple[str, str, Any]]:
    moe = record.get("moe") or {}
    place = "moe" if record["kind"] == "train" else f"{record['kind']}/moe"
    for key, values in moe.items():
        if key != "layer":
            for layer, value in zip(moe["layer"], values, strict=True):
                yield f"{place}/layer_{layer:02d}", key, value
