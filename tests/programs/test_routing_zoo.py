"""The study of routers: its contestants are equal, its sweep goes on, its programs answer."""

import json
import math
import os
import subprocess
import sys

import pytest

from experiments.routing_zoo import present, zoo
from experiments.routing_zoo.sweep import Sweep, ranked, result, save, summaries
from moe_jax.config import build
from moe_jax.core.traits import traits
from moe_jax.costs import flops
from moe_jax.routers import ROUTERS

BASE = zoo.base()
BY_NAME = {c.name: c for c in zoo.CONTESTANTS}
TWIN = build(zoo.configure(BY_NAME[zoo.DENSE], BASE))
TWIN_FLOPS = flops(TWIN.model, TWIN.data.shapes(1)).forward
ROUTED = [c for c in zoo.CONTESTANTS if c.router]


# ---- the contestants


def test_every_causal_router_is_a_contestant_and_no_other():
    """Routers that look at later tokens would win by a leak."""
    causal = {cls for cls in ROUTERS if traits(cls).causal}
    assert {type(build(zoo.configure(c, BASE)).model.moe.router) for c in ROUTED} == causal
    assert len(BY_NAME) == len(zoo.CONTESTANTS), "names are different"


@pytest.mark.parametrize("contestant", zoo.CONTESTANTS, ids=lambda c: c.name)
def test_contestants_have_equal_active_flops(contestant):
    """To the integer where a token visits K experts; otherwise up to the rounding of the width."""
    exp = build(zoo.configure(contestant, BASE))
    assert (exp.data, exp.optim, exp.run, exp.mesh) == (TWIN.data, TWIN.optim, TWIN.run, TWIN.mesh)
    moe, width = exp.model.moe, TWIN.model.moe.F
    if contestant.active is None:
        cost = flops(exp.model, exp.data.shapes(1))
        assert cost.forward - cost.kinds.get("router", 0) == TWIN_FLOPS
    else:
        assert contestant.active * moe.experts.F == pytest.approx(width, rel=0.01)
    if contestant.router:
        slots = moe.dispatch.capacity_factor * moe.router.K
        assert slots * moe.experts.F == pytest.approx(1.5 * width, rel=0.01), "slots times width are equal too"
        assert moe.E % dict(exp.mesh)["expert"] == 0
        assert "task" not in moe.needs or moe.traits.tasks >= 8, "the corpus has eight domains"


def test_the_first_top_k_is_the_recipe_itself():
    """Nothing but the name of the router is changed: Top2 that always uses its second is TopK(K=2)."""
    contestant, recipe = (build(c).model for c in (zoo.configure(BY_NAME["top_k"], BASE), BASE))
    assert repr(contestant) == repr(recipe).replace(repr(recipe.moe.router), repr(contestant.moe.router))


def test_kinds_of_contestants():
    fixed = {c.name for c in zoo.CONTESTANTS if c.kind == "fixed"}
    assert fixed == {"hash", "random", "round_robin"}
    assert [c.name for c in zoo.CONTESTANTS if c.kind == zoo.DENSE] == [zoo.DENSE]


def test_schedules_go_with_the_length_of_a_run():
    exp = build(zoo.configure(BY_NAME["annealed"], zoo.base(80)))
    assert exp.model.moe.gating[0].steps == exp.run.steps == 80
    assert exp.optim.schedule.warmup == 10
    assert build(zoo.base(1)).run.log_every == 1


# ---- a small sweep


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base config of a tiny model on a few texts, and a folder."""
    root = tmp_path_factory.mktemp("zoo")
    (root / "texts").mkdir()
    for i in range(12):
        (root / "texts" / f"{i}.txt").write_text(f"text number {i}, " * 20)
    base = zoo.base(steps=2)
    base.model.update({"D": 8, "attention": "MHA(1, 4)", "ffn": "MLP(F=4)"})
    base.model.moe.update({"E": 8, "experts": "MLP(F=4)", "S": 8})
    base.data.update({"source": f"Folder(path={str(root / 'texts')!r})", "L": 8, "B": 8})
    base.run.eval_sequences = 8
    return base, root


@pytest.fixture(scope="module")
def swept(small):
    """Two contestants, the better one on a second seed."""
    base, root = small
    sweep = Sweep(base, root / "runs", root / "data")
    return sweep, sweep.run(zoo.choose(["dense", "top_k"]), leaders=1, leader_seeds=2)


def test_a_sweep_end_to_end(swept, small):
    sweep, results = swept
    base, root = small
    assert len(sweep.took) == 3
    assert [(r["contestant"], r["seed"]) for r in results[:2]] == [("dense", 0), ("top_k", 0)]
    assert (results[2]["contestant"], results[2]["seed"]) == (ranked(results[:2])[0], 1)
    routed = results[1]
    assert routed["active_experts"] == 2
    assert routed["F"] == 4
    assert all(r["active_flops"] == 1 for r in results)
    assert all(math.isfinite(value) for value in routed.values() if isinstance(value, float))
    assert 4 < routed["loss"] < 7  # nats per byte of a model that knows nothing; log(256) = 5.5
    assert 0 <= routed["load_entropy"] <= math.log(8)
    assert math.isnan(results[0]["load_cv"])
    save(root / "results.json", base, results)
    saved = json.loads((root / "results.json").read_text())
    assert saved["steps"] == 2
    assert len(saved["runs"]) == 3
    assert saved["runs"][0]["load_cv"] is None
    table = present.markdown(results).splitlines()
    assert len(table) == 4
    assert table[2].split("|")[2].strip() == ranked(results)[0]
    assert " ± " in table[2]
    assert " ± " not in table[3]
    present.plot(root / "results.svg", results)
    picture = (root / "results.svg").read_text()
    for word in ("dense", "top_k", "held-out loss", "milliseconds per training step"):
        assert word in picture


def test_a_second_call_runs_nothing_again(swept, small, capsys):
    base, root = small
    again = Sweep(base, root / "runs", root / "data")
    contestants = zoo.choose(["dense", "top_k"])
    assert repr(again.run(contestants, leaders=1, leader_seeds=2)) == repr(swept[1])
    assert again.took == []
    assert capsys.readouterr().err == ""
    run = again.runs(contestants, range(1))[1]
    log = run.folder / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("".join(line for line in whole.splitlines(keepends=True) if '"end"' not in line))
    assert not run.finished, "a run without its end is run again"
    log.write_text(whole)
    assert run.finished


def test_another_sweep_is_left_alone(swept, small):
    base, root = small
    other = base.copy_and_resolve_references()
    other.run.log_every = 2
    with pytest.raises(ValueError, match="holds a run of another sweep; choose another --workdir"):
        Sweep(other, root / "runs").run(zoo.choose(["dense"]))


def test_a_run_that_diverged_is_last(swept, small):
    sweep, results = swept
    run = sweep.runs(zoo.choose(["dense"]), range(7, 8))[0]
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"kind": "end", "step": 1, "seconds": 1.0, "diverged": true}\n')
    bad = {**result(run, sweep.base), "contestant": "bad"}
    assert math.isnan(bad["loss"])
    assert ranked([bad, *results])[-1] == "bad"
    assert present.rows([bad, *results])[-1][3] == "-"


def test_means_and_deviations():
    rows = [{"contestant": "a", "loss": 1.0}, {"contestant": "a", "loss": 2.0}, {"contestant": "b", "loss": 1.25}]
    found = summaries(rows)
    assert found["a"]["loss"] == (1.5, pytest.approx(0.5**0.5))
    assert found["b"]["loss"][0] == 1.25
    assert math.isnan(found["b"]["loss"][1])
    assert ranked(rows) == ["b", "a"]
    assert present.cell("{:.4f}", *found["a"]["loss"]) == "1.5000 ± 0.7071"


# ---- the programs, as a user sees them


def program(name: str, *argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", name, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_a_wrong_command_line(tmp_path):
    outcome = program("experiments.routing_zoo", f"--workdir={tmp_path / 'runs'}", "--only=top_kk")
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr == "error: --only names no contestant 'top_kk'; did you mean 'top_k'?\n"
    assert not (tmp_path / "runs").exists()


def test_costs_of_every_router(tmp_path):
    outcome = program("experiments.routing_zoo.cost", "--quick", f"--json={tmp_path / 'cost.json'}")
    assert outcome.returncode == 0, outcome.stderr
    rows = [line.split("|")[1:-1] for line in outcome.stdout.splitlines()[2:]]
    assert [row[0].strip().strip("`").partition("(")[0] for row in rows] == [cls.__name__ for cls in ROUTERS]
    assert all(float(row[-1]) > 0 for row in rows)
    record = json.loads((tmp_path / "cost.json").read_text())
    assert [row["routing, E=8"] for row in record] == [row[-1].strip() for row in rows]
