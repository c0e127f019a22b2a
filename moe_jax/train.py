"""The training loop: batches, steps, records, evaluations, checkpoints."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import costs, transfer
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.continuation import Change, check_config, check_data
from moe_jax.core.stats import Stats
from moe_jax.costs import chips
from moe_jax.costs.energy import run_energy
from moe_jax.data import (
    batches,
    data_identity,
    default_directory,
    evaluation_batches,
    keep_tokenizers,
    with_kept_tokenizers,
)
from moe_jax.evaluate import bits_per_byte, drop_rate, evaluate, per_layer
from moe_jax.lock import WorkdirLock
from moe_jax.moe import Aux
from moe_jax.step import Metrics, Program, State


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite."""


def train(
    exp: Experiment,
    workdir: pathlib.Path | None = None,
    data_dir: pathlib.Path | None = None,
    init_from: transfer.RunCheckpoint | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    lock: WorkdirLock | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a record when it starts, every `log_every` steps, at every evaluation, and at the end.

    With a workdir, checkpoints are kept there, and training goes on from the newest valid one, with the same data and
    a config that differs in what `continuation.MAY_CHANGE` names alone (ValueError); the first record has what has
    `changed`. One process at a time trains in a workdir (ValueError).
    init_from: a new run begins with those parameters of this checkpoint that fit, see `transfer.begin_from`. They are
        saved as its step 0, so that a continuation does not need that checkpoint.
    stop: is asked after every step, which it is given; where it says so, this step is logged and saved, and the last
        record is "interrupted". Several processes must be told to stop at the same step.
    lock: of the workdir, where the caller holds it; else it is taken here, by process 0.
    TrainingDiverged after `max_bad_steps` steps in a row without a finite loss and gradient; the last record says
    so too, with `diverged`.
    """
    if workdir is not None and lock is None and jax.process_index() == 0:
        with WorkdirLock(workdir) as lock:
            yield from train(exp, workdir, data_dir, init_from, stop, lock)
        return
    run, data = exp.run, exp.data
    checkpoints = Checkpoints(workdir / "checkpoints", run.keep_last, run.keep_best) if workdir else None
    newest, _ = (checkpoints and checkpoints.newest_meta()) or ({}, None)
    config_changes(newest, exp, workdir)  # before data is prepared, and arrays are read
    windows, held_out = prepare_data(exp, workdir, data_dir)
    check_data(newest.get("data", {}), identity := data_identity(windows, held_out), workdir)
    program = Program(exp, len(windows.domains))
    state, meta = restore(checkpoints, program, init_from)
    seconds, origin, changed = meta.get("seconds", 0.0), meta.get("origin"), config_changes(meta, exp, workdir)
    step, tally = int(state.step), Tally(exp, windows.bytes_per_token, seconds)
    if workdir is not None and jax.process_index() == 0:
        keep_tokenizers(windows, workdir)

    def evaluation() -> dict[str, Any]:
        began, B = time.monotonic(), data.B // data.microbatches
        chosen = evaluation_batches(held_out, B, run.eval_sequences, **program.data_slice)
        record = evaluate(partial(program.evaluate, state), chosen, held_out.domains)
        for name in ("", "_capacity"):
            if "loss" + name in record and held_out.bytes_per_token:
                record["bits_per_byte" + name] = bits_per_byte(record["loss" + name], held_out.bytes_per_token)
        if "moe" in record:
            record["moe"] = {"layer": tally.layers, **record["moe"]}
        tally.since += time.monotonic() - began  # not training
        return {"kind": "eval", "step": step, "seconds": tally.seconds(), **record}

    def save(loss: float | None = None) -> None:
        if checkpoints is not None and step not in checkpoints.steps():
            meta = {"seconds": tally.seconds(), "experiment": exp.to_json(), "data": identity}
            checkpoints.save(step, state, meta | ({"origin": origin} if origin else {}), loss)

    try:
        if origin and step == 0 and checkpoints is not None:
            save()
            checkpoints.wait()
        start = {"kind": "start", "step": step, "seconds": seconds, **identity, "data": windows.fingerprint}
        start |= {"changed": {change.path: [change.old, change.new] for change in changed}} if changed else {}
        yield start | ({"origin": origin} if origin else {})
        pending: Metrics | None = None  # fetched while the next step runs
        for batch in batches(windows, data.B, exp.seed, step, **program.data_slice):
            if step >= run.steps:
                break
            state, metrics = program.step(state, batch)
            if pending is not None:
                tally.add(pending)
            step, pending = step + 1, metrics
            due = {what for what, n in run.intervals.items() if step % n == 0 or step == run.steps}
            stopping = stop(step) and step < run.steps
            due |= {"log", "save"} if stopping else set()
            if due:
                tally.add(pending)
                pending = None
                if lock is not None:
                    lock.check()
            if "log" in due:
                yield tally.record(step)
            held_out_record = evaluation() if "eval" in due else None
            if "save" in due:
                save(held_out_record["loss"] if held_out_record else None)
            if held_out_record:
                yield held_out_record
            if tally.skipped_in_a_row >= run.max_bad_steps:
                state = state._replace(skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row))
                save()
                yield {"kind": "end", "step": step, "seconds": tally.seconds(), "diverged": True}
                raise TrainingDiverged(
                    f"{tally.skipped_in_a_row} steps in a row had no finite loss or gradient; stopped at step {step}, "
                    f"its parameters are the last good ones{f' and saved in {workdir}' if workdir else ''}: go on "
                    "with a lower learning rate, or look at the data."
                )
            if stopping:
                if checkpoints is not None:
                    checkpoints.wait()
                yield {"kind": "interrupted", "step": step, "seconds": tally.seconds()}
                return
        yield {
            "kind": "end",
            "step": step,
            "seconds": (seconds := tally.seconds()),
            "energy": energy_record(exp, seconds),
        }
    finally:
        if checkpoints is not None:
            checkpoints.close()


def energy_record(exp: Experiment, seconds: float) -> dict[str, Any]:
    """Energy and emissions of these seconds of a run, estimated as `config.run` says."""
    run, kind = exp.run, jax.devices()[0].device_kind
    return dict(run_energy(seconds, kind, jax.device_count(), run.watts, run.pue, run.carbon))


def prepare_data(exp: Experiment, workdir: pathlib.Path | None, data_dir: pathlib.Path | None) -> tuple[Any, Any]:
    """The training and the held-out examples; with the tokenizers of the run in the workdir, if it has checkpoints."""
    begun = workdir is not None and any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))
    data = with_kept_tokenizers(exp.data, workdir) if begun else exp.data
    return data.prepare(data_dir or default_directory())


def restore(
    checkpoints: Checkpoints | None, program: Program, init_from: transfer.RunCheckpoint | None = None
) -> tuple[State, dict[str, Any]]:
    """The newest valid state and what is kept with it.

    Where there is no checkpoint, the initial state, with parameters of `init_from` if it is given, and the record of
    `transfer.begin_from` as `origin`.
    """
    if checkpoints is not None and not checkpoints.empty():
        state, meta, _ = checkpoints.restore(program.abstract_state())
        if init_from is not None:
            transfer.check_origin(meta.get("origin"), init_from)
        return state, meta
    if init_from is None:
        return program.init(), {}
    state, origin = transfer.begin_from(program, init_from)
    return state, {"origin": origin}


def config_changes(meta: Mapping[str, Any], exp: Experiment, workdir: pathlib.Path | None) -> list[Change]:
    """Changes of the config since a checkpoint with this meta; ValueError where they make it another run."""
    return check_config(json.loads(meta["experiment"]), exp, workdir) if "experiment" in meta else []


class Tally:
    """Adds up steps until they are logged: sums first, then ratios."""

    def __init__(self, exp: Experiment, bytes_per_token: float | None, seconds: float):
        self.bytes_per_token = bytes_per_token  # None for data other than text
        self.work = costs.flops(exp.model, exp.data.shapes(B=1)).training * exp.data.B  # FLOPs of a step
        peak = chips.peak(jax.devices()[0].device_kind)
        self.peak = peak and peak * jax.device_count()
        self.start = time.monotonic() - seconds
        self.skipped_in_a_row = 0
        self.layers = list(exp.model.routed_layers)
        self.auxiliary = exp.model.routed is not None and bool(exp.model.routed.losses)
        self.clear()

    def clear(self) -> None:
        self.last: Metrics | None = None
        self.nats = self.targets = 0.0
        self.others: dict[str, float] = {}
        self.steps = 0
        self.stats: Stats | None = None
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the run began, without interruptions."""
        return time.monotonic() - self.start

    def add(self, metrics: Metrics) -> None:
        """Waits for a step and adds it."""
        self.last = last = jax.device_get(metrics)
        self.steps += 1
        self.skipped_in_a_row = int(last.skipped_in_a_row)
        if self.skipped_in_a_row == 0:
            self.nats += float(last.loss * last.targets)
            self.targets += float(last.targets)
            for name, mean in last.others.items():
                self.others[name] = self.others.get(name, 0.0) + float(mean * last.targets)
            if last.stats is not None:
                self.stats = last.stats if self.stats is None else jax.tree.map(np.add, self.stats, last.stats)

    def record(self, step: int) -> dict[str, Any]:
        """Record of the steps since the last one."""
        assert self.last is not None
        elapsed = time.monotonic() - self.since
        loss, rate = self.nats / self.targets if self.targets else float("nan"), self.work * self.steps / elapsed
        record = {
            "kind": "train",
            "step": step,
            "seconds": self.seconds(),
            "loss": loss,
            "grad_norm": float(self.last.grad_norm),
            "learning_rate": float(self.last.learning_rate),
            "tokens_per_second": self.targets / elapsed,
            "flops_per_second": rate,
            "skipped": int(self.last.skipped),
        }
        if self.auxiliary:
            record["aux_loss"] = float(self.last.aux_loss)
        if self.others:
            record["terms"] = {name: total / self.targets for name, total in self.others.items()}
        if self.bytes_per_token:
            record["bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token)
        if self.peak:
            record["mfu"] = rate / self.peak
        if self.stats is not None:
            moe = per_layer(Aux(self.last.aux_loss, self.stats).metrics)
            record |= {
                "drop_rate": drop_rate(self.stats),
                "load_max_over_mean": float(np.mean(moe["load_max_over_mean"])),
                "moe": {"layer": self.layers, **moe},
            }
        self.clear()
        return record
