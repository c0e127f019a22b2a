"""Contracts of every registered router, expert, dispatcher and loss, on every case of cases.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import Einsum, Gather
from moe_jax.core.context import Context
from moe_jax.core.groups import Dense, Padded, Ragged
from moe_jax.core.routing import SlotChoice, TokenChoice
from moe_jax.core.shard import Shard
from moe_jax.core.stats import stats
from moe_jax.core.traits import traits
from tests import cases, oracle
from tests.cases import close, normal

G, S, D, E = 4, 8, 4, 8
MASK = np.arange(S)[None, :] < np.array([8, 5, 0, 7])[:, None]
X, TARGET = normal(0, G, S, D), normal(2, G, S, D)
RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 50, (G, S)), RNG.integers(0, 3, (G, S))
EVERY_ROUTER = [*cases.ROUTERS, *cases.SLOT_ROUTERS]
KEYS = jax.random.split(jax.random.key(0), G)
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
    ("registered", "tried", "of_layer"),
    [
        (moe_jax.routers.ROUTERS, (*cases.ROUTERS, *cases.SLOT_ROUTERS), lambda cfg: (cfg.router,)),
        (moe_jax.gating.GATING, cases.GATING, lambda cfg: cfg.gating),
        (moe_jax.experts.EXPERTS, cases.EXPERTS, lambda cfg: (cfg.experts,)),
        (moe_jax.dispatch.DISPATCHERS, (*cases.DISPATCHERS, Gather()), lambda cfg: (cfg.dispatch,)),
        (moe_jax.exchanges.EXCHANGES, cases.EXCHANGES, lambda cfg: (cfg.exchange,)),
        (moe_jax.losses.LOSSES, cases.LOSSES, lambda cfg: cfg.losses),
    ],
    ids=["routers", "gating", "experts", "dispatchers", "exchanges", "losses"],
)
def test_every_component_has_a_case(registered, tried, of_layer):
    """Nothing is registered that is not tested, alone and as part of a layer under the laws."""
    assert set(registered) == {type(c) for c in tried}, "add a line to tests/cases.py"
    assert set(registered) == {type(part) for cfg in cases.LAYERS.values() for part in of_layer(cfg)}
    assert len(set(tried)) == len(tried), "components hash by their fields"
    assert all(component.__name__ in moe_jax.__all__ for component in registered)


def parameters(router):
    """Random ones, by name."""
    E_ = 1 if isinstance(router, moe_jax.MixtureOfDepths) else E
    sizes = {**moe_jax.moe_config.sizes_of(router), "E": E_, "D": D}
    return {
        n: normal(i, *moe_jax.core.dims.shape_of(moe_jax.core.dims.dims_of(n), sizes))
        for i, n in enumerate(router.params)
    }


def context(router, keys=None) -> Context:
    """Context of a router's call, with a bias in its state that changes some choices."""
    E_ = 1 if isinstance(router, moe_jax.MixtureOfDepths) else E
    state = {n: jnp.array(0.1 * normal(9, E_)) for n in traits(router).state}
    return Context(E_, keys, None if keys is None else jax.random.key(1), state, *map(jnp.array, IDS))


@functools.cache
def routed(router):
    """Without keys, with keys, on bfloat16 inputs, on those in float32; a task loss's gradient; that replayed."""
    kind = cases.EXPERTS[0]

    def everything(params, x, keys):
        route = lambda x, keys=None: router(params, x, jnp.array(MASK), context(router, keys))  # noqa: E731
        half = x.astype(jnp.bfloat16)
        return route(x), route(x, keys), route(half), route(half.astype(jnp.float32))

    def task(params, x, keys):
        routing = router(params, x, jnp.array(MASK), context(router, keys))
        experts = {n: jnp.array(w)[: routing.E] for n, w in weights(kind).items()}
        y, _ = Einsum(None)(x, routing, kind, experts)
        return ((y - TARGET) ** 2).sum()

    f = jax.jit(lambda p, x, k: (everything(p, x, k), jax.grad(task)(p, x, k)))
    params = parameters(router)
    return jax.tree.map(np.asarray, f.lower(params, X, KEYS).compile()(params, X, KEYS))


@pytest.mark.law(7)
@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
def test_routings_are_valid(router):
    """Ids in range and distinct, weights positive, of a bounded sum; padding nowhere, weightless (law 7)."""
    for routing in routed(router)[0]:
        expert, weight = routing.expert_GSK, routing.weight_GSK
        assert expert.shape == weight.shape == (G, S, router.K)
        assert expert.dtype == np.int32
        assert weight.dtype == routing.logits_GSE.dtype == routing.probs_GSE.dtype == np.float32
        assert ((expert >= 0) & (expert <= E)).all()
        used = np.sort(expert, axis=-1)
        assert ((np.diff(used, axis=-1) > 0) | (used[..., 1:] == E)).all()
        assert traits(router).distinct or router.K == 1  # said, so that exchanges have no room for more
        assert ((weight > 0) == (expert < E)).all()
        most = router.K if traits(router).score == "sigmoid" and not router.normalize else 1
        assert (weight.sum(-1) <= most + 1e-6).all()
        assert (expert[~MASK] == E).all()
        if not traits(router).nulls:
            assert (expert[MASK][:, 0] < E).all()
            np.testing.assert_allclose(routing.probs_GSE.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(routing.mask_GS, MASK)


@pytest.mark.law(7)
@pytest.mark.parametrize("router", cases.SLOT_ROUTERS, ids=str)
def test_slots_are_valid(router):
    """A slot takes a real token once per expert or nobody, without weight; padding is in none (law 7)."""
    for routing in routed(router)[0]:
        np.testing.assert_array_equal(routing.mask_GS, MASK)
        assert routing.logits_GSE.dtype == routing.probs_GSE.dtype == np.float32
        if isinstance(routing, SlotChoice):
            token = np.sort(routing.token_GEC, axis=-1)
            assert ((np.diff(token, axis=-1) > 0) | (token[..., 1:] == S)).all()
            assert MASK[np.nonzero(token < S)[0], token[token < S]].all()
            assert ((routing.weight_GEC != 0) == (routing.token_GEC < S)).all()
        else:
            assert not routing.dispatch_GSEC[~MASK].any()
            assert not routing.combine_GSEC[~MASK].any()
            np.testing.assert_allclose(routing.combine_GSEC.sum((-2, -1)), MASK, atol=1e-6)
            np.testing.assert_allclose(routing.dispatch_GSEC.sum(1).max((1, 2)), MASK.any(1), atol=1e-6)


@pytest.mark.parametrize("router", EVERY_ROUTER, ids=str)
def test_router_equals_oracle(router):
    """A router is its paper's formula, without keys and, but for what it draws, with them."""
    double = {n: w.astype(np.float64) for n, w in parameters(router).items()}
    state = {n: np.asarray(v, np.float64) for n, v in context(router).state.items()}
    noises = [None, cases.noise(router, KEYS, S, E)]
    if isinstance(router, moe_jax.Random):
        noises[0] = noises[1]
    for routing, noise in zip(routed(router)[0], noises, strict=False):
        given = oracle.Given(noise, 1.0, state, *IDS, E)
        true = oracle.route(router, double, X.astype(np.float64), MASK, given)
        if isinstance(router, moe_jax.Random) and routing is routed(router)[0][0]:
            continue  # evaluation has a draw of its own
        for name, expected in zip(true._fields, true, strict=True):
            actual = next((getattr(routing, f) for f in routing._fields if f.startswith(name + "_")), None)
            if name in ("expert", "token"):
                np.testing.assert_array_equal(actual, expected)
            elif name == "load" and (noise is None or expected is None):
                assert actual is None
            else:
                close(actual, expected)


@pytest.mark.parametrize("router", EVERY_ROUTER, ids=str)
def test_router_uses_keys_if_it_says_so(router):
    """`random` says whether keys change anything."""
    still, noisy = (jax.tree.leaves(routing) for routing in routed(router)[0][:2])
    same = len(still) == len(noisy) and all(np.array_equal(a, b) for a, b in zip(still, noisy, strict=True))
    assert same != traits(router).random


@pytest.mark.law(3)
@pytest.mark.parametrize("router", EVERY_ROUTER, ids=str)
def test_router_is_trained_by_the_task(router):
    """Law 3: the task loss alone moves every number of every router parameter, but those that it says it does not.

    Where weights are shares of the chosen, nothing is known of an expert that nobody chose.
    """
    gradients = routed(router)[1]
    assert set(gradients) == set(router.params)
    for name, grad in gradients.items():
        if name in traits(router).untrained:
            assert (np.abs(grad) < 1e-5).all(), name
        else:
            unknown = 0.25 if traits(router).normalize else 0
            assert (np.abs(grad) > 1e-6).mean() >= 1 - unknown, name


@pytest.mark.law(3)
@pytest.mark.parametrize("router", [r for r in EVERY_ROUTER if r.params], ids=str)
def test_router_gradient_is_the_slope_of_its_formula(router):
    """Law 3: not any gradient, but the task loss's, denominators of weights included: finite differences in numpy."""
    kind, x, target = cases.EXPERTS[0], X.astype(np.float64), TARGET.astype(np.float64)
    double = {n: w.astype(np.float64) for n, w in parameters(router).items()}
    state = {n: np.asarray(v, np.float64) for n, v in context(router).state.items()}
    given = oracle.Given(cases.noise(router, KEYS, S, E), 1.0, state, *IDS, E)

    def task(params):
        choice = oracle.route(router, params, x, MASK, given)
        experts = {n: w[: choice.logits.shape[-1]].astype(np.float64) for n, w in weights(kind).items()}
        y = oracle.combine(kind, experts, x, choice, oracle.kept(Einsum(None), choice, MASK))
        return ((y - target) ** 2).sum()

    for name, grad in routed(router)[1].items():
        way = normal(11, *grad.shape)
        slope = oracle.slope(lambda w, name=name: task({**double, name: w}), double[name], way)
        np.testing.assert_allclose((grad * way).sum(), slope, atol=1e-4 * np.abs(grad * way).sum() + 1e-4, err_msg=name)


@pytest.mark.parametrize("router", EVERY_ROUTER, ids=str)
def test_router_computes_in_float32(router):
    """On bfloat16 inputs a router decides bit for bit as on the same numbers in float32."""
    half, full = (jax.tree.leaves(routing) for routing in routed(router)[0][2:])
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
    """Decision of a router with keys, where a second choice is sometimes not taken."""
    routing = routed(router)[0][1]
    pad = ((0, 0), (0, 0), (0, 2 - router.K))
    return TokenChoice(
        np.pad(routing.expert_GSK, pad, constant_values=E), np.pad(routing.weight_GSK, pad), *routing[2:5]
    )


@pytest.mark.law(2)
@pytest.mark.parametrize("router", cases.ROUTERS, ids=str)
@pytest.mark.parametrize("dispatch", cases.DISPATCHERS, ids=str)
def test_dispatcher_is_the_definition(dispatch, router):
    """Law 2: values, dropped choices and gradients of every dispatcher are Einsum's and the oracle's."""
    kind, routing = cases.EXPERTS[1], two_choices(router)
    (_, (y, kept)), grads = dispatched(dispatch)(router)
    choice = oracle.Choice(routing.expert_GSK, routing.weight_GSK, routing.logits_GSE, routing.probs_GSE)
    taken = oracle.kept(dispatch, choice)
    double = {n: w.astype(np.float64) for n, w in weights(kind).items()}
    close(y, oracle.combine(kind, double, X.astype(np.float64), choice, taken))
    np.testing.assert_array_equal(kept, taken)

    options = [getattr(dispatch, name) for name in ("priority", "convention") if hasattr(dispatch, name)]
    definition = Einsum(dispatch.capacity_factor, *options)
    (_, (y_einsum, kept_einsum)), grads_einsum = dispatched(definition)(router)
    close((y, *grads), (y_einsum, *grads_einsum))
    np.testing.assert_array_equal(kept, kept_einsum)


@pytest.mark.law(2)
def test_something_is_dropped():
    """Law 2 is tried where a limit bites: each limited dispatcher drops something of some router."""
    for dispatch in cases.DISPATCHERS:
        named = [(two_choices(router).expert_GSK < E).sum() for router in cases.ROUTERS]
        kept = [dispatched(dispatch)(router)[0][1][1].sum() for router in cases.ROUTERS]
        assert (sum(named) > sum(kept)) == (dispatch.capacity_factor is not None)


@pytest.mark.law(2)
@pytest.mark.parametrize("router", [r for r in cases.SLOT_ROUTERS if r.routing is SlotChoice], ids=str)
def test_gather_is_the_definition(router):
    """Law 2, where experts choose: values, slots and gradients of Gather are Einsum's and the oracle's."""
    kind, routing = cases.EXPERTS[1], jax.tree.map(jnp.array, routed(router)[0][1])
    params = {n: w[: routing.E] for n, w in weights(kind).items()}

    def f(dispatch):
        def loss(x, weight, params):
            y, kept = dispatch(x, routing._replace(weight_GEC=weight), kind, params, Shard())
            return ((y - TARGET) ** 2).sum(), (y, kept)

        (_, (y, kept)), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(X, routing[1], params)
        return y, kept, grads

    fast, definition = f(Gather()), f(Einsum(None))
    close(fast, definition)
    choice = oracle.Slots(*map(np.asarray, routing[:4]))
    double = {n: w.astype(np.float64) for n, w in params.items()}
    close(fast[0], oracle.combine(kind, double, X.astype(np.float64), choice, oracle.kept(None, choice)))


@pytest.mark.parametrize("loss", cases.LOSSES, ids=str)
def test_loss_is_a_function_of_global_sums(loss):
    """A loss sees sums only: twice the same batch gives the same loss, nothing gives a finite one; layers stack."""
    routing = routed(moe_jax.NoisyTopK(K=2))[0][1]
    state = {n: jnp.array(0.1) for n in traits(loss).state}
    s = jax.jit(lambda r: stats(r, r.expert_GSK < E, 2, jnp.asarray(IDS[1]), 3))(routing)
    value = lambda s: loss(s, state, moe_jax.NoisyTopK(K=2))  # noqa: E731
    assert value(s) != 0
    np.testing.assert_allclose(value(jax.tree.map(lambda a: 2 * a, s)), value(s), rtol=1e-6)
    stacked = value(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), s))
    assert stacked.shape == (2,)
    assert np.isfinite(value(jax.tree.map(jnp.zeros_like, s)))
