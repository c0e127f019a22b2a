"""The inspection of a run: numbers are those of the functions, the page stands alone, mistakes are one line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import cli
from experiments import inspect as program
from moe_jax import inspect as i
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import build
from moe_jax.data import evaluation_batches
from moe_jax.inspect import live, report
from moe_jax.inspect.analysis import analyse, compare_recordings, effects_of, layer_names
from moe_jax.inspect.knockout import DomainLosses, Effects
from moe_jax.inspect.recorder import layers_of
from moe_jax.models.pattern import moe_paths
from moe_jax.reporting.metrics import FILE, to_json
from moe_jax.step import State
from tests import programs
from tests.components.test_inspect import made
from tests.pages import stands_alone

call = partial(programs.call, program)


# ---------------------------------------------------------------- planted


N, E, K, Q, L = 2, 6, 2, 60, 10


@pytest.fixture(scope="module")
def rec():
    """Expert 0 of the second layer is for a domain with an odd name, expert 5 is dead, position 0 is dropped."""
    rng, T = np.random.default_rng(0), Q * L
    sequence = np.repeat(np.arange(Q), L)
    domain = sequence % 2
    expert = np.argsort(rng.random((T, N, E - 1)), -1)[..., :K]
    own = domain == 0
    expert[own, 1] = np.array([0, 3])
    expert[~own, 1] = np.argsort(rng.random(((~own).sum(), E - 2)), -1)[..., :K] + 1
    kept = np.ones(expert.shape, bool)
    kept[np.arange(T) % L == 0] = False
    token = rng.integers(0, 4, T)
    token[expert[:, 0, 0] == 2] = 7  # what expert 2 of the first layer gets
    probs = rng.dirichlet(np.ones(E), (T, N))
    return made(expert, E, domain, token, sequence, kept, probs)._replace(
        domains=("<b>&$x^{$", "other"), position_T=np.arange(T) % L
    )


@pytest.fixture(scope="module")
def found(rec):
    base = DomainLosses(np.array([2.0, 2.0]), np.array([1.0, 1.0]))
    rise = np.arange(N * E) / 10
    effects = Effects(tuple(np.ndindex(N, E)), base, rise, np.stack([rise, -rise], 1))
    return analyse(rec, ["layer 1", "layer 3"], lambda t: f"<t{t}>") | {
        "step": 1200,
        "knock_out": effects_of(effects),
        "weights": {"similarity": np.zeros((N, E, E)), "duplicates": [[(0, 1)], []]},
        "compare": [],
    }


def test_what_is_planted_is_told(found):
    """In numbers and in words."""
    assert found["dead"].sum(0).tolist() == [0, 0, 0, 0, 0, 2]
    np.testing.assert_allclose(found["drop_rate"], 1 / L)
    np.testing.assert_allclose(found["by_position"]["drop_rate"][:, 0], [1] + [0] * (L - 1))
    np.testing.assert_allclose(found["drops_again"]["share_NN"], 1)
    assert found["information"]["p_N"][1] < 0.01
    assert found["favourites"][0][2][0]["token"] == "<t7>"
    page = report.inspection_page("run <x>", found, "config", ["card of <y>"])
    said = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "2 dead experts, 2 with a duplicate by weights; 10.00% of choices dropped" in said
    assert "expert 0 of layer 3 is for &lt;b&gt;&amp;$x^{$: 100.0% of its tokens choose it, 2.0 times" in said
    assert "92% of the experts are missed" in said  # all but the first
    assert "most of all expert 5 of layer 3, without which the loss rises by 1.1000 nats" in said
    assert "loses one in another in 100.0% of cases; by chance 10.0%" in said
    for word in ("<b>&$x^{$", "<t7>", "<x>", "<y>"):
        assert word not in page
    stands_alone(page)


def test_every_section_has_its_figures(found):
    page = stands_alone(report.inspection_page("a", found, ""))
    for title in (
        *("Load", "Router margin", "Domains of experts", "Domain and expert", "What is lost without an expert"),
        *("Chosen together", "From layer to layer", "Likeness of experts' weights", "Entropy by position"),
        *("Drops by position", "By domain"),
    ):
        assert title in page.titles, title
    names = report.named_figures(found)
    assert len(names) == 11
    assert "what_is_lost_without_an_expert" in names


def test_the_json_makes_the_same_page(found):
    """Nothing is in the page that is not in the JSON, which is strict."""
    text = json.dumps(to_json(found, 5), allow_nan=False)
    assert [h for h, *_ in report.report_sections(json.loads(text))] == [h for h, *_ in report.report_sections(found)]
    assert report.inspection_summary(json.loads(text)) == report.inspection_summary(found)
    values = {"a": np.array([1 / 3, np.nan]), 1: (np.float32(2), None)}
    assert to_json(values, 5) == {"a": [0.33333, None], "1": [2.0, None]}


def test_little_is_told_of_little(rec):
    """One layer, one domain, all experts chosen, no words: no section without numbers, and none fails."""
    one = rec.where(rec.domain_T == 1)
    few = one._replace(**{name: a[:, :1] for name, a in one.columns.items() if name.endswith(("TNK", "TNP", "TN"))})
    found = analyse(few, ["layer 0"]) | {"step": 1}
    for absent in ("specialisation", "information", "fairness", "favourites", "by_domain"):
        assert found[absent] is None
    page = stands_alone(report.inspection_page("a", to_json(found, 5), ""))
    assert "From layer to layer" not in page.titles
    assert "paths" not in report.paths(found)


def test_a_recording_compared_with_itself_is_the_same(rec):
    """With itself all is the same; with experts exchanged nothing but chance."""
    np.testing.assert_array_equal(compare_recordings(rec, rec)["saturation"], 1)
    other = rec._replace(expert_TNK=np.where(rec.expert_TNK < E, (rec.expert_TNK + 1) % E, E).astype(np.int16))
    same = [
        np.mean([len({*a} & {*b}) / K for a, b in zip(rec.expert_TNK[:, n], other.expert_TNK[:, n], strict=True)])
        for n in range(N)
    ]
    np.testing.assert_allclose(compare_recordings(rec, other)["saturation"], same)
    shuffled = rec._replace(expert_TNK=rec.expert_TNK[np.random.default_rng(1).permutation(rec.tokens)])
    by_chance = compare_recordings(rec, shuffled)
    np.testing.assert_allclose(by_chance["saturation"], by_chance["chance"], atol=0.06)


# ---------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small model of two MoE layers at two steps, saved as a run is, on two domains; and a dense one."""
    folder = tmp_path_factory.mktemp("inspected")
    for domain in ("up", "down"):
        (folder / "text" / domain).mkdir(parents=True)
        for n in range(60):
            row = [(n * 7 + j * (1 if domain == "up" else -1)) % 50 for j in range(60)]
            (folder / "text" / domain / f"{n}.txt").write_text(" ".join(map(str, row)))
    moe = {"E": 3, "router": "TopK(K=2)", "experts": "MLP(F=4)", "dispatch": "Scatter(1.0)"}
    model = {
        "D": 8,
        "N": 2,
        "attention": "MHA(2, 4)",
        "ffn": "MLP(F=4)",
        "remat": "none",
        "moe_layers": "all",
        "moe": moe,
    }
    data = {"source": f"Folder(path='{folder / 'text'}')", "L": 16, "B": 8}
    for name, own in {"run": model, "dense": {**model, "moe_layers": "none"}}.items():
        exp = build({"model": own, "data": data, "mesh": {"data": 8}})
        shapes = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), exp.data.shapes(1))
        zero = jnp.zeros((), jnp.int32)
        with Checkpoints(folder / name / "checkpoints") as checkpoints:
            for step in (1, 2):
                params = jax.jit(exp.model.init)(jax.random.key(step), shapes)
                checkpoints.save(step, State(zero + step, params, {}, exp.model.init_router(), zero, zero), {})
        (folder / name / "config.json").write_text(exp.to_json())
    return folder


def test_a_run_is_inspected(run):
    """Page, JSON and figures; the numbers are those of a recording and of a knock-out made by hand."""
    said = call(
        *(f"--workdir={run / 'run'}", f"--data_dir={run / 'data'}", "--windows=16", f"--out={run / 'figures'}"),
        *(f"--compare={run / 'run'}@1", f"--compare={run / 'run'}", "--figure_kind=png"),
    )
    assert said.code == 0, said.err[-2000:]
    folder = run / "run" / "inspect"
    page = stands_alone((folder / "report.html").read_text())
    assert "What breaks without them" in page.titles
    assert f"Compared with {run / 'run'}@1" in page.titles
    found = json.loads((folder / "report.json").read_text())
    it = i.open_run(run / "run")
    split = it.exp.data.prepare(run / "data")[1]
    batches = list(evaluation_batches(split, 8, 16))
    rec = i.joined(i.recordings(it.exp, it.params, batches, {}, split.domains))
    assert (found["step"], found["tokens"], found["layers"]) == (2, rec.tokens, ["layer 0", "layer 1"])
    np.testing.assert_array_equal(found["choices"], i.expert_choices(rec))
    np.testing.assert_allclose(found["loss"], np.nanmean(rec.loss_T), rtol=1e-4)
    effects = i.knock_out(it.exp.model, it.params, batches, {}, experts=[(0, 1), (1, 2)])
    np.testing.assert_allclose(np.array(found["knock_out"]["rise"])[[1, 5]], effects.rise_P, atol=2e-5)
    earlier, same = found["compare"]
    assert same["same"]["saturation"] == [1, 1]
    assert earlier["step"] == 1
    assert max(earlier["same"]["saturation"]) < 1
    assert len(list((run / "figures").glob("*.png"))) == len(report.named_figures(found))
    assert "expert" in (folder / "report.html").read_text().split("Cards of the")[1]


def test_without_a_knock_out(run):
    """As a program of its own, which has to ask for the devices of the run's mesh."""
    flags = (f"--workdir={run / 'run'}", f"--data_dir={run / 'data'}", "--windows=8")
    files = (f"--report={run / 'other.html'}", f"--json={run / 'other.json'}")
    command = [sys.executable, "-m", "experiments.inspect", *flags, *files, "--noknock_out", "--step=1"]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    found = json.loads((run / "other.json").read_text())
    assert found["step"] == 1
    assert "step 1" in (run / "other.html").read_text()
    assert "knock_out" not in found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "No run was given"),
        (["--workdir=none"], "There is no run in none"),
        (["--workdir={run}", "--step=7"], "7"),
        (["--workdir={run}", "--windows=0"], "--windows=0 must be at least 1"),
        (["--workdir={run}", "--compare={run}@last"], "'last' is no step; write"),
        (["--workdir={run}", "--compare=none"], "There is no run in none"),
        (["--workdir={dense}"], "The model has no MoE layer to record"),
        (["--workdir={run}", "--compare={dense}"], "it has no MoE layer; compare with a run that has some"),
        (["--workdir={run}", "--out={run}/config.json"], "is a file; give a folder"),
        (["--workdir={run}", "--json=no/where.json"], "there is no folder no"),
        (["--workdir={run}", "--live"], "there is no metrics.jsonl"),
    ],
)
def test_mistakes_are_one_line(run, flags, words):
    given = [flag.format(run=run / "run", dense=run / "dense") for flag in flags]
    assert words in call(*given, f"--data_dir={run / 'data'}").error


@pytest.mark.parametrize("flags", [[], ["--report={run}/a.html"], ["--out={run}/figures/more"], ["--live"]])
def test_where_nothing_can_be_written_it_is_said_first(run, flags, monkeypatch):
    """Before anything is recorded, which takes minutes."""

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", read_only)
    for late in ("inspected", "write_report"):
        monkeypatch.setattr(program, late, lambda *_: pytest.fail("it has begun"))
    given = [flag.format(run=run / "run") for flag in flags]
    error = call(f"--workdir={run / 'run'}", f"--data_dir={run / 'data'}", *given).error
    assert re.match(r"Nothing can be written to \S+ \(Read-only file system\); (give --report|copy the run)", error)


# ---------------------------------------------------------------- a run in progress


def test_a_curve_in_one_line():
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert live.sparkline([1, 1, np.nan, 1]) == "▁▁ ▁"
    assert live.sparkline([]) == ""
    assert live.sparkline(np.arange(100), width=4) == "▁▃▆█"
    assert live.load_bars([0.5, 0.25, 0.25, 0]) == "█▅▅·"


def records(steps: int) -> list[dict]:
    moe = {
        "layer": [1],
        "load": [[0.5, 0.5, 0.0, 0.0]],
        "drop_rate": [0.125],
        "router_entropy": [1.25],
        "dead_experts": [2],
    }
    start = [{"kind": "start", "step": 0, "seconds": 0.0}]
    return start + [
        {
            "kind": "train",
            "step": n,
            "seconds": 2.0 * n,
            "loss": 5.0 - n,
            "drop_rate": 0.1,
            "tokens_per_second": 1e4,
            "moe": moe,
        }
        for n in range(1, steps + 1)
    ]


def shown(view) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(view)
    return console.export_text()


def test_what_is_shown_of_a_run():
    text = shown(live.view(records(3), total=10))
    assert "step 3 of 10, 0:00:06, 0:00:14 left" in text
    assert re.search(r"loss +2\.0000 +█▅▁", text)
    assert re.search(r"1 +██·· +2\.00 +12\.50% +1\.250 +2", text)
    ended = [*records(3), {"kind": "eval", "step": 3, "loss": 1.5}, {"kind": "end", "step": 3, "seconds": 7.0}]
    assert "ended" in shown(live.view(ended, 10))
    assert "no step yet" in shown(live.view(records(0)))


def test_a_run_is_followed_to_its_end(run, tmp_path, monkeypatch):
    """Once for every change, and no longer than it goes on."""
    later = iter([records(2), records(2), [*records(2), {"kind": "end", "step": 2}]])

    def write(some):
        (tmp_path / FILE).write_text("".join(json.dumps(r) + "\n" for r in some))

    write(records(1))
    monkeypatch.setattr(time, "sleep", lambda _: write(next(later)))
    seen = [len(now) for now in live.follow(tmp_path)]
    assert seen[0] == 2
    assert seen[-1] == 4
    assert set(seen) == {2, 3, 4}
    assert "step 2, 0:00:04, ended" in call(f"--workdir={tmp_path}", "--live").err
    shutil.copy(run / "run" / "config.json", tmp_path)
    assert (
        f"step 2 of {i.open_run(run / 'run').exp.run.steps:,}, 0:00:04, ended"
        in call(f"--workdir={tmp_path}", "--live").err
    )
    page = (tmp_path / "live.html").read_text()
    assert 'content="5"' in page
    stands_alone(page)


def test_layers_have_the_numbers_of_the_model():
    model = build(
        {
            "model": {
                "D": 8,
                "N": 4,
                "attention": "MHA(2, 4)",
                "moe": {"E": 2, "router": "Switch()", "experts": "MLP(F=4)"},
            }
        }
    ).model
    assert layer_names(model) == ["layer 1", "layer 3"]


def test_each_stack_has_its_layers():
    """Encoder and decoder have their own layers, counted as knock-outs count them; a single stack has them all."""
    moe = {"E": 2, "router": "Switch()", "experts": "MLP(F=4)"}
    sizes = {"D": 8, "N": 4, "attention": "MHA(2, 4, position=NoPE())", "moe": moe}
    data = {"source": "ToyTranslation()", "objective": "Translation()"}
    two = build({"model": {"kind": "EncoderDecoder", **sizes}, "data": data}).model
    assert list(layers_of(two, "encoder")) == [0, 1]
    assert list(layers_of(two, "decoder")) == [2, 3]
    assert [p.stack.split("_")[0] for p in moe_paths(two)] == ["encoder"] * 2 + ["decoder"] * 2
    one = build({"model": sizes}).model
    assert list(layers_of(one, "decoder")) == [0, 1]
