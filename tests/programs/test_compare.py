"""Runs are compared as their logs say: none is lost, seeds are one row, and what cannot be read is said."""

import json
import math
import pathlib

import pytest

from experiments.compare import __main__ as compare
from experiments.compare.differences import differences
from experiments.compare.runs import open_runs
from moe_jax.config import build, plain
from moe_jax.inspect import report
from moe_jax.reporting import plots
from moe_jax.reporting.names import run_names
from moe_jax.reporting.report import write_report
from tests import programs

CONFIG = {
    "model": {"D": 8, "N": 2, "attention": "MHA(1, 4)", "moe": {"E": 4, "router": "TopK(K=2)", "experts": "MLP(F=8)"}},
    "data": {"L": 8, "B": 8},
    "optim": {"schedule": "Cosine(peak=0.004, warmup=1)"},
    "run": {"steps": 20},
}


def changed(values: dict, changes: dict) -> dict:
    """The config with other values at some paths."""
    values = json.loads(json.dumps(values))
    for path, value in changes.items():
        *folders, name = path.split(".")
        at = values
        for folder in folders:
            at = at[folder]
        at[name] = value
    return values


def write_run(folder: pathlib.Path, loss: float | None = 2.0, end: bool = True, origin=None, **changes) -> pathlib.Path:
    """A run of two log records as the trainer writes it."""
    folder.mkdir(parents=True)
    values = changed(CONFIG, {name.replace("__", "."): value for name, value in changes.items()})
    (folder / "config.json").write_text(build(values).to_json())
    records: list[dict] = [{"kind": "start", "step": 0, "seconds": 0.0, "data": "d" * 64}]
    records[0] |= {"origin": origin} if origin else {}
    for step, speed in ((10, 1000.0), (20, 3000.0)):
        moe = {"drop_rate": 0.25, "load_max_over_mean": 1.5}
        records.append(
            {"kind": "train", "step": step, "seconds": step / 2, "loss": 3.0, "tokens_per_second": speed} | moe
        )
    records += [{"kind": "eval", "step": 20, "seconds": 10.0, "loss": loss}] if end else []
    records += [{"kind": "end", "step": 20, "seconds": 3725.0}] if end else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[: 5 if end else 2]))
    return folder


def compared(tmp_path, *folders) -> tuple[dict, programs.Outcome]:
    file = tmp_path / "numbers.json"
    outcome = programs.call(compare, *folders, f"--json={file}", f"--report={tmp_path / 'page.html'}")
    assert outcome.code == 0, outcome
    return json.loads(file.read_text()), outcome


def test_runs_of_one_name_are_all_there(tmp_path):
    """In the comparison and in a run's own report, by the shortest ends of their paths."""
    a, b = write_run(tmp_path / "a" / "run", 2.0), write_run(tmp_path / "b" / "run", 1.5, model__D=16)
    found, outcome = compared(tmp_path, a, b)
    assert [row["name"] for row in found["rows"]] == ["b/run", "a/run"]
    assert [row["to_the_best"] for row in found["rows"]] == [0, 0.5]
    assert "b/run" in outcome.out
    page = write_report(a, "", [b, write_run(tmp_path / "c" / "run", 1.25), b]).read_text()
    for name, loss in (("a/run", "2.0000"), ("b/run", "1.5000"), ("c/run", "1.2500")):
        assert f"<th>{name}</th>" in page
        assert f"<td>{loss}</td>" in page
    assert page.count("<th>b/run</th>") == 1, "what is given twice is one run"


def test_names():
    names = run_names(["/x/a/s/1", "/x/b/s/1", "/x/b/s/2", "/x/b/s/../s/2"])
    assert {name: str(path) for name, path in names.items()} == {
        "a/s/1": "/x/a/s/1",
        "b/s/1": "/x/b/s/1",
        "b/s/2": "/x/b/s/2",
    }
    assert list(run_names(["/run", "/a/run"])) == ["/run", "a/run"]
    assert list(run_names(["/x/a", "/x/b"])) == ["a", "b"]


def test_seeds_are_one_row(tmp_path):
    """Mean and standard error of what differs in its seed alone; a copy of a seed is no second sample."""
    for seed, loss in ((0, 2.0), (1, 2.25), (2, 2.75)):
        write_run(tmp_path / "runs" / f"seed_{seed}", loss, seed=seed)
    write_run(tmp_path / "runs" / "other" / "deeper", 2.4, optim__schedule="Cosine(peak=0.008, warmup=1)")
    found, outcome = compared(tmp_path, tmp_path / "runs")
    three, other = found["rows"]
    assert [run["seed"] for run in three["runs"]] == [0, 1, 2]
    assert three["name"] == "seed_{0,1,2}"
    assert three["loss"] == pytest.approx(7 / 3)
    deviation = math.sqrt(sum((loss - 7 / 3) ** 2 for loss in (2.0, 2.25, 2.75)) / 2)
    assert three["loss_standard_error"] == pytest.approx(deviation / math.sqrt(3))
    assert other["name"] == "deeper"
    assert other["loss_standard_error"] is None
    assert other["to_the_best"] == pytest.approx(2.4 - 7 / 3)
    assert other["fields"] == {"config.optim.schedule.peak": "0.008"}
    assert "2.3333 ± 0.2205" in outcome.out
    copy = write_run(tmp_path / "copy", 2.0, seed=0)
    assert [len(row["runs"]) for row in compared(tmp_path, tmp_path / "runs", copy)[0]["rows"]] == [1, 3, 1]


def test_the_row_of_a_run(tmp_path):
    """Every number as the log has it, parameters as they are counted."""
    found, outcome = compared(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", model__moe__E=8))
    a = next(row for row in found["rows"] if row["name"] == "a")
    expected = {
        "drop_rate": 0.25,
        "load_max_over_mean": 1.5,
        "tokens_per_second": 2000.0,
        "seconds": 3725.0,
        "step": 20,
    }
    assert {name: a[name] for name in expected} == expected
    assert a["parameters"] - a["active_parameters"] == 2 * (2 * 8 * 8)  # two of four experts, in one layer
    line = next(line for line in outcome.out.splitlines() if line.startswith("a ") and "best" in line)
    assert line.split()[1:6] == ["2.0000", "best", "25.00%", "1.50", f"{a['parameters']:,}"]
    assert line.split()[-1] == "1:02:05"
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "config.model.moe.E" in page


def test_what_differs():
    """By flag path, into components of one class; as a whole where they are of another."""
    configs = [
        {"config": plain(build(changed(CONFIG, change)))}
        for change in (
            {},
            {
                "optim.schedule": "Cosine(peak=0.008, warmup=3)",
                "model.attention": "MHA(1, 4, position=Rotary(base=5.0))",
            },
            {"model.moe.router": "Switch()", "model.moe.losses": ["LoadBalance(0.5)"]},
            {"model.moe.router": "TopK(K=1, normalize=False)"},
        )
    ]
    pairs = [differences([configs[0]["config"], other["config"]]) for other in configs[1:]]
    assert pairs[0] == {
        "config.model.attention.position.base": ["10000.0", "5.0"],
        "config.optim.schedule.peak": ["0.004", "0.008"],
        "config.optim.schedule.warmup": ["1", "3"],
    }
    router, losses = pairs[1]["config.model.moe.router"], pairs[1]["config.model.moe.losses"]
    assert [value.partition("(")[0] for value in router] == ["TopK", "Switch"]
    assert len(losses) == 2
    two = [
        {"losses": ["LoadBalance(0.5)", f"RouterZ({weight})"], "gating": [f"Noise({weight})"] * 2}
        for weight in (1.0, 2.0)
    ]
    assert differences(two)["config.losses.RouterZ.weight"] == ["1.0", "2.0"]
    assert pairs[2] == {"config.model.moe.router.K": ["2", "1"], "config.model.moe.router.normalize": ["True", "False"]}
    assert differences([configs[0], configs[0]]) == {}


def test_what_a_run_began_with_differs(tmp_path):
    """Two runs of one config, one of them from another run's parameters, are two rows."""
    write_run(tmp_path / "runs" / "a", 2.0)
    write_run(tmp_path / "runs" / "b", 2.5, origin={"run": "/x/old", "step": 6}, seed=1)
    rows = compared(tmp_path, tmp_path / "runs")[0]["rows"]
    assert [row["fields"]["init_from"] for row in rows] == ["None", "/x/old step 6"]


def test_what_cannot_be_compared_is_said(tmp_path):
    """A line for each, and the rest is compared."""
    runs = tmp_path / "runs"
    write_run(runs / "good", 2.0)
    write_run(runs / "early", end=False, model__D=16)
    (write_run(runs / "torn") / "config.json").write_text('{"model": ')
    (write_run(runs / "older") / "config.json").write_text(json.dumps({"model": {"D": 8, "N": 1, "H": 2}}))
    (write_run(runs / "lines") / "metrics.jsonl").write_text('x\n{"kind": "end", "step": 20}\n')
    (write_run(runs / "words") / "metrics.jsonl").write_text('{"kind": "eval", "step": 20, "loss": "low"}\n')
    (write_run(runs / "silent") / "metrics.jsonl").write_text("")
    (write_run(runs / "nameless") / "config.json").unlink()
    (runs / "empty").mkdir()
    (runs / "bench.json").write_text("{}")
    found, outcome = compared(tmp_path, *sorted(runs.iterdir()))
    assert [(row["name"], row["finished"]) for row in found["rows"]] == [("good", True), ("early", False)]
    assert found["rows"][1]["loss"] is None
    lines = outcome.out.splitlines()
    for words in (
        f"{runs / 'bench.json'}: left out, it is a file",
        f"{runs / 'empty'}: left out, no run is in it",
        "early: unfinished, at step 10 of 20",
        "torn: left out, its config.json is damaged",
        "older: left out, its config is of another version: config.model.H is a field of the attention since",
        "lines: left out, line 1 of",
        "words: left out, its metrics.jsonl is damaged",
        "silent: left out, nothing has been logged",
        "nameless: left out, it has no config.json",
    ):
        assert sum(line.startswith(words) for line in lines) == 1, words
    assert len(found["notes"]) == 9


def test_a_run_that_has_diverged(tmp_path):
    """By the end that its log has."""
    log = write_run(tmp_path / "run") / "metrics.jsonl"
    log.write_text(log.read_text().replace('"kind": "end"', '"kind": "end", "diverged": true'))
    runs, notes = open_runs([tmp_path / "run"])
    assert not runs[0].finished
    assert notes == ["run: diverged, at step 20 of 20"]


def test_other_data_is_said(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", data__L=16)
    assert "different data" not in compared(tmp_path, a, b)[1].out
    (b / "metrics.jsonl").write_text((b / "metrics.jsonl").read_text().replace("dddd", "eeee"))
    assert "different data" in compared(tmp_path, a, b)[1].out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["No runs were given", "experiments.compare runs/*"]),
        (["{tmp}/none"], ["There is no folder", "none"]),
        (["{tmp}"], ["There is no run to compare", "no run is in it"]),
        (["{tmp}", "--report={tmp}/none/page.html"], ["--report=", "there is no folder"]),
        (["{tmp}", "--json={tmp}"], ["is a folder; give a file"]),
        (["--reprot=x", "{tmp}"], ["reprot", "report"]),
    ],
)
def test_a_wrong_command_line(argv, words, tmp_path):
    error = programs.call(compare, *(word.format(tmp=tmp_path) for word in argv)).error
    for word in words:
        assert word in error


def test_many_groups_are_drawn(tmp_path):
    """More than there are colours, each by its name."""
    for i in range(8):
        write_run(tmp_path / "runs" / f"peak_{i}", 2 + i, optim__schedule=f"Constant({i + 1.0})")
    compared(tmp_path, tmp_path / "runs")
    page = (tmp_path / "page.html").read_text()
    drawn = page[page.index("<svg") :]
    assert all(drawn.count(f">peak_{i}<") == 2 for i in range(8))


def test_figures_of_one_title_are_all_there(monkeypatch):
    """An inspection beside two runs has two figures of each comparison."""
    drawn = [[plots.lines([], "x", "y", title)] for title in ("Load", "Saturation", "Saturation 2", "Saturation")]
    monkeypatch.setattr(
        report, "report_sections", lambda found: [report.ReportSection("", "", parts) for parts in drawn]
    )
    named = report.named_figures({})
    assert list(named) == ["load", "saturation", "saturation_2", "saturation_3"]
    assert list(named.values()) == [parts[0] for parts in drawn]
