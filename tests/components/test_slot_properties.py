"""Properties of slots and capacity that hold for any routing. One shape: nothing compiles twice."""

import itertools
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_jax.core.capacity import PRIORITIES, capacity
from moe_jax.core.routing import TokenChoice, masks, position_in_expert
from moe_jax.dispatch.scatter import capacities
from tests import oracle

S, K, E = 6, 2, 3
C = 2
settings.register_profile("core", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("core")

# a token names two different experts, one and nobody, or nobody (padding)
token = st.sampled_from([(a, b) for a in range(E) for b in range(E + 1) if a != b] + [(E, E)])
tokens = st.lists(token, min_size=S, max_size=S)
first_weights = st.lists(st.sampled_from([0.5, 0.625, 0.75, 1.0]), min_size=S, max_size=S)


@partial(jax.jit, static_argnames="priority")
def slots(expert, first, priority):
    weight = jnp.stack([first, 1 - first], axis=-1)[None] * (expert < E)
    zeros = jnp.zeros((1, S, E))
    r = TokenChoice(expert, weight, zeros, zeros, expert[..., 0] < E)
    place = position_in_expert(r, priority)
    return weight, place, *masks(r, place, C)


def placed(chosen, first, priority):
    return map(np.asarray, slots(np.array([chosen], np.int32), np.array(first, np.float32), priority))


@pytest.mark.parametrize("priority", PRIORITIES)
@given(chosen=tokens, first=first_weights)
def test_slots_are_the_oracles_without_gaps(priority, chosen, first):
    """Slots are the oracle's; those of an expert are 0..n-1 without gaps or repeats; nowhere is past it."""
    weight, place, dispatch, combine = placed(chosen, first, priority)
    expert = np.array([chosen])
    np.testing.assert_array_equal(place, oracle.queue(expert, weight, E, priority))
    for e in range(E):
        assert sorted(place[expert == e]) == list(range((expert == e).sum()))
    assert (place[expert == E] == S * K).all()
    kept = (place < C) & (expert < E)
    assert dispatch.sum() == kept.sum()
    assert (dispatch.sum(axis=1) <= 1).all()  # a slot holds one token
    np.testing.assert_array_equal(dispatch.sum(axis=(2, 3)), kept.sum(-1))
    np.testing.assert_allclose(combine.sum(axis=(2, 3)), (weight * kept).sum(-1), atol=1e-6)


@pytest.mark.law(4)
@given(chosen=tokens, other=tokens, first=first_weights, cut=st.integers(0, S))
def test_token_major_is_prefix_stable(chosen, other, first, cut):
    """Law 4: what comes after a token never changes its slots."""
    _, before, *_ = placed(chosen, first, "token-major")
    _, after, *_ = placed(chosen[:cut] + other[cut:], first, "token-major")
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])


@given(
    st.permutations([(0, 1), (1, 2), (2, 0), (0, 1), (1, 2), (2, 0)]),
    first_weights,
    st.sampled_from(PRIORITIES),
)
def test_balanced_routing_drops_nothing(chosen, first, priority):
    """At factor 1 every expert has room for its fair share, in any order."""
    _, place, *_ = placed(chosen, first, priority)
    assert (place < capacity(S, K, E, 1.0)).all()


sizes = st.tuples(st.integers(1, 4096), st.integers(1, 8), st.integers(1, 512))
factors = st.integers(1, 400).map(lambda n: n / 100)  # what people write: two decimals


@given(sizes, factors, factors)
def test_capacity_is_exact_and_monotonic(size, factor, more):
    """Exact, at least one, at most S, and larger for a larger factor."""
    (tokens, k, experts), factor, more = size, *sorted((factor, more))
    assume(k <= experts)
    exact = Fraction(round(100 * factor), 100) * k * tokens / experts
    got = capacity(tokens, k, experts, factor)
    assert 1 <= got <= tokens
    assert got == tokens or got - 1 < exact <= got
    assert got <= capacity(tokens, k, experts, more)


@given(sizes)
def test_ladder_of_capacities(size):
    """Scatter's dropless rungs go up from the balanced number, at most doubling, to room for every token."""
    (tokens, k, experts) = size
    assume(k <= experts)
    ladder = capacities(tokens, k, experts)
    assert ladder[0] == capacity(tokens, k, experts, 1.0)
    assert ladder[-1] == tokens
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(ladder))
