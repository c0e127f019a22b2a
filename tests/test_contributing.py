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
def SigmoidTopK():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {"__name__": "example"}
    exec(block, names)
    return names["SigmoidTopK"]


def test_example_routes(SigmoidTopK):
    """Distinct experts, weights that sum to 1, padding nowhere and weightless."""
    gate_DE, x_GSD = jnp.array(normal(0, D, E)), jnp.array(normal(1, G, S, D))
    routing = SigmoidTopK(K=3)({"gate_DE": gate_DE}, x_GSD, jnp.array(MASK))
    expert, weight = np.asarray(routing.expert_GSK), np.asarray(routing.weight_GSK)
    assert expert.shape == weight.shape == (G, S, 3)
    assert all(len(set(ids)) == 3 for ids in expert[MASK])
    assert (expert[MASK] < E).all()
    assert (expert[~MASK] == E).all()
    assert not weight[~MASK].any()
    np.testing.assert_allclose(weight[MASK].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GSE.sum(-1), 1, rtol=1e-6)


def test_example_is_trained_in_a_layer(SigmoidTopK):
    """`MoE` accepts it, and the task loss alone moves all of its parameters."""
    layer = MoE(MoEConfig(E=E, router=SigmoidTopK(), experts=MLP(F=4), losses={}))
    x = jnp.array(normal(2, G, S, D))
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def task(params):
        y, _ = layer.apply(params, x, jnp.array(MASK))
        return (y**2).sum()

    grads = jax.jit(jax.grad(task))(params)["params"]
    assert (np.abs(grads["router_gate_DE"]) > 0).all()


def test_example_refuses_a_constant_weight(SigmoidTopK):
    """Law 3."""
    with pytest.raises(ValueError, match="constant weight 1"):
        SigmoidTopK(K=1)


def test_paths_exist():
    """Every path the page names is there, but the file that the example makes."""
    for path in set(re.findall(r"`((?:moe_jax|tests|configs|experiments)/[\w/.]*)`", TEXT)):
        assert (ROOT / path).exists() or path.endswith("sigmoid_top_k.py"), path
