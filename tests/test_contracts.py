"""What every registered router, expert, dispatcher and loss must satisfy, on every case of cases.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax.dispatch
import moe_jax.experts
import moe_jax.losses
import moe_jax.routers
from moe_jax.core.groups import Dense, Padded, Ragged
from moe_jax.core.routing import Stats
from moe_jax.core.shard import Shard
from moe_jax.dispatch import Einsum
from moe_jax.moe import LOSS
from tests import cases, oracle
from tests.cases import close, normal

G, S, D, E = 4, 8, 4, 8
MASK = np.arange(S)[None, :] < np.array([8, 5, 0, 7])[:, None]
GATE, X, TARGET = normal(1, D, E), normal(0, G, S, D), normal(2, G, S, D)
FIRST = {
    "up_EDF": (E, D, 5),
    "gate_EDF": (E, D, 5),
    "down_EFD": (E, 5, D),
    "up_EF": (E, 5),
    "down_ED": (E, D),
}


def weights(expert):
    return {n: 0.5 * normal(i, *FIRST[n]) for i, n in enumerate(expert.params)}


@pytest.mark.parametrize(
    ("registered", "tried", "in_layers"),
    [
        (moe_jax.routers.ROUTERS, cases.ROUTERS, "router"),
        (moe_jax.experts.EXPERTS, cases.EXPERTS, "experts"),
        (moe_jax.dispatch.DISPATCHERS, cases.DISPATCHERS, "dispatch"),
    ],
    ids=["routers", "experts", "dispatchers"],
)
def test_every_component_has_a_case(registered, tried, in_layers):
    """Nothing is registered that is not tested, alone and as part of a layer under the laws."""
    assert set(registered) == {type(c) for c in tried}, "add a line to tests/cases.py"
    assert set(registered) == {type(getattr(cfg, in_layers)) for cfg in cases.LAYERS.values()}
    assert len(set(tried)) == len(tried), "components hash by their fields"


def test_every_loss_has_a_case():
    """Every registered loss is in cases, and in a layer's configuration under the laws."""
    assert set(moe_jax.losses.LOSSES) == set(cases.LOSSES) == set(LOSS.values())
    assert {name for cfg in cases.LAYERS.values() for name, _ in cfg.losses} == set(LOSS)


@functools.cache
def routed(router):
    """Without keys, with keys, on bfloat16 inputs, on those in float32; a task loss's gradient."""
    kind = cases.EXPERTS[0]

    def everything(params, x, keys):
        route = lambda x, keys=None: router(params, x, jnp.array(MASK), keys)  # noqa: E731
        half = x.astype(jnp.bfloat16)
        return route(x), route(x, keys), route(half), route(half.astype(jnp.float32))

    def task(params, x):
        y, _ = Einsum(None)(x, router(params, x, jnp.array(MASK)), kind, jax.tree.map(jnp.array, weights(kind)))
        return ((y - TARGET) ** 2).sum()

    keys = jax.random.split(jax.random.key(0), G)
    f = jax.jit(lambda p, x, k: (everything(p, x, k), jax.grad(task)(p, x)))
    params = {n: {"gate_DE": GATE}[n] for n in router.params}
    return jax.tree.map(np.asarray, f.lower(params, X, keys).compile()(params, X, keys))


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_routings_are_valid(router):
    """Ids in range and distinct, weights positive, at most 1 in sum; padding nowhere, weightless (law 7)."""
    for routing in routed(router)[0]:
        expert, weight = routing.expert_GSK, routing.weight_GSK
        assert expert.shape == weight.shape == (G, S, router.K)
        assert expert.dtype == np.int32
        assert weight.dtype == routing.logits_GSE.dtype == routing.probs_GSE.dtype == np.float32
        assert ((expert >= 0) & (expert <= E)).all()
        used = np.sort(expert, axis=-1)
        assert ((np.diff(used, axis=-1) > 0) | (used[..., 1:] == E)).all()
        assert ((weight > 0) == (expert < E)).all()
        assert (weight.sum(-1) <= 1 + 1e-6).all()
        assert (expert[~MASK] == E).all()
        assert (expert[MASK][:, 0] < E).all()
        np.testing.assert_array_equal(routing.mask_GS, MASK)
        np.testing.assert_allclose(routing.probs_GSE.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_router_equals_oracle(router):
    """Without keys a router is its paper's formula."""
    routing = routed(router)[0][0]
    true = oracle.route(router, GATE.astype(np.float64), X.astype(np.float64), MASK)
    np.testing.assert_array_equal(routing.expert_GSK, true.expert)
    close(routing.weight_GSK, true.weight)
    close(routing.logits_GSE, true.logits)
    close(routing.probs_GSE, true.probs)


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_router_uses_keys_if_it_says_so(router):
    """`random` says whether keys change anything."""
    still, noisy = routed(router)[0][:2]
    same = all(np.array_equal(a, b) for a, b in zip(still, noisy, strict=True))
    assert same != router.random


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_router_is_trained_by_the_task(router):
    """Law 3: the task loss alone moves every number of every router parameter."""
    for name, grad in routed(router)[1].items():
        assert (np.abs(grad) > 1e-6).all(), name


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_router_computes_in_float32(router):
    """On bfloat16 inputs a router decides bit for bit as on the same numbers in float32."""
    half, full = routed(router)[0][2:]
    for a, b in zip(half, full, strict=True):
        assert a.dtype == b.dtype != jnp.bfloat16
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("expert", cases.EXPERTS, ids=str)
def test_expert_is_the_same_in_every_layout(expert):
    """Rows of 4 experts, back to back, padded, or each alone: the oracle's values; equal gradients."""
    sizes, C, nobody = np.array([20, 0, 3, 17]), 20, 8
    x, g, all_params = normal(0, 40 + nobody, D), normal(1, 40, D), weights(expert)
    params = {n: w[:4] for n, w in all_params.items()}
    owner = np.repeat(np.arange(4), sizes)
    slot = np.concatenate([np.arange(n) for n in sizes])

    def ragged(params, x):
        return expert(params, x, Ragged(jnp.array(sizes)))[:40]

    def padded(params, x):
        return expert(params, jnp.zeros((4, C, D)).at[owner, slot].set(x[:40]), Padded())[owner, slot]

    def dense(params, x):
        each = [expert({n: w[e] for n, w in params.items()}, x[:40][owner == e], Dense()) for e in range(4)]
        return jnp.concatenate(each)

    def both(f, params, x, g):
        y, pull = jax.vjp(f, params, x)
        return y, pull(g)

    every = jax.jit(lambda *a: [both(f, *a) for f in (ragged, padded, dense)])
    one, two, three = every.lower(params, x, g).compile()(params, x, g)
    double = [{n: w[e].astype(np.float64) for n, w in params.items()} for e in range(4)]
    close(
        one[0],
        np.stack([oracle.expert(expert, double[e], row) for e, row in zip(owner, x[:40], strict=True)]),
    )
    close(one, three)
    close(two, three)
    assert not np.asarray(one[1][0]["up_EDF"])[1].any()  # nobody visits expert 1
    assert not np.asarray(one[1][1])[40:].any()


@functools.cache
def dispatched(dispatch):
    """Output, kept choices and all gradients of a dispatcher, for any routing of two choices."""
    kind = cases.EXPERTS[1]

    def f(x, weight, params, routing):
        y, kept = dispatch(x, routing._replace(weight_GSK=weight), kind, params, Shard())
        return ((y - TARGET) ** 2).sum(), (y, kept)

    step = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    args = lambda r: (X, r.weight_GSK, weights(kind), r)  # noqa: E731
    program = step.lower(*args(two_choices(cases.ROUTERS[0]))).compile()
    return functools.cache(lambda router: program(*args(two_choices(router))))


def two_choices(router):
    """What a router decided with keys, if it names one expert only with a second choice that is not taken."""
    routing = routed(router)[0][1]
    pad = ((0, 0), (0, 0), (0, 2 - router.K))
    return routing._replace(
        expert_GSK=np.pad(routing.expert_GSK, pad, constant_values=E),
        weight_GSK=np.pad(routing.weight_GSK, pad),
    )


@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
@pytest.mark.parametrize("dispatch", cases.DISPATCHERS, ids=str)
def test_dispatcher_is_the_definition(dispatch, router):
    """Law 2: values, dropped choices and gradients of every dispatcher are Einsum's and the oracle's."""
    kind, routing = cases.EXPERTS[1], two_choices(router)
    (_, (y, kept)), grads = dispatched(dispatch)(router)
    choice = oracle.Choice(None, routing.expert_GSK, routing.weight_GSK, routing.logits_GSE, routing.probs_GSE)
    taken = oracle.kept(dispatch, choice)
    double = {n: w.astype(np.float64) for n, w in weights(kind).items()}
    close(y, oracle.combine(kind, double, X.astype(np.float64), choice, taken))
    np.testing.assert_array_equal(kept, taken)

    definition = Einsum(dispatch.capacity_factor, getattr(dispatch, "priority", "token-major"))
    (_, (y_einsum, kept_einsum)), grads_einsum = dispatched(definition)(router)
    close((y, *grads), (y_einsum, *grads_einsum))
    np.testing.assert_array_equal(kept, kept_einsum)


def test_something_is_dropped():
    """Law 2 is tried where a limit bites: each limited dispatcher drops something of some router."""
    for dispatch in cases.DISPATCHERS:
        named = [(two_choices(router).expert_GSK < E).sum() for router in cases.ROUTERS]
        kept = [dispatched(dispatch)(router)[0][1][1].sum() for router in cases.ROUTERS]
        assert (sum(named) > sum(kept)) == (dispatch.capacity_factor is not None)


@pytest.mark.parametrize("loss", cases.LOSSES, ids=lambda f: f.__name__)
def test_loss_is_a_function_of_global_sums(loss):
    """A loss sees sums only: it equals the oracle's, and twice the same batch gives the same loss."""
    logits = normal(3, 1, 12, E).astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-logits, axis=-1)[..., :2]
    s = oracle.count(oracle.Choice(None, ids, ids, logits, probs), np.ones((1, 12), bool), ids < E)
    stats = Stats(**{n: jnp.asarray(v, jnp.float32) for n, v in s.items()})
    np.testing.assert_allclose(loss(stats), oracle.describe(s)[loss.__name__], rtol=1e-5)
    np.testing.assert_allclose(loss(jax.tree.map(lambda a: 2 * a, stats)), loss(stats), rtol=1e-6)
    stacked = loss(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), stats))
    assert stacked.shape == (2,)
    assert np.isfinite(loss(jax.tree.map(jnp.zeros_like, stats)))
