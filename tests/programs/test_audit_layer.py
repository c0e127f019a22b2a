"""Audits of layers whose laws are known, broken ones too; the documented table is the audit's."""

import dataclasses
import json
import pathlib
import re
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from experiments import laws
from moe_jax import audit
from moe_jax.audit.counts import compare_counts, routing_counts
from moe_jax.core.capacity import CAPACITY_CONVENTIONS, capacity
from moe_jax.core.routing import token_choice
from moe_jax.core.stats import stats
from moe_jax.dispatch import Einsum, Gather, Scatter, Sort
from moe_jax.experts import MLP
from moe_jax.gating import ExpertDropout, Temperature
from moe_jax.losses import load_balance
from moe_jax.moe import MoEConfig
from moe_jax.routers import (
    ROUTERS,
    BASELayer,
    ExpertChoice,
    NullExperts,
    Random,
    Sinkhorn,
    SoftMoE,
    Switch,
    Top2,
    TopK,
)
from tests import programs

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "routing.md"
LIMITED = Scatter(1.0)
SIZES = {"B": 2, "L": 16, "D": 8}


def layer(router: Any, dispatch: Any = LIMITED, **fields: Any) -> MoEConfig:
    return MoEConfig(**{"E": 8, "router": router, "experts": MLP(F=8), "dispatch": dispatch, **fields})


def judge(law: str, cfg: MoEConfig, training: bool = True) -> audit.Verdict:
    return getattr(audit, law)(cfg, training, **SIZES, trials=60)


def short(value: Any) -> str | None:
    """A layer's part of a test's name."""
    if isinstance(value, MoEConfig):
        return f"{type(value.router).__name__}-{value.dispatch}"
    return repr(value) if dataclasses.is_dataclass(value) else None


# ---- known cases


@pytest.mark.law(4)
@pytest.mark.parametrize(
    ("cfg", "training", "through"),
    [
        (layer(TopK()), True, None),
        (layer(TopK(), Scatter(1.0, "choice-major")), True, "(a drop in"),
        (layer(Switch(), Scatter(1.0, "choice-major")), True, None),
        (layer(Switch(), Scatter(1.0, "probability")), True, "(a drop in"),
        (layer(Top2(second="always"), Einsum(None, "choice-major")), False, None),
        (layer(TopK(), Sort()), True, None),
        (layer(ExpertChoice(), Gather()), True, "(who was chosen in"),
        (layer(SoftMoE(), Einsum(None)), True, "(who was chosen in"),
        (layer(BASELayer()), True, "(who was chosen in"),
        (layer(BASELayer(), Scatter(None)), False, None),
        (layer(Sinkhorn(), Scatter(None)), True, "(who was chosen in"),
        (layer(Sinkhorn(), Scatter(None)), False, None),
        (layer(Top2(), gating=(Temperature(2.0, 1.0, 9), ExpertDropout(0.3)), shared=MLP(F=4)), True, None),
    ],
    ids=short,
)
def test_the_audit_knows_which_layers_are_causal(cfg, training, through):
    """Law 4: the audit agrees with what is known, and says through what the future is seen."""
    verdict = judge("causal", cfg, training)
    assert verdict.holds == (through is None), verdict
    assert (through or "changed in 0 of 60 trials") in verdict.detail


def test_it_sees_what_can_be_seen():
    """The trials are hard enough: choice-major slots change over half of all prefixes, probability more."""

    def count(priority):
        return int(re.search(r"in (\d+) of 200", audit.causal(layer(TopK(), Einsum(1.0, priority)), False).detail)[1])

    assert 80 < count("choice-major") < count("probability") < 200
    assert count("token-major") == 0


@pytest.mark.parametrize(
    ("dispatch", "S", "holds"), [(Scatter(1.0), None, True), (Scatter(1.0), 32, False), (Sort(), 32, True)]
)
def test_batch_independent(dispatch, S, holds):
    """Sequences share slots where a group is several of them and there is a limit."""
    verdict = judge("batch_independent", layer(TopK(), dispatch, S=S))
    assert verdict.holds == holds
    assert ("(a drop in" in verdict.detail) != holds


@pytest.mark.law(3)
def test_the_audit_names_untrained_parameters():
    """Law 3: every parameter is named; what is declared untrained is not a violation."""
    assert audit.trainable(layer(TopK())) == (True, "all of gate_DE")
    assert audit.trainable(layer(SoftMoE(), Einsum(None))) == (True, "all of phi_DEC, scale_")
    assert audit.trainable(layer(NullExperts(normalize=True))) == (True, "not null_DM, as declared")
    assert audit.trainable(layer(Random())) == (True, "no parameters")


# ---- broken on purpose


@dataclasses.dataclass(frozen=True)
class Broken:
    """The best expert by a linear gate, with one mistake."""

    mistake: str
    K: ClassVar[int] = 1
    params: ClassVar = ("gate_DE", "spare_DE")
    random: ClassVar[bool] = True
    needs: ClassVar = ("token",)

    def __call__(self, params, x_GSD, mask_GS, ctx):
        gate_DE, seen = params["gate_DE"] + params["spare_DE"], x_GSD
        if self.mistake == "spare":
            gate_DE = params["gate_DE"]
        if self.mistake == "mean" or (self.mistake == "mean in training" and ctx.training):
            seen = x_GSD - x_GSD.mean(1, keepdims=True)
        logits_GSE = jnp.einsum("gsd,de->gse", seen, gate_DE)
        probs_GSE, best_GSK = jax.nn.softmax(logits_GSE), logits_GSE.argmax(-1)[..., None]
        weight_GSK = jnp.take_along_axis(probs_GSE, best_GSK, -1)
        if self.mistake == "renormalised":
            weight_GSK /= weight_GSK.sum(-1, keepdims=True)
        if self.mistake == "denominator":
            odds_GSE = jnp.exp(logits_GSE)
            total_GS1 = jax.lax.stop_gradient(odds_GSE.sum(-1, keepdims=True))
            weight_GSK = jnp.take_along_axis(odds_GSE, best_GSK, -1) / total_GS1
        if self.mistake == "next id":
            best_GSK = jnp.roll(ctx.token_GS, -1, axis=1)[..., None] % ctx.E
        if self.mistake == "length":
            weight_GSK = weight_GSK / mask_GS.sum(-1)[:, None, None]
        return token_choice(best_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An expert whose rows see each other."""

    F: int = 8
    params: ClassVar = ("up_EDF", "down_EFD")

    def __call__(self, params, x, groups):
        h = groups.matmul(x, params["up_EDF"])
        return groups.matmul(h - h.mean(-2, keepdims=True), params["down_EFD"])


@pytest.mark.law(4)
@pytest.mark.parametrize(
    ("router", "experts", "training", "through"),
    [
        (Broken("none"), MLP(F=8), True, None),
        (Broken("mean"), MLP(F=8), False, "a weight in 60"),
        (Broken("mean in training"), MLP(F=8), True, "a weight in 60"),
        (Broken("mean in training"), MLP(F=8), False, None),
        (Broken("next id"), MLP(F=8), False, "(who was chosen in"),
        (Broken("length"), MLP(F=8), False, "in 15 of 60 trials (a weight in 15"),
        (Broken("none"), Mixing(), False, "(the output in"),
    ],
    ids=short,
)
def test_leaks_are_caught(router, experts, training, through):
    """Law 4: through tokens, ids or length, in one mode alone, or in the experts."""
    verdict = judge("causal", layer(router, experts=experts), training)
    assert verdict.holds == (through is None), verdict
    assert (through or "in 0 of 60") in verdict.detail


@pytest.mark.law(3)
@pytest.mark.parametrize(
    ("mistake", "verdict"),
    [
        ("none", (True, "all of gate_DE, spare_DE")),
        ("spare", (False, "not spare_DE")),
        ("renormalised", (False, "not gate_DE, spare_DE")),
    ],
)
def test_what_does_not_train_is_named(mistake, verdict):
    """Law 3: a parameter that is not used, and a weight that is constant."""
    assert audit.trainable(layer(Broken(mistake)), trials=4) == verdict


@pytest.mark.law(3)
def test_a_gradient_in_another_direction_is_found():
    """Law 3: a weight whose denominator has no gradient trains every parameter, but not along the loss's slope."""
    assert audit.trainable(layer(Broken("denominator")), trials=4).holds
    verdict = audit.gradients_are_slopes(layer(Broken("denominator")))
    assert not verdict.holds
    assert re.search(r"from finite differences in 1[0-6] of 16 trials, where 1e-02 is rounding", verdict.detail)
    assert audit.gradients_are_slopes(layer(Broken("none"))).holds
    assert audit.gradients_are_slopes(layer(Random())) == (True, "no parameters")


# ---- law 8


@pytest.mark.law(8)
@pytest.mark.parametrize(
    "cfg",
    [layer(TopK()), layer(NullExperts()), layer(ExpertChoice(), Gather()), layer(SoftMoE(), Einsum(None))],
    ids=short,
)
def test_choices_and_drops_are_counted(cfg):
    """Law 8: of null experts, of experts that choose and of soft slots too."""
    verdict = routing_counts(cfg, **SIZES)
    assert verdict.holds, verdict
    assert re.fullmatch(r"\d+ of \d+ choices dropped, all counted", verdict.detail)
    assert verdict.detail.startswith("0 ") == (cfg.dispatch.capacity_factor is None)


def after_drops(routing, kept, *rest):
    """Statistics that count choices after some were dropped."""
    left = routing._replace(expert_GSK=jnp.where(kept, routing.expert_GSK, routing.E))
    return stats(left, kept, *rest)._replace(tokens=stats(routing, kept, *rest).tokens)


@pytest.mark.law(8)
def test_counts_after_drops_are_named(monkeypatch):
    """Law 8: loss and drop rate of choices that were counted after drops."""
    monkeypatch.setattr("moe_jax.moe.stats", after_drops)
    verdict = routing_counts(layer(TopK()), **SIZES)
    assert not verdict.holds
    assert re.fullmatch(r"the statistics have \d+ choices_E, but the routing 48, by expert", verdict.detail)


@pytest.mark.law(8)
def test_a_loss_that_is_not_of_the_routing_is_named(monkeypatch):
    """Law 8: an auxiliary loss that a layer leaves out."""
    compare = compare_counts
    without = lambda cfg, stats, loss, found: compare(cfg, stats, 0.0, found)  # noqa: E731
    monkeypatch.setattr("moe_jax.audit.counts.compare_counts", without)
    verdict = routing_counts(layer(TopK()), **SIZES)
    assert not verdict.holds
    assert re.fullmatch(r"the auxiliary losses are 0.000000, but 0.0\d+ of the routing's choices", verdict.detail)


# ---- the page


def rows() -> list[list[str]]:
    text = PAGE.read_text().partition(laws.BEGIN)[2].partition(laws.END)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.strip().splitlines()]


def test_the_table_is_complete():
    """The table has a row for every registered router, and the columns that are made."""
    title, _, *body = rows()
    assert title == ["router", *(column.title for column in laws.COLUMNS)]
    assert [row[0] for row in body] == [f"`{name}`" for name in laws.ROUTERS]
    assert {name.partition("(")[0] for name in laws.ROUTERS} == {router.__name__ for router in ROUTERS}
    assert {len(row) for row in body} == {len(title)}


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("TopK(K=1, normalize=False)", "choice-major"),
        ("TopK(K=2, score='sparsemax')", "choice-major"),
        ("TopP(p=0.4, K=4)", "causal: token-major"),
        ("Hash(K=1)", "probability"),
        ("RoundRobin(K=2)", "choice-major"),
        ("Random(K=2)", "choice-major"),
        ("Sinkhorn(K=1)", "probability"),
        ("BASELayer()", "causal: token-major"),
        ("MixtureOfDepths()", "no limit"),
        ("ExpertChoice()", "S = 2L, no limit"),
    ],
)
def test_the_table_is_true(name, column):
    """A few of its cells, made again."""
    title, _, *body = rows()
    said = next(row for row in body if row[0] == f"`{name}`")[title.index(column)]
    assert laws.cell(name, next(c for c in laws.COLUMNS if c.title == column)) == said


def test_the_examples_run():
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, {})


def test_the_conventions_are_those_of_the_code():
    """Slots at S=512, E=64, K=2, factor 1.25, and the balanced values."""
    slots = dict(re.findall(r"\| `([\w-]+)` .* \| (\d+) \|\n", PAGE.read_text()))
    assert slots == {c: str(capacity(512, 2, 64, 1.25, c)) for c in CAPACITY_CONVENTIONS}
    said = re.findall(r"\| `(\w+)` \| (all|first) choices \| (\S+) \|", PAGE.read_text())
    code = load_balance.BALANCE_CONVENTIONS.items()
    assert said == [(name, "first" if c.first else "all", c.balanced) for name, c in code]


# ---- the program


call = partial(programs.call, laws)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out=nowhere.md"], "nowhere.md is not a file"),
        (["--out=CONTRIBUTING.md"], "no place for the table"),
        (["write"], "'write' is not a flag"),
    ],
)
def test_mistakes_are_one_line(argv, words):
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_the_table_is_written_between_its_marks(monkeypatch, tmp_path):
    """And nothing else of the page changes."""
    monkeypatch.setattr(laws, "ROUTERS", ("Hash(K=1)",))
    monkeypatch.setattr(laws, "COLUMNS", (laws.Column("trainable", "trainable", ("none",)),))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{laws.BEGIN} old {laws.END}\nafter\n")
    for _ in range(2):
        made = call(f"--out={page}", "--json=-")
        assert (made.code, json.loads(made.out)) == (0, [{"router": "`Hash(K=1)`", "trainable": "no parameters"}])
        assert page.read_text() == (
            f"before\n{laws.BEGIN}\n\n| router | trainable |\n| --- | --- |\n| `Hash(K=1)` | no parameters |\n\n"
            f"{laws.END}\nafter\n"
        )
