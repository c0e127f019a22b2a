"""The example of CONTRIBUTING.md is a router that works."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import MLP
from moe_jax.moe import MoE, MoEConfig
from tests.cases import normal

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
G, S, D, E = 2, 8, 4, 6
MASK = np.arange(S)[None, :] < np.array([8, 5])[:, None]


@pytest.fixture(scope="module")
def MinP():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {"__name__": "example"}
    exec(block, names)
    return names["MinP"]


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


def test_paths_exist():
    """Every path the page names is there, but the file that the example makes."""
    for path in set(re.findall(r"`((?:moe_jax|tests|configs|experiments)/[\w/.]*)`", TEXT)):
        assert (ROOT / path).exists() or path.endswith("min_p.py"), path
