"""A sweep trains every combination once, in a folder of its own, and goes on where it was."""

import json
import shlex
import shutil
import sys

import pytest

from experiments.sweep import __main__ as sweep
from experiments.sweep.grid import parse_axis, points, run_name
from moe_jax.config import Experiment
from tests import programs
from tests.programs.test_compare import CONFIG

FILE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({config!r})
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(FILE.format(config=CONFIG))
    return f"--config={tmp_path / 'config.py'}"


@pytest.fixture
def trained(monkeypatch):
    """The commands that would have been run; each leaves a finished run, or fails where its batch is of 24."""
    commands = []

    def train(command):
        commands.append(command)
        flags = dict(word.removeprefix("--").split("=", 1) for word in command[3:])
        if flags.get("config.data.B") == "24":
            return "no good"
        point = points(CONFIG, [word for word in command if word.startswith("--config.")], [], 1)[0]
        folder = sweep.pathlib.Path(flags["workdir"])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(point.exp.to_json())
        steps, seed = point.exp.run.steps, point.exp.seed
        loss = point.exp.data.B / 10 + seed / 100
        records = [{"kind": "eval", "step": steps, "seconds": 1.0, "loss": loss}]
        records += [{"kind": "end", "step": steps, "seconds": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return None

    monkeypatch.setattr(sweep, "train", train)
    return commands


# ---- grids


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("optim.clip=0.5,1.0", "optim.clip", ["0.5", "1.0"]),
        ("config.optim.clip=0.5", "optim.clip", ["0.5"]),
        ("model.moe.router=Switch();TopK(K=2)", "model.moe.router", ["Switch()", "TopK(K=2)"]),
        ("r=TopK(K=2, normalize=False),Switch()", "r", ["TopK(K=2, normalize=False)", "Switch()"]),
        ("r=MHA(4, position=Rotary(base=1.0, scaling=None)), MLA()", "r", 2),
        ("r=('a,b', 'c;d');()", "r", ["('a,b', 'c;d')", "()"]),
        ("r='a,b','c)',d", "r", ["'a,b'", "'c)'", "d"]),
        ("r=1,2;3", "r", ["1,2", "3"]),
    ],
)
def test_values_of_a_grid(text, path, values):
    found = parse_axis(text)
    assert found[0] == path
    assert len(found[1]) == values if isinstance(values, int) else found[1] == values


def test_names_of_runs():
    """Readable, without what a shell or a file system would take for something else, and short."""
    assert run_name({"optim.schedule.peak": "0.004", "seed": "0"}) == "peak=0.004,seed=0"
    assert run_name({"a.x": "1", "b.x": "-2"}) == "a.x=1,b.x=-2"
    assert run_name({"model.moe.router": "TopK(K=2, score='sigmoid')"}) == "router=TopK-K=2-score=sigmoid"
    assert run_name({"data.source": "Folder(path='../texts/a b')"}) == "source=Folder-path=..-texts-a-b"
    long = [run_name({"r": f"TopK({'K=2, ' * 20}{i})"}) for i in range(2)]
    assert long[0] != long[1]
    assert all(len(name) < 60 for name in long)


def test_all_combinations_are_built():
    """Values are in the order given, seeds last; each run has its own name and config."""
    grid = ["optim.clip=0.5,1.0", "model.moe.router=Switch();TopK(K=2)"]
    made = points(CONFIG, ["--config.data.L=16", "--config.seed=5"], grid, 2)
    assert [point.name for point in made][:3] == [
        "clip=0.5,router=Switch,seed=5",
        "clip=0.5,router=Switch,seed=6",
        "clip=0.5,router=TopK-K=2,seed=5",
    ]
    assert len({point.name for point in made}) == len({point.exp for point in made}) == 8
    assert {(p.exp.optim.clip, type(p.exp.model.moe.router).__name__, p.exp.seed, p.exp.data.L) for p in made} == {
        (clip, router, seed, 16) for clip in (0.5, 1.0) for router in ("Switch", "TopK") for seed in (5, 6)
    }


# ---- the program


def test_a_sweep_goes_on_and_grows(config, trained, tmp_path):
    """Finished runs are not trained again, under any name; interrupted and new ones are."""
    flags = [config, f"--workdir={tmp_path / 'sweep'}", "--seeds=2"]
    first = programs.call(sweep, *flags, "--grid", "data.B=8,16")
    assert first.code == 0, first
    assert [shlex.join(command[4:]) for command in trained] == [
        f"--config.data.B={B} --config.seed={seed} --workdir={tmp_path / 'sweep'}/B={B},seed={seed}"
        for B in (8, 16)
        for seed in (0, 1)
    ]
    assert trained[0][:4] == (sys.executable, "-m", "experiments.train", config)
    for words in (
        "[1/4] B=8,seed=0: training",
        "held-out loss 0.8000 after",
        "0:00:00 left",
        "4 of 4 runs have finished",
    ):
        assert words in first.err
    rows = json.loads((tmp_path / "sweep" / "comparison.json").read_text())["rows"]
    assert [(row["name"], row["loss"]) for row in rows] == [("B=8,seed={0,1}", 0.805), ("B=16,seed={0,1}", 1.605)]
    assert "B=8,seed={0,1}" in first.out
    assert "<svg" in (tmp_path / "sweep" / "comparison.html").read_text()

    trained.clear()
    (log := tmp_path / "sweep" / "B=8,seed=1" / "metrics.jsonl").write_text('{"kind": "train", "step": 10}\n')
    shutil.rmtree(tmp_path / "sweep" / "B=16,seed=0")
    dry = programs.call(sweep, *flags, "--grid", "data.B=8,16,32", "--dry_run")
    states = [line.rpartition(": ")[2] for line in dry.out.splitlines() if line.startswith("#")]
    assert states == ["finished", "interrupted at step 10", "new", "finished", "new", "new"]
    assert shlex.split(dry.out.splitlines()[1])[4] == "--config.data.B=8"
    assert trained == []
    shutil.rmtree(log.parent)  # the trainer of this test makes a folder anew
    second = programs.call(sweep, *flags, "--grid", "data.B=8,16,32")
    assert second.code == 0, second
    assert len(trained) == 4
    assert "[1/6] B=8,seed=0: finished before" in second.err

    trained.clear()
    wider = programs.call(sweep, *flags, "--grid", "data.B=8,16,32", "--grid", "optim.clip=1.0,0.5")
    assert wider.code == 0, wider
    assert len(trained) == 6
    assert all("--config.optim.clip=0.5" in command for command in trained), "1.0 is what the others have"


def test_one_failure_stops_no_other(config, trained, tmp_path):
    outcome = programs.call(sweep, config, f"--workdir={tmp_path / 's'}", "--grid", "data.B=24,8,16")
    assert outcome.code == 1
    assert len(trained) == 3
    assert "[1/3] B=24,seed=0: failed, no good" in outcome.err
    assert "B=24,seed=0: failed, no good" in outcome.out
    assert "2 of 3 runs have finished" in outcome.err
    again = programs.call(sweep, config, f"--workdir={tmp_path / 's'}", "--grid", "data.B=24,8,16")
    assert again.code == 1
    assert len(trained) == 4, "what has failed is tried again"
    none = programs.call(sweep, config, f"--workdir={tmp_path / 'none'}", "--grid", "data.B=24", "--seeds=2")
    assert (none.code, none.out) == (1, ""), none
    assert "B=24,seed=1: failed, no good" in none.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--grid", "data.B=8,x"], ["--config.data.B=x --config.seed=0: config.data.B='x' must be a whole number"]),
        (["--grid", "data.b=8"], ["config.data has no field 'b'"]),
        (["--grid", "model.moe.router=TopK(K=2);TopK(K=9)"], ["--config.model.moe.router=TopK(K=9)", "K=9 of E=4"]),
        (["--grid", "data.B"], ["--grid=data.B is no PATH=VALUE"]),
        (["--grid", "data.B=8,"], ["has an empty value"]),
        (["--grid", "data.B=8,8"], ["has 8 twice"]),
        (["--grid", "data.B=8", "--grid", "config.data.B=16"], ["gives data.B twice"]),
        (["--grid", "model.moe.router=TopK(K=1, normalize=False),TopK(1, normalize=False)"], ["have the same config"]),
        (["--grid", "seed=1,2", "--seeds=2"], ["both give seeds"]),
        (["--seeds=0"], ["--seeds=0 must be at least 1"]),
        ([], ["There is one run only", "--grid"]),
        (["--grid", "data.B=8,16", "--workdir="], ["No place for the runs"]),
        (["--grid", "data.B=8,16", "--config="], ["No experiment was given"]),
        (["--grid", "data.B=8,16", "--workdir={tmp}/run"], ["holds a run"]),
        (["--grid", "data.B=8,16", "--workdir={tmp}/other"], ["B=8,seed=0 holds another run (data.L was 16, is 8)"]),
    ],
)
def test_a_wrong_command_line(argv, words, config, trained, tmp_path):
    """Nothing is trained, no folder is made."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (other := tmp_path / "other" / "B=8,seed=0").mkdir(parents=True)
    longer = {**CONFIG, "data": {"L": 16, "B": 8}}
    (other / "config.json").write_text(Experiment.from_json(json.dumps(longer)).to_json())
    before = sorted(tmp_path.rglob("*"))
    error = programs.call(
        sweep, config, f"--workdir={tmp_path / 'sweep'}", *(a.format(tmp=tmp_path) for a in argv)
    ).error
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before
    assert trained == []


def test_how_a_training_ends(capfd):
    """The lines are passed on; the reason of a failure is the last of them."""
    lines = "print('step 1'); print('error: diverged'); raise SystemExit(2)"
    assert sweep.train([sys.executable, "-c", lines]) == "diverged"
    assert "  step 1\n" in capfd.readouterr().err
    assert sweep.train([sys.executable, "-c", "print('step 1')"]) is None
    assert sweep.train([sys.executable, "-c", "raise SystemExit(3)"]) == "exit code 3"
    assert sweep.train([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == "killed by signal 9"


def test_a_real_sweep(tmp_path):
    """Two processes: one trains, the other finds no texts; then the first is left alone."""
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text number {i}, " * 20)
    model = {"D": 8, "N": 1, "attention": "MHA(1, 4)", "ffn": "MLP(F=4)", "moe_layers": "none", "remat": "none"}
    run = {"steps": 1, "eval_sequences": 8}
    (tmp_path / "config.py").write_text(FILE.format(config={"model": model, "data": {"L": 8, "B": 8}, "run": run}))
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'sweep'}", f"--data_dir={tmp_path / 'data'}"]
    grid = f"data.source=Folder(path='{tmp_path}/texts');Folder(path='{tmp_path}/none')"
    outcome = programs.call(sweep, *flags, "--grid", grid)
    assert outcome.code == 1, outcome
    notes = json.loads((tmp_path / "sweep" / "comparison.json").read_text())["notes"]
    assert any("failed" in note and f"{tmp_path}/none" in note for note in notes), notes
    folders = sorted((tmp_path / "sweep").glob("source=*"), key=lambda folder: not (folder / "report.html").is_file())
    finished, failed = folders
    assert (finished / "report.html").is_file()
    assert not (failed / "metrics.jsonl").exists()
    dry = programs.call(sweep, *flags, "--grid", grid, "--dry_run").out
    assert [line.rpartition(": ")[2] for line in dry.splitlines()[::2]] == ["finished", "new"]
