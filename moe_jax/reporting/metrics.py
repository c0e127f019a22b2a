"""The log of a run: `metrics.jsonl` is the truth, TensorBoard files and a line in the terminal follow it.

A record is one dict per line with at least `kind` ("start", "train", "eval" or "end"), `step` and `seconds`. Losses
are nats per token, rates fractions; `moe` holds lists with an entry per MoE layer, `moe.layer` their numbers. A start
has the fingerprint of the data and, where they are known, the question and the command; an end may be `diverged`.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
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
}
NAMES = {"train": "step", "eval": "held-out at", "end": "ended at"}


class Logger:
    """Writes records into `workdir`; only process 0 does anything. A context manager.

    Without `resume_step` the log starts anew; with it, what the interrupted run wrote later is dropped.
    """

    def __init__(self, workdir: str | Path, total_steps: int, resume_step: int | None = None, quiet: bool = False):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # here, so that readers do not wait for it

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            (workdir / FILE).unlink(missing_ok=True)
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
        elif record["kind"] != "train" or now - self.last_line >= SECONDS_BETWEEN_LINES:
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
            if key in record and not (key == "skipped" and not record[key]):
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
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not {"kind", "step"} <= set(record):
                raise ValueError
            records.append(record)
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not a record: remove that line") from None
    return records


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
    if not path.is_file():
        return
    kept = [r for r in read(path.parent) if r["step"] <= step and r["kind"] != "end"]
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept))


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
