"""A run that breaks leaves no state from a streak, and no record of a save that failed.

The model is a toy with the functions of a compiled program: what is tried is the loop around it.
"""

import dataclasses
import errno
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import checkpoint as checkpointing
from moe_jax import train as loop
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import RunConfig
from moe_jax.data import Folder
from moe_jax.evaluate import EvaluationSums
from moe_jax.reporting.metrics import FILE, Logger, read
from moe_jax.room import DiskFull
from moe_jax.step import Metrics, Program, State
from moe_jax.train import TrainingDiverged, train
from tests.laws.test_training_step import EXP


class Toy(Program):
    """Parameters w whose loss is the mean of their squares, and which shrink in every finite step."""

    data_slice: dict = {}  # noqa: RUF012
    spoil: Callable[[State], State] = staticmethod(lambda state: state)  # of what a step has made

    def __init__(self, *_):
        pass

    def init(self) -> State:
        zero = jnp.zeros((), jnp.int32)
        opt_state = {"mu": jnp.zeros(3)}
        return State(zero, {"w": jnp.array([3.0, 2.0, 1.0]), "unused": jnp.ones(2)}, opt_state, {}, zero, zero)

    def abstract_state(self) -> State:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.init())

    def loss(self, state: State) -> float:
        with np.errstate(over="ignore"):
            return float(np.mean(np.square(np.asarray(state.params["w"]))))

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        loss = self.loss(state)
        finite = np.isfinite(loss)
        w = state.params["w"] * (0.9 if finite else 1.0)
        skipped, in_a_row = state.skipped + (not finite), state.skipped_in_a_row + 1 if not finite else jnp.int32(0)
        new = State(state.step + 1, {**state.params, "w": w}, state.opt_state, {}, skipped, in_a_row)
        numbers = (jnp.float32(x) for x in (loss, 0.0, 1.0, 0.01, 100.0))
        return self.spoil(new), Metrics(*numbers, skipped, in_a_row, {}, None)

    def evaluate(self, state: State, batch: Any) -> EvaluationSums:
        one, zero = jnp.ones(1), jnp.float32(0)
        return EvaluationSums(one * self.loss(state), one, zero, zero, {}, None, None)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(loop, "Program", Toy)


@pytest.fixture
def go(text, tmp_path_factory, tmp_path) -> Callable[..., list[dict]]:
    """Trains in a workdir with its log, as the program does; the records are those of this call."""
    data_dir = tmp_path_factory.getbasetemp() / "faults_data"

    def go(workdir=tmp_path / "run", every=lambda record: None, **changes) -> list[dict]:
        run = RunConfig(**{"log_every": 1, "eval_every": 100, "save_every": 2, "max_bad_steps": 3, **changes})
        exp = dataclasses.replace(EXP, data=dataclasses.replace(EXP.data, source=Folder(str(text))), run=run)
        records = train(exp, workdir, data_dir)
        seen = [next(records)]
        with Logger(workdir, run.steps, seen[0]["step"] or None, quiet=True) as log:
            log.write(seen[0])
            for record in records:
                log.write(record)
                seen.append(record)
                every(record)
        return seen

    return go


def at(step: int, **changes: Any) -> Callable[[State], State]:
    """Spoils parameters (or `mu`) after a step, as a flipped bit in memory or a learning rate of 1e30 does."""

    def spoil(state: State) -> State:
        if int(state.step) != step:
            return state
        new = {name: jnp.array(value, jnp.float32) for name, value in changes.items()}
        if "mu" in new:
            return state._replace(opt_state=new)
        return state._replace(params={**state.params, **new})

    return staticmethod(spoil)


def steps(workdir) -> list[int]:
    return Checkpoints(workdir / "checkpoints").steps()


def losses(records) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.mark.parametrize(
    ("step", "good", "save_every"),
    [
        (5, 4, 2),  # between two saves
        (6, 4, 2),  # at a save: what broke is saved, for it is finite, and is discarded
        (4, 3, 1),  # saved at every step: nothing of the streak pushes out the good ones
        (1, None, 1),  # nothing was good before
    ],
)
def test_what_broke_a_run_is_not_restored(go, tmp_path, monkeypatch, step, good, save_every):
    """1e30 in a parameter: the newest good step is named, is the newest on disk, and the run goes on from it."""
    monkeypatch.setattr(Toy, "spoil", at(step, w=[1e30, 1, 1]))
    with pytest.raises(TrainingDiverged, match="3 steps in a row had no finite loss") as error:
        go(steps=12, save_every=save_every)
    words = "No checkpoint is known to be good" if good is None else f"Step {good} is the newest checkpoint that is"
    assert words in str(error.value)
    assert max(steps(tmp_path / "run"), default=None) == good
    end = read(tmp_path / "run")[-1]
    assert (end["kind"], end["diverged"], end["good"]) == ("end", True, good)
    monkeypatch.undo()
    monkeypatch.setattr(loop, "Program", Toy)
    rest = go(steps=12, save_every=save_every)
    assert rest[0]["step"] == (good or 0)
    expected = {n: 14 / 3 * 0.81 ** (n - 1) for n in range(1, 13)}
    assert losses(rest) == pytest.approx({n: loss for n, loss in expected.items() if n > (good or 0)})
    assert losses(read(tmp_path / "run")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "leaf"), [({"mu": [1, np.inf, 1]}, "opt_state/mu"), ({"unused": [np.nan, 1]}, "params/unused")]
)
def test_a_state_that_is_not_finite_ends_the_run_at_its_save(go, tmp_path, monkeypatch, changes, leaf):
    """A save names the leaf that is not finite though the loss does not show it, and older checkpoints stay."""
    monkeypatch.setattr(Toy, "spoil", at(5, **changes))
    with pytest.raises(TrainingDiverged, match=rf"^step 6 is not saved: {leaf} has 1 of \d values that are not finite"):
        go(steps=12)
    assert steps(tmp_path / "run") == [2, 4]
    assert read(tmp_path / "run")[-1]["good"] == 4


def test_the_last_step_of_a_run_is_not_saved_where_its_loss_is_not_finite(go, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "spoil", at(6, w=[1e30, 1, 1]))
    with pytest.raises(
        TrainingDiverged, match="the held-out loss after the last step is not finite; stopped at step 6"
    ):
        go(steps=6)
    assert steps(tmp_path / "run") == [2, 4]


def test_a_save_that_was_due_among_bad_steps_comes_after_them(go, tmp_path, monkeypatch):
    """Two batches that were at fault: no step of theirs is saved, and not much later the next one is."""
    seen = []
    monkeypatch.setattr(Toy, "loss", lambda self, state: np.nan if int(state.step) in (3, 4) else 1.0)
    go(steps=6, save_every=4, keep_last=5, every=lambda record: seen.append((record["step"], steps(tmp_path / "run"))))
    assert steps(tmp_path / "run") == [6]
    go(tmp_path / "longer", steps=9, save_every=4, keep_last=9)
    assert steps(tmp_path / "longer") == [6, 8, 9]


def test_a_spike_is_in_the_records_and_in_no_checkpoint(go, tmp_path, monkeypatch):
    """The save that was due in the step of the spike comes with the next one."""
    monkeypatch.setattr(Toy, "loss", lambda self, state: 50.0 if int(state.step) == 150 else 2.0 + int(state.step) % 2)
    records = go(steps=160, log_every=20, save_every=151, keep_last=9)
    assert {r["step"]: r["spikes"] for r in records if r["kind"] == "train" and r["spikes"]} == {160: 1}
    assert steps(tmp_path / "run") == [152, 160]


# ---- the log and the checkpoints


def test_the_held_out_record_comes_before_its_checkpoint(go, tmp_path, monkeypatch):
    """A kill between the two costs a checkpoint, and not the record, which no continuation would make again."""
    seen, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *of: (seen.append(("save", step)), save(self, step, *of))
    )
    go(steps=6, eval_every=2, every=lambda record: seen.append((record["kind"], record["step"])))
    assert [event for event in seen if event[0] != "train"] == [
        *[(what, step) for step in (2, 4, 6) for what in ("eval", "save")],
        ("end", 6),
    ]
    assert [r["step"] for r in read(tmp_path / "run") if r["kind"] == "eval"] == [2, 4, 6]


def test_who_stops_at_a_held_out_record_has_its_checkpoint(go, tmp_path):
    def stop(record):
        if record["kind"] == "eval":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(steps=6, eval_every=4, every=stop)
    assert steps(tmp_path / "run") == [2, 4]


@pytest.mark.parametrize(("error", "kind"), [(OSError(errno.ENOSPC, "No space left"), DiskFull), (OSError(5), OSError)])
def test_a_save_that_fails_has_not_ended_the_run(go, tmp_path, monkeypatch, error, kind):
    """The last save fails: the log has no end, and the same command goes on."""
    write = checkpointing.write_manifest

    def fail(directory, facts):
        if facts["step"] == 6:
            raise error
        write(directory, facts)

    monkeypatch.setattr(checkpointing, "write_manifest", fail)
    with pytest.raises(kind):
        go(steps=6)
    assert {r["kind"] for r in read(tmp_path / "run")} == {"start", "train", "eval"}
    assert steps(tmp_path / "run") == [2, 4]
    monkeypatch.setattr(checkpointing, "write_manifest", write)
    assert go(steps=6)[-1]["kind"] == "end"


def flipped(data: bytes) -> bytes:
    return data.replace(b'"loss": ', b'"loss": 1', 1)


def cut(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:3])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, None),
        (lambda data: data + b'{"kind": "train", "st', None),  # torn by a kill, after the checkpoint
        (flipped, "the first 8 records of metrics.jsonl have been changed since the checkpoint was saved"),
        (lambda data: data.split(b"\n", 1)[1], "metrics.jsonl have been changed since"),
        (cut, "metrics.jsonl has 3 of the 8 records it had when the checkpoint was saved"),
        (lambda data: None, "metrics.jsonl is missing, which had 8 records when the checkpoint was saved"),
    ],
)
def test_a_continuation_says_how_its_log_differs(go, tmp_path, damage, said):
    """Start, six steps and an evaluation were there when the last step was saved."""
    go(steps=6)
    log = tmp_path / "run" / FILE
    if damage and (data := damage(log.read_bytes())) is not None:
        log.write_bytes(data)
    elif damage:
        log.unlink()
    first = go(steps=8)[0]
    assert first["step"] == 6
    assert (said or "") in first.get("log", "")
    assert ("log" in first) == bool(said)


def test_a_log_without_checkpoints_is_kept(go, tmp_path, caplog):
    go(steps=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / FILE).read_bytes()
    assert go(steps=4)[0]["step"] == 0
    assert (tmp_path / "run" / "metrics.1.jsonl").read_bytes() == before
    assert "is of a run without a checkpoint: it is kept as metrics.1.jsonl" in caplog.text
    assert len(read(tmp_path / "run")) == len(before.splitlines())
