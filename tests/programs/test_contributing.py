"""The examples of CONTRIBUTING.md are a router and an attention that work."""

import inspect
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import ATTENTION, Order
from moe_jax.experts import MLP
from moe_jax.moe import MoE, MoEConfig
from tests import cases_attention, oracle_attention
from tests.cases import normal
from tests.components import test_attention as contracts

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
G, S, D, E = 2, 8, 4, 6
MASK = np.arange(S)[None, :] < np.array([8, 5])[:, None]


def section(title: str, language: str) -> list[str]:
    """Blocks of code in this language under this title."""
    (text,) = re.findall(rf"\n## [^\n]*{title}\n(.*?)(?=\n## |\Z)", TEXT, re.DOTALL)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(code: str, **names) -> dict:
    names["__name__"] = "example"
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def MinP():
    (block,) = section("a new router", "python")
    return run(block)["MinP"]


def test_example_routes(MinP):
    """Distinct experts, as many as have enough of the best one's probability; padding nowhere and weightless."""
    gate_DE, x_GSD = jnp.array(normal(0, D, E)), jnp.array(normal(1, G, S, D))
    routing = MinP(K=3)({"gate_DE": gate_DE}, x_GSD, jnp.array(MASK))
    expert, weight, probs = map(np.asarray, (routing.expert_GSK, routing.weight_GSK, routing.probs_GSE))
    assert expert.shape == weight.shape == (G, S, 3)
    enough = np.sort(probs, axis=-1)[..., ::-1][..., :3] >= 0.2 * probs.max(-1, keepdims=True)
    assert 0 < (~enough[MASK]).sum() < enough[MASK].size
    np.testing.assert_array_equal(expert[MASK] < E, enough[MASK])
    assert all(len(set(ids[ids < E])) == (ids < E).sum() for ids in expert[MASK])
    assert (expert[~MASK] == E).all()
    np.testing.assert_array_equal(weight > 0, expert < E)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)


def test_example_is_trained_in_a_layer(MinP):
    """`MoE` accepts it, and the task loss alone moves all of its parameters."""
    layer = MoE(MoEConfig(E=E, router=MinP(), experts=MLP(F=4), losses=()))
    x = jnp.array(normal(2, G, S, D))
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def task(params):
        y, _ = layer.apply(params, x, jnp.array(MASK))
        return (y**2).sum()

    grads = jax.jit(jax.grad(task))(params)["params"]
    assert (np.abs(grads["router_gate_DE"]) > 0).all()


def test_example_refuses_what_is_no_fraction(MinP):
    with pytest.raises(ValueError, match="must lie in"):
        MinP(p=0.0)


# ---------------------------------------------------------------- the attention

TESTS = {name: f for name, f in vars(contracts).items() if name.startswith("test_")}
CONTRACTS = {name: f for name, f in TESTS.items() if "part" in inspect.signature(f).parameters}
VALUES = {"mesh": contracts.MESHES, "order": tuple(Order)}


def added(diff: str) -> str:
    """The lines that a diff adds."""
    return "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))


@pytest.fixture(scope="module")
def fading():
    """The case that the page adds, its oracle known."""
    (block,), (_, case, formula) = section("a new attention", "python"), section("a new attention", "diff")
    names = run(block)
    patch = pytest.MonkeyPatch()
    patch.setitem(oracle_attention.ATTEND, "Fading", run(added(formula), **vars(oracle_attention))["fading"])
    yield run(f"case = ({added(case)})", Fading=names["Fading"], H=cases_attention.H)["case"][0]
    patch.undo()


@pytest.mark.parametrize("contract", CONTRACTS)
def test_attention_keeps_every_contract(contract, fading, monkeypatch):
    """All tests that registered attentions inherit."""
    wanted = inspect.signature(CONTRACTS[contract]).parameters
    axes = {name: values for name, values in VALUES.items() if name in wanted}
    assert set(wanted) <= {"part", "monkeypatch", *axes}
    for chosen in itertools.product(*axes.values()):
        given = {"part": fading, "monkeypatch": monkeypatch, **dict(zip(axes, chosen, strict=True))}
        CONTRACTS[contract](**{name: given[name] for name in wanted})


def test_attention_is_registered_as_the_page_says():
    """The line that it replaces is there."""
    registration = section("a new attention", "diff")[0]
    (old,) = (line[1:] for line in registration.splitlines() if line.startswith("-"))
    assert old in (ROOT / "moe_jax/attention/__init__.py").read_text().splitlines()
    names = {kind.__name__: kind for kind in ATTENTION}
    assert run(added(registration).splitlines()[-1], **names, Fading=0)["ATTENTION"] == (*ATTENTION, 0)


def test_paths_exist():
    """Every path the page names is there, but the files that the examples make."""
    for path in set(re.findall(r"`((?:moe_jax|tests|configs|experiments)/[\w/.]*)`", TEXT)):
        assert (ROOT / path).exists() or path.endswith(("min_p.py", "fading.py")), path
