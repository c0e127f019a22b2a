"""Capacity conventions: their formulas, and that the slots of a layer are as many."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.core.capacity import CAPACITY_CONVENTIONS, capacity
from moe_jax.dispatch import Einsum, Scatter
from moe_jax.experts import MLP
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import TopK
from tests import oracle_routing as oracle


@settings(max_examples=300, deadline=None)
@given(
    S=st.integers(1, 4096),
    K=st.integers(1, 8),
    E=st.integers(1, 512),
    percent=st.integers(1, 800),
    convention=st.sampled_from(list(CAPACITY_CONVENTIONS)),
)
def test_every_formula(S, K, E, percent, convention):
    """Any sizes and factors, exactly; at least one slot, never more than tokens."""
    C = capacity(S, K, E, percent / 100, convention)
    assert C == oracle.capacity(S, K, E, percent / 100, convention)
    assert 1 <= C <= S


@pytest.mark.parametrize(
    ("convention", "S", "K", "E", "factor", "C"),
    [
        ("exact", 512, 2, 64, 1.25, 20),  # as MaxText
        ("vmoe", 512, 2, 64, 1.25, 20),
        ("flaxformer", 512, 2, 64, 1.25, 10),
        ("switch", 512, 2, 64, 1.25, 10),
        ("gshard", 512, 2, 64, 1.25, 12),  # 10 up to a multiple of 4
        ("gshard", 512, 2, 64, 2.0, 16),  # 2 * S / E: GShard's own
        ("exact", 100, 1, 5, 1.15, 23),  # int(100 * 1.15 / 5) is 22
        ("switch", 100, 1, 5, 1.15, 23),
        ("switch", 10, 1, 3, 2.0, 6),  # 6.67 down
        ("flaxformer", 10, 1, 3, 2.0, 7),  # to the nearest,
        ("flaxformer", 9, 1, 2, 1.0, 4),  # 4.5 and
        ("flaxformer", 11, 1, 2, 1.0, 6),  # 5.5 to the even one
        ("vmoe", 10, 1, 3, 2.0, 8),  # 6.67 to 7 to 8
        ("switch", 64, 2, 64, 1.25, 4),  # at least 4,
        ("flaxformer", 64, 2, 64, 1.25, 4),
        ("flaxformer-large", 2048, 1, 2048, 1.0, 2),  # Switch-C
        ("exact", 64, 2, 64, 1.25, 3),  # or not
        ("switch", 3, 1, 3, 1.0, 3),  # an expert sees a token once
        ("gshard", 3, 1, 3, 1.0, 3),
    ],
)
def test_conventions_give_the_published_slots(convention, S, K, E, factor, C):
    """By hand and from the code bases: the same factor is 10 slots in one and 20 in another."""
    assert capacity(S, K, E, factor, convention) == C


def test_every_convention_has_its_oracle():
    """And the default is the exact one."""
    assert set(CAPACITY_CONVENTIONS) == {"exact", "switch", "flaxformer", "flaxformer-large", "gshard", "vmoe"}
    assert Einsum().convention == Scatter().convention == "exact"
    assert capacity(10, 1, 3, 2.0) == capacity(10, 1, 3, 2.0, "exact") == 7


@pytest.mark.parametrize("dispatch", [Einsum, Scatter])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"convention": "maxtext"}, "(convention='maxtext') is unknown; use one of exact, switch, flaxformer, "),
        ({"convention": "exact", "priority": "fifo"}, "(priority='fifo') is unknown; use one of token-major, choice-"),
        ({"capacity_factor": None, "convention": "Exact"}, "(convention='Exact') is unknown"),
    ],
)
def test_a_bad_convention_is_refused_in_one_sentence(dispatch, fields, message):
    """A mistake is one sentence that names the component, what was given and what there is."""
    with pytest.raises(ValueError, match=re.escape(dispatch.__name__ + message)) as error:
        dispatch(**fields)
    assert "\n" not in str(error.value)


def test_slots_of_a_layer():
    """All tokens choose experts 0 and 1, so that a group's first C have a place: C by convention, in any dispatcher.

    Equally, with weights of exactly 1/2 and tokens in eighths: sums are exact, in whatever order they are made.
    """
    B, L, D, E, factor = 2, 16, 3, 4, 1.65
    slots = {
        "exact": 14,
        "switch": 6,
        "flaxformer": 7,
        "flaxformer-large": 7,
        "gshard": 8,
        "vmoe": 16,
    }  # of factor * S / E = 6.6
    layers = {
        (convention, dispatch.__name__): MoE(
            MoEConfig(
                E=E,
                router=TopK(K=2),
                experts=MLP(F=2, activation="relu"),
                dispatch=dispatch(factor, "token-major", convention),
            )
        )
        for convention in CAPACITY_CONVENTIONS
        for dispatch in (Einsum, Scatter)
    }
    gate_DE = np.zeros((D, E), np.float32)
    gate_DE[:, :2] = 1
    params = {"router_gate_DE": gate_DE, "up_EDF": np.ones((E, D, 2)), "down_EFD": np.ones((E, 2, D))}
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32), params)
    x_BLD = np.random.default_rng(0).integers(4, 9, (B, L, D)).astype(np.float32) / 8
    results = jax.jit(lambda p, x: {c: layer.apply({"params": p}, x) for c, layer in layers.items()})(params, x_BLD)
    for (convention, dispatch), (y_BLD, aux) in results.items():
        C = slots[convention]
        np.testing.assert_array_equal((y_BLD != 0).all(-1), np.arange(L)[None] < np.full((B, 1), C), dispatch)
        np.testing.assert_allclose(aux.metrics["drop_rate"], 1 - C / L, atol=1e-6)
        np.testing.assert_array_equal(y_BLD, results[convention, "Einsum"][0])
