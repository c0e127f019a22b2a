"""Why a token goes where it goes: parts that add up to its logits, its margin, its neighbours."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import MLP, Hash, LMConfig, MoEConfig, Scatter, Temperature, TopK
from moe_jax.attention import MHA
from moe_jax.data import Batch
from moe_jax.inspect.explain import explain, margin_of, principal
from moe_jax.inspect.look import trace_layers
from moe_jax.models.pattern import layer_params
from tests.cases import normal

V, D, E, B, L = 17, 6, 5, 2, 9
MODEL = LMConfig(
    V=V,
    D=D,
    N=2,
    attention=MHA(1, 4),
    moe_layers="all",
    remat="none",
    moe=MoEConfig(
        E=E, router=TopK(K=2), experts=MLP(F=4), dispatch=Scatter(None), gating=(Temperature(2.0, 2.0, 1, "linear"),)
    ),
)
ROW = np.random.default_rng(0).integers(1, V, (B, L + 1)).astype(np.int32)
ONES = np.ones((B, L), np.int32)
BATCH = Batch(ROW[:, :-1], ROW[:, 1:], ONES, np.arange(L, dtype=np.int32) * ONES, ONES > 0, np.zeros(B, np.int32))
STATE = {"step_": np.full(2, 3, np.int32)}


@pytest.fixture(scope="module")
def model():
    params = jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), BATCH))
    params = jax.tree.map(lambda a: a + 0.2 * normal(1, *a.shape), params)
    return params, trace_layers(MODEL, params, [BATCH], STATE)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("row", [0, 11])
def test_parts_add_up(model, layer, row):
    """Features, and principal directions with the mean and the rest, to the gate's logit; twice the router's here."""
    params, seen = model
    found = explain(MODEL, params, seen, row, layer, directions=3)
    gate_DE = params["stack_0"]["moe_0"]["router_gate_DE"][layer]
    x_D = seen.input_NTD[layer, row]
    for d, e in np.ndindex(D, E):
        assert found.part_DE[d, e] == pytest.approx(float(x_D[d]) * float(gate_DE[d, e]), rel=1e-6)
    np.testing.assert_allclose(found.part_DE.sum(0), found.gate_E, rtol=1e-12)
    np.testing.assert_allclose(found.gate_E / 2, seen.logits_NTE[layer, row], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.logits_E, seen.logits_NTE[layer, row])
    np.testing.assert_allclose(found.mean_E + found.along_PE.sum(0) + found.rest_E, found.gate_E, atol=1e-12)
    whole = explain(MODEL, params, seen, row, layer, directions=D)
    np.testing.assert_allclose(whole.rest_E, 0, atol=1e-10)
    assert np.abs(found.rest_E).max() > 1e-3
    part = found.features(2, n=D)
    assert [d for d, _ in part] == sorted(range(D), key=lambda d: -abs(found.part_DE[d, 2]))
    assert sum(p for _, p in part) == pytest.approx(found.gate_E[2])


def test_the_margin_is_to_the_best_expert_not_chosen(model):
    """The chosen, their weights, and by how much the first of the others has missed it."""
    params, seen = model
    for row in range(len(seen.token_T)):
        found = explain(MODEL, params, seen, row, 1)
        order = sorted(range(E), key=lambda e: -found.logits_E[e])
        assert list(found.chosen) == order[:2]
        assert found.runner_up == order[2]
        assert found.margin == pytest.approx(found.logits_E[order[1]] - found.logits_E[order[2]])
        assert found.margin > 0
        share = np.exp(found.logits_E[order[:2]])
        np.testing.assert_allclose(found.weights, share / share.sum(), rtol=1e-5)


def test_margins_at_the_ends():
    logits_E = np.array([0.0, 3.0, 1.0])
    assert margin_of(logits_E, [1]) == (2.0, 2)
    assert margin_of(logits_E, [2]) == (-2.0, 1)  # a bias has decided
    assert margin_of(logits_E, [0, 1, 2]) == (np.inf, -1)
    assert margin_of(logits_E, []) == (-np.inf, 1)


def test_neighbours_are_nearest_by_cosine(model):
    """By cosine, against loops; a token's double is next to it."""
    params, seen = model
    x_TD = seen.input_NTD.copy()
    x_TD[:, 7] = 2 * x_TD[:, 3]
    seen = seen._replace(input_NTD=x_TD)
    found = explain(MODEL, params, seen, 3, 0, neighbours=4)
    cosine = {}
    for t in range(len(seen.token_T)):
        a, b = x_TD[0, 3].astype(float), x_TD[0, t].astype(float)
        cosine[t] = a @ b / np.sqrt((a @ a) * (b @ b))
    expected = sorted((t for t in cosine if t != 3), key=lambda t: -cosine[t])[:4]
    assert found.near[0].row == 7
    assert sorted(n.row for n in found.near) == sorted(expected)
    for n in found.near:
        assert n.cosine == pytest.approx(cosine[n.row])
        assert n.token == seen.token_T[n.row]
        assert n.experts == tuple(seen.expert_NTK[0, n.row])


def test_principal_directions():
    """A planted direction is found, the others are orthogonal to it, and they explain the variance in order."""
    rng = np.random.default_rng(1)
    u = rng.normal(size=D)
    u /= np.linalg.norm(u)
    x_TD = 5 + rng.normal(size=(200, 1)) * 4 * u + 0.3 * rng.normal(size=(200, D))
    mean_D, along_PD = principal(x_TD, 3)
    np.testing.assert_allclose(mean_D, x_TD.mean(0))
    assert abs(along_PD[0] @ u) > 0.99
    np.testing.assert_allclose(along_PD @ along_PD.T, np.eye(3), atol=1e-12)
    variances = np.linalg.eigvalsh(np.cov(x_TD.T))[::-1][:3]
    np.testing.assert_allclose(((x_TD - mean_D) @ along_PD.T).var(0, ddof=1), variances)


def test_what_cannot_be_explained(model):
    params, seen = model
    hashed = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, router=Hash(K=2)))
    for call, words in (
        (lambda: explain(MODEL, params, seen, 18, 0), "no token in row 18; 18 were seen"),
        (lambda: explain(MODEL, params, seen, 0, 2), "no MoE layer 2; the model has 2"),
        (lambda: explain(hashed, params, seen, 0, 0), "no linear gate"),
        (lambda: layer_params(MODEL, params, 5), "no MoE layer 5"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
