"""Pages say what was run and what came of it, in words that the records prove, and are legible on a phone."""

import dataclasses
import html
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments import train as program
from moe_jax import LMConfig, MoEConfig
from moe_jax.attention import MHA
from moe_jax.audit.experiment import Finding
from moe_jax.audit.page import findings_page
from moe_jax.audit.placement import placement
from moe_jax.audit.routing import Verdict
from moe_jax.config import DataConfig, Experiment, RunConfig
from moe_jax.core.routing import token_choice
from moe_jax.core.stats import Stats, describe, stats
from moe_jax.costs.headline import headline
from moe_jax.dispatch import Scatter
from moe_jax.evaluate import drop_rate, per_layer
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance
from moe_jax.models.encoder_decoder import concat_stacks
from moe_jax.models.transformer import count_agreement
from moe_jax.moe import Aux
from moe_jax.plan.page import found_page, plan_page
from moe_jax.plan.plan import Site, plan
from moe_jax.plan.search import Found, option, variant
from moe_jax.plan.sections import SearchTable
from moe_jax.plan.topology import topology
from moe_jax.reporting.formulas import METRICS
from moe_jax.reporting.metrics import Logger
from moe_jax.reporting.report import write_report
from moe_jax.reporting.verdict import run_verdict
from moe_jax.routers import TopK
from moe_jax.step import Metrics
from moe_jax.train import Tally, TrainingDiverged
from tests.pages import Page, legible, stands_alone

ROOT = Path(__file__).parents[2]
V5E = topology("v5e:2x4")
EXP = Experiment(
    LMConfig(
        V=259,
        D=32,
        N=2,
        attention=MHA(4, 8),
        ffn=GLU(F=64),
        moe=MoEConfig(E=8, router=TopK(K=2), experts=MLP(F=64), dispatch=Scatter(1.25)),
        remat="none",
    ),
    DataConfig(L=64, B=64),
    run=RunConfig(steps=40),
    mesh=(("data", 2), ("expert", 4)),
)


def train(step: int, drops: float = 0.0, **other) -> dict:
    moe = {
        "layer": [1, 3],
        "load": [[0.25] * 4, [0.7, 0.3, 0.0, 0.0]],
        "drop_rate": [drops, drops],
        "load_max_over_mean": [1.0, 2.8 + step / 1000],
        "dead_experts": [0, 2],
        "agreement": [None, 0.5 + step / 1000],
        "active_experts": [1.0, 2.0],
    }
    record = {"kind": "train", "step": step, "seconds": step / 10, "loss": 5 - step / 100, "skipped": 0}
    return record | {"tokens_per_second": 1000.0, "drop_rate": drops, "moe": moe} | other


def held_out(step: int, loss: float | None, **other) -> dict:
    return {"kind": "eval", "step": step, "seconds": step / 10, "loss": loss} | other


START = {"kind": "start", "step": 0, "seconds": 0.0, "data": "abc"}
END = {"kind": "end", "step": 40, "seconds": 4.0}
FINISHED = [START, train(20), held_out(20, 3.0), train(40), held_out(40, 2.5), END]


def report(folder: Path, records: list[dict], others: dict[str, list[dict]] | None = None, **given) -> Page:
    """The page of these records."""
    for name, its in {"run": records, **(others or {})}.items():
        with Logger(folder / name, 40, quiet=True) as log:
            for record in its:
                log.write(record)
    path = write_report(folder / "run", "config", [folder / name for name in others or ()], **given)
    return stands_alone(path.read_text())


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (FINISHED, "Finished after 40 steps. Held-out loss 2.5000 nats per token at step 40."),
        (FINISHED[:-1], "Unfinished: the last record is of step 40 of 40."),
        (FINISHED[:3], "Unfinished: the last record is of step 20 of 40. Held-out loss 3.0000"),
        ([*FINISHED[:3], {**END, "step": 31, "diverged": True}], "Diverged at step 31 of 40"),
        ([START, train(20), END], "Never evaluated."),
        ([START, train(40), held_out(40, None), END], "The held-out loss at step 40 is not finite."),
        ([*FINISHED, held_out(60, 2.75)], "2.7500 nats per token at step 60 (the lowest was 2.5000 at step 40)"),
        (FINISHED, "No assignment dropped; the busiest expert has 2.84 times the mean load of its layer"),
        (FINISHED, "2 of 8 experts are dead. No step skipped."),
        ([train(10, 0.4), train(40, 0.2)], "25.00% of the assignments in training were dropped, 20.00% at the end"),
        ([train(20), train(40, skipped=3)], "3 of 40 steps skipped."),
        (
            [train(n, tokens_per_second=100.0 if n < 3 else 1000.0) for n in range(1, 10)],  # the first compiles
            "1 of 8 log intervals below half the median speed.",
        ),
        ([START], ""),
    ],
)
def test_the_verdict_is_that_of_the_records(records, words):
    said = " ".join(run_verdict({"run": records}, 40))
    assert words in said if words else said == ""


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([START, held_out(40, 2.75)], "0.2500 better than other (2.7500)"),
        ([START, held_out(30, 2.25)], "0.2500 worse than other (2.2500 at its step 30)"),
        ([START, held_out(40, 2.50001)], "equal to other in four decimals"),
        ([{**START, "data": "def"}, held_out(40, 1.0)], "other has other data, so that losses are not compared"),
        ([START, train(40)], "other has no held-out loss"),
    ],
)
def test_a_comparison_says_better_or_worse_and_by_how_much(other, words):
    said = " ".join(run_verdict({"run": FINISHED, "other": other}))
    assert f"at step 40: {words}. Each is one run" in said


# ---------------------------------------------------------------- the page of a run


def test_the_page_begins_with_the_question_and_the_facts(tmp_path):
    start = {**START, "question": "Does it work?", "command": "python -m experiments.train --config=a.py"}
    page = report(tmp_path, [start, *FINISHED[1:]], about=headline(EXP), steps=40)
    assert page.titles[0] == "Does it work?"
    for words in (
        "model LM: 2 layers, D=32, MHA(H=4, A=8), GLU(F=64); 1 MoE layer of 8 experts MLP(F=64), TopK(",
        "data Corpus(), Bytes(), NextToken(); 64 sequences of 64 tokens a step; fingerprint abc",
        "mesh data=2 x expert=4",
        "command python -m experiments.train --config=a.py",
        "Finished after 40 steps.",
    ):
        assert words in page.said, words
    total, active = re.search(r"parameters ([\d,]+) in all, ([\d,]+) active", page.said).groups()
    params = jax.eval_shape(EXP.model.init, jax.random.key(0), EXP.data.shapes(1))
    assert int(total.replace(",", "")) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert int(total.replace(",", "")) - int(active.replace(",", "")) == 6 * 2 * 32 * 64  # experts not taken


def test_what_is_constant_is_a_sentence_and_what_is_not_measured_nothing(tmp_path):
    """No figure of NaN, of one value or of nothing; of layers, those that were measured."""
    page = report(tmp_path, [*FINISHED[:-1], {**END, "energy": {}}])
    assert "Drop rate: 0 in all 40 steps (dropped assignments / assignments)." in page.said
    assert "Dead experts: 0, 2 in the layers in all 40 steps" in page.said
    assert "Active experts: 1, 2 in the layers in all 40 steps" in page.said
    assert "Drop rate" not in page.titles
    assert "Agreement" in page.titles
    figure = page.text.split("Agreement<span>")[1].split("</figure>")[0]
    assert METRICS["agreement"].formula in html.unescape(figure)
    assert ">layer 3<" in figure
    assert ">layer 1<" not in figure  # there is none before it
    assert "Router entropy" not in page.said
    changing = report(tmp_path / "b", [train(20, 0.1), train(40, 0.2)])
    assert "Drop rate" in changing.titles


def test_a_run_without_finite_losses_has_no_figure_of_them(tmp_path):
    page = report(tmp_path, [train(20, loss=math.nan), train(40, loss=math.nan)])
    assert "Loss" not in page.titles
    assert "Training loss: not finite in all 40 steps" in page.said
    once = report(tmp_path / "once", [train(20), train(40, loss=math.nan)])
    assert "Training loss: 4.8 wherever it is finite" in once.said
    nan = {"layer": [1], "load": [[math.nan] * 2], "drop_rate": [math.nan]}
    assert "Drop rate" not in report(tmp_path / "b", [train(20, moe=nan), train(40, moe=nan)]).said


def test_the_docs_have_the_formulas_of_the_pages():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "routing.md").read_text(), re.MULTILINE)
    table = {name: formula for name, formula in rows if name in METRICS}
    assert table == {name: metric.formula for name, metric in METRICS.items()}


def test_compared_runs_of_one_folder_name_are_all_there(tmp_path):
    """Each with its own column: runs/a/run and runs/b/run beside the run itself."""
    others = {f"{name}/run": [START, train(40), held_out(40, loss), END] for name, loss in (("a", 2.25), ("b", 2.75))}
    page = report(tmp_path, FINISHED, others)
    for name in (f"{tmp_path.name}/run", "a/run", "b/run"):
        assert name in page.said
    for loss in ("2.5000", "2.2500", "2.7500"):
        assert loss in page.said


# ---------------------------------------------------------------- what a log is told

LAYERS = ((2,), (2,), *[(2, 4)] * 5, (2,), (2,), (2,), (2,), (2, 1), (2, 1, 4), (2, 1))
STATS = Stats(*(np.ones(shape, np.float32) for shape in LAYERS))  # two layers of four experts, an assignment for each


def test_a_run_is_told_its_question_and_command(tmp_path, monkeypatch):
    config = tmp_path / "my config.py"
    config.write_text('"""Is it so?\n\nMore.\n"""\n')
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="experiments.train")))
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config}", "--config.seed=1"])
    cli.define_config()
    monkeypatch.setattr(cli.FLAGS["config"], "value", f"{config}:small")
    said = cli.told()
    assert said["question"] == "Is it so?"
    assert said["command"] == f"python -m experiments.train '--config={config}' --config.seed=1"
    config.write_text("x = 1")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    assert cli.told() == {}


def test_what_no_layer_has_measured_is_not_in_a_record():
    compared = STATS._replace(agreed=jnp.array([2.0]), compared=jnp.array([4.0]))
    measured = per_layer(Aux(jnp.zeros(2), compared).metrics)
    assert measured["agreement"] == [None, 0.5]
    never = per_layer(Aux(jnp.zeros(2), STATS).metrics)
    assert set(measured) - set(never) == {"agreement"}
    assert drop_rate(STATS) == 0.75
    assert math.isnan(drop_rate(STATS._replace(choices_E=jnp.zeros((2, 4)))))


def test_a_layer_alone_has_no_agreement():
    weight, probs = jnp.ones((1, 2, 1)), jnp.full((1, 2, 4), 0.25)
    routing = token_choice(jnp.zeros((1, 2, 1), jnp.int32), weight, jnp.log(probs), probs, jnp.ones((1, 2), bool))
    found = describe(stats(routing, jnp.ones((1, 2, 1), bool), 1))
    assert "agreement" not in found
    assert found["active_experts"] == 1


def test_the_first_layer_of_every_stack_has_no_agreement():
    """An encoder and a decoder of two MoE layers: a decoder's first layer is not compared."""
    stack = count_agreement(Aux(jnp.zeros(2), STATS, jnp.zeros((2, 1, 3, 1), jnp.int32)))
    metrics = concat_stacks(stack, stack).metrics
    alone = Aux(jnp.zeros(1), STATS, jnp.zeros((1, 1, 3, 1), jnp.int32))
    assert count_agreement(alone) is alone
    np.testing.assert_array_equal(metrics["agreement"], [0.75, 0.75])
    assert per_layer(metrics)["agreement"] == [None, 0.75, None, 0.75]


def test_without_auxiliary_losses_there_is_no_auxiliary_loss():
    for losses, recorded in (((), False), ((LoadBalance(0.01),), True)):
        moe = dataclasses.replace(EXP.model.moe, losses=losses)
        tally = Tally(dataclasses.replace(EXP, model=dataclasses.replace(EXP.model, moe=moe)), None, 0.0)
        tally.add(Metrics(*np.ones(5), skipped=0, skipped_in_a_row=0, others={}, stats=STATS))
        assert ("aux_loss" in tally.record(1)) == recorded


def test_a_run_that_diverges_has_a_report(tmp_path, monkeypatch):
    """The exit is that of a run that diverged; what is known until then is not lost."""

    def diverging(*_):
        yield from (START, train(10), {"kind": "end", "step": 13, "seconds": 1.0, "diverged": True})
        raise TrainingDiverged("3 steps in a row")

    monkeypatch.setattr(program, "train", diverging)
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        program.run(EXP, tmp_path / "run")
    assert "Diverged at step 13 of 40" in stands_alone((tmp_path / "run" / "report.html").read_text()).said


# ---------------------------------------------------------------- other pages


def test_a_search_marks_the_mesh_of_the_config_and_says_how_to_get_each():
    own = option(EXP, V5E)
    other = option(variant(EXP, mesh=(("data", 8),), exchange=EXP.exchange, zero1=True), V5E)
    site = Site.of(V5E.chip, price=2.0)
    for options, place in (([own, other], 0), ([other], 1)):
        search = SearchTable(Found(options, None, 2, 2, 0, {}), V5E, site, 1e6, own, {0: "1 GiB"})
        page = stands_alone(found_page(search))
        marked = [i - 1 for i, (kind, _) in enumerate(page.rows) if kind == "marked"]
        assert marked == [place]
        assert page.rows[place + 1][1][0] == "data=2 x expert=4 (config)"
        for (_, cells), shown in zip(page.rows[1:], search.shown, strict=True):
            assert cells[-1] == shown.flags
            assert "--config.mesh.data=" in cells[-1]
        first = options[0]
        hours = 1e6 / (64 * 64) * first.seconds / 3600 * 8
        assert f"price {hours:.3g} chip-hours, {2 * hours:.3g} at 2 a chip-hour" in page.said
        assert "model LM: 2 layers" in page.said
        assert "64 sequences of 64 tokens a step" in page.said
        assert f"days {hours / 8 / 24:.3g}, of the first option" in page.said


def test_a_search_without_the_mesh_of_the_config():
    nothing = SearchTable(Found([], None, 0, 0, 3, {}), V5E, Site.of(V5E.chip), None, None, {})
    assert "no mesh can be built" in stands_alone(found_page(nothing)).said
    found = Found([option(EXP, V5E)], None, 1, 1, 0, {})
    page = stands_alone(found_page(nothing._replace(found=found)))
    assert "mesh of the config does not fill this topology" in page.said
    assert "marked" not in [kind for kind, _ in page.rows]


def test_a_plan_is_legible():
    stands_alone(plan_page(plan(EXP, V5E, analytic=True)))


def test_an_audit_has_a_sentence_for_each_law():
    """Details are open where a law is broken, and only there."""
    found = [
        Finding("one model, every mesh", "data=8", True, Verdict(True, "outputs 1e-7")),
        Finding("one model, every mesh", "expert=8", True, Verdict(False, "NOT outputs")),
        Finding("routers are trainable", "training", True, Verdict(True, "gate_DE")),
        Finding("causal means causal", "training", False, Verdict(False, "later tokens")),
        Finding("batch-independent", "training", False, Verdict(True, "")),
    ]
    page = stands_alone(findings_page(EXP, ["model.D 64 -> 32"], found, [], placement(EXP)))
    opened = {title.partition(" (")[0].rstrip("."): shown for title, shown in page.details.items()}
    assert opened["1. One model, every mesh: BROKEN in 1 of 2 trials"] is True
    assert opened["3. Routers are trainable: holds"] is False
    assert opened["4. Causal means causal: does not hold, nor is it claimed, in 1 of 1 trials"] is False
    assert opened["Batch-independent: holds"] is False
    assert "9. Resume is exact: not tried here" in page.said
    assert "1 of 5 findings break a law that the config claims." in page.said
    assert sum(opened.values()) == 1


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "broken",
    [
        lambda t: t.replace("width=device-width", "width=1120"),
        lambda t: t.replace('<div class="table">', "<div>"),
        lambda t: t.replace("<table", '<table width="800"'),
        lambda t: t.replace("<svg", '<svg width="820pt"'),
        lambda t: t.replace("max-width: 1120px", "width: 1120px"),
        lambda t: t.replace("figure.wide { overflow-x: auto; }", ""),
    ],
)
def test_a_page_that_is_too_wide_is_found(broken, tmp_path):
    text = report(tmp_path, FINISHED).text
    assert broken(text) != text
    with pytest.raises(AssertionError):
        legible(Page(broken(text)))
