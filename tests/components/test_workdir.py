"""config.json is not believed: it is compared with the config under a checkpoint's checksum, and with the log."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import train
from experiments.compare.runs import open_runs
from experiments.sweep import __main__ as sweep
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment, build
from moe_jax.files import json_digest
from moe_jax.inspect.run import open_run
from moe_jax.reporting.metrics import FILE, log_state
from moe_jax.workdir import CONFIG, confirmed_config, confirmed_experiment, read_config

MODEL = {"D": 8, "N": 1, "attention": "MHA(1, 4)", "ffn": "MLP(F=4)", "moe_layers": "none", "remat": "none"}
EXP = build({"model": MODEL, "data": {"L": 8, "B": 8}, "run": {"steps": 1200}, "seed": 3})
VALUES = json.loads(EXP.to_json())


def write_log(workdir: Path, exp: Experiment = EXP, **start) -> None:
    """The log of a run that has begun with a config, and has made two steps."""
    begun = {"kind": "start", "step": 0, "seconds": 0.0, "config": json_digest(json.loads(exp.to_json())), **start}
    records = [begun, *({"kind": "train", "step": n, "seconds": 1.0, "loss": 2.0} for n in (1, 2))]
    (workdir / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run with its config, its log, and a checkpoint of step 2."""
    workdir = tmp_path_factory.mktemp("begun")
    (workdir / CONFIG).write_text(EXP.to_json())
    write_log(workdir)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        meta = {"experiment": EXP.to_json(), "seconds": 0.0, "log": log_state(workdir)}
        checkpoints.save(2, {"params": {"w": np.ones(3, np.float32)}}, meta)
    return workdir


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def config(workdir: Path, **run) -> Experiment:
    """Writes another config, which differs in its section `run` alone."""
    exp = build({**VALUES, "run": {**VALUES["run"], **run}})
    (workdir / CONFIG).write_text(exp.to_json())
    return exp


def flips(path: Path, n: int):
    """Writes a file with one bit flipped, n times over all of it, and the file as it was at the end."""
    whole = path.read_bytes()
    for at in np.linspace(0, 8 * len(whole) - 1, n).astype(int):
        data = bytearray(whole)
        data[at // 8] ^= 1 << (at % 8)
        path.write_bytes(data)
        yield
    path.write_bytes(whole)


def opened(opens, run: Path) -> Experiment | str:
    """The experiment, or the words of the error."""
    try:
        return opens(run)
    except ValueError as error:
        return str(error)


def test_no_flip_of_the_config_is_believed(run, caplog):
    """By all that opens a run, a flipped bit is an error in one line, or changes nothing."""
    found = []
    for number, _ in enumerate(flips(run / CONFIG, 300)):
        found.append(opened(confirmed_experiment, run))
        if number % 10 == 0:
            runs, notes = open_runs([run])
            assert [one.exp for one in runs] in ([], [EXP])
            assert len(runs) + len(notes) >= 1
            found.append(opened(lambda run: open_run(run).exp, run))
    errors = [one for one in found if one != EXP]
    assert all(str(error).count("\n") == 0 and str(run / CONFIG) in str(error) for error in errors)
    assert len(errors) > 200
    assert "is not confirmed by the log: that of the checkpoint of step 2 holds" in caplog.text
    assert confirmed_config(run) == VALUES


@pytest.mark.parametrize("opens", [confirmed_config, open_run, lambda run: train.check_claim(run, EXP)])
def test_another_config_than_the_checkpoints_is_refused(run, opens):
    (run / CONFIG).write_text((run / CONFIG).read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(
        ValueError, match=r"config\.json is not .* of step 2 \(seed was 3, is 4\); restore it from a copy"
    ):
        opens(run)


def test_a_continuation_that_has_begun_holds(run):
    """Longer than when the checkpoint was saved: config.json is newer, and the log has begun with it."""
    longer = config(run, steps=2000)
    write_log(run, longer, step=2)
    assert confirmed_experiment(run) == longer
    assert open_run(run).exp == EXP, "with which the checkpoint was trained"


def test_a_log_that_says_otherwise_without_a_checkpoint(run):
    shutil.rmtree(run / "checkpoints")
    assert confirmed_config(run) == VALUES
    config(run, steps=2000)
    with pytest.raises(ValueError, match="is not the config that the run began with, by its log"):
        confirmed_config(run)
    train.check_claim(run, EXP)  # it begins anew
    (run / FILE).unlink()
    assert confirmed_config(run)["run"]["steps"] == 2000


def test_what_was_not_recorded_is_not_compared(run):
    """Runs of earlier versions: no config in the checkpoint's meta, no digest in the log."""
    (run / FILE).write_text('{"kind": "start", "step": 0}\n')
    longer = config(run, steps=2000)
    assert confirmed_experiment(run) == longer
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": {"w": np.ones(3, np.float32)}}, {"seconds": 0.0})
    assert open_run(run).exp == longer


def test_a_damaged_config_is_one_line(run):
    for content in (b"", b"{", b"[]", b"null", b"\xff\x00", b"[" * 100_000):
        (run / CONFIG).write_bytes(content)
        for opens in (read_config, confirmed_config, open_run):
            with pytest.raises(ValueError, match=r"config\.json is damaged, so that this run cannot be told"):
                opens(run)


def test_a_comparison_says_that_a_log_was_changed(run):
    """By any bit of what it was when the checkpoint was saved, where it can still be read."""
    assert [note for note in open_runs([run])[1] if "changed" in note] == []
    read_on = 0
    for _ in flips(run / FILE, 60):
        runs, notes = open_runs([run])
        read_on += len(runs)
        assert any(
            "left out" in note or "metrics.jsonl have been changed since" in note or "of the 3 records" in note
            for note in notes
        )
    assert read_on > 20


def test_a_sweep_takes_no_run_by_its_config_alone(run):
    assert sweep.runs_in(run.parent) == {EXP: run}
    (run / CONFIG).write_text((run / CONFIG).read_text().replace('"seed": 3', '"seed": 4'))
    assert sweep.runs_in(run.parent) == {}
