"""The laws of the layer: one model on every mesh, causality, replicas, padding, drops told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    MLP,
    Einsum,
    MoE,
    MoEConfig,
    NoisyTopK,
    RoundRobin,
    Scatter,
    Sinkhorn,
    Sort,
    Switch,
    Top2,
    TopK,
)
from moe_jax.core.routing import TokenChoice, position_in_expert
from tests import oracle
from tests.cases import (
    LAYERS,
    MESHES,
    ON_MESH,
    RATE,
    SCENARIOS,
    TRIED,
    USUAL,
    WITHOUT_ORACLE,
    B,
    D,
    L,
    close,
    compiled,
    context,
    given,
    normal,
    run,
    scenario,
    shapes_of,
)

ids = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731


def doubles(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@functools.cache
def truth(name, what) -> oracle.Result:
    params, batch = scenario(name, what)
    return oracle.layer(LAYERS[name], doubles(params), doubles(batch.x), batch.mask, given(name, batch))


@pytest.mark.law(1)
@pytest.mark.parametrize("name", USUAL)
def test_scenarios_force_what_they_say(name):
    """Law 1 is only tried where something is dropped, tied, empty, crowded or padded."""
    dropless = LAYERS[name].dispatch.capacity_factor is None
    counts = {what: truth(name, what).stats["choices_E"] for what in SCENARIOS}
    for what in SCENARIOS:
        assert dropless == (truth(name, what).metrics["drop_rate"] == 0), what
    assert (counts["empty"][LAYERS[name].E // 2 :] == 0).all()
    assert counts["one"][2] == B * L
    assert counts["flat"][0] == B * L
    assert truth(name, "padding").stats["tokens"] < B * L
    gate = scenario(name, "ties")[0]["router_gate_DE"]
    np.testing.assert_array_equal(gate[:, 1::2], gate[:, ::2])


@pytest.mark.law(1)
@pytest.mark.parametrize(("name", "what"), [(n, w) for n, w in TRIED if n not in WITHOUT_ORACLE])
def test_single_device_equals_oracle(name, what):
    """Law 1: output, losses, statistics, metrics, every gradient and an SGD step are the oracle's."""
    cfg, one, true = LAYERS[name], run(name, None, what), truth(name, what)
    close(one.y, true.y)
    close(one.aux_loss, true.aux_loss)
    close(one.stats, true.stats)
    close(one.metrics, true.metrics, least=1.0)
    np.testing.assert_array_equal(one.stats["kept"], true.stats["kept"])
    whole = np.round(one.stats["choices_E"], 3)  # Soft MoE's are sums of fractions
    np.testing.assert_array_equal(whole, np.round(true.stats["choices_E"], 3))

    params, batch = scenario(name, what)
    at = doubles({**params, "x": batch.x})

    def loss(at):
        rest = {n: v for n, v in at.items() if n != "x"}
        return oracle.loss(cfg, rest, at["x"], batch.mask, batch.target, given(name, batch), true.decision)

    close(one.loss, loss(at))
    for i, (leaf, grad) in enumerate({**one.grads, "x": one.grad_x}.items()):
        # along the sign of the gradient nothing cancels; along a random direction nothing hides
        for v in (np.sign(grad), normal(i, *grad.shape)):
            expected = oracle.slope(lambda w, leaf=leaf: loss({**at, leaf: w}), at[leaf], v)
            np.testing.assert_allclose((grad * v).sum(), expected, atol=1e-5 * np.abs(grad * v).sum(), err_msg=leaf)
    close(one.params, {n: params[n] - RATE * one.grads[n] for n in params})


@pytest.mark.law(1)
@pytest.mark.parametrize(("name", "mesh", "what"), [(*m, w) for m in ON_MESH for n, w in TRIED if n == m[0]], ids=ids)
def test_one_model_every_mesh(name, mesh, what):
    """Law 1: on every mesh everything is what a single device computes, noise and what is remembered included."""
    many, one = run(name, mesh, what), run(name, None, what)
    close(many._replace(metrics={})._asdict(), one._replace(metrics={})._asdict())
    close(many.metrics, one.metrics, least=1.0)
    np.testing.assert_array_equal(many.stats["kept"], one.stats["kept"])
    if one.expert is not None:
        np.testing.assert_array_equal(many.expert, one.expert)
    if name not in WITHOUT_ORACLE:
        close(many.y, truth(name, what).y)


@pytest.mark.law(1)
@pytest.mark.parametrize(
    ("cfg", "mesh", "batch", "message"),
    [
        (MoEConfig(E=4), "e8", B, r"E=4 does not spread evenly over mesh.expert=8; make it a multiple"),
        (MoEConfig(E=12), "e8", B, r"E=12 does not spread evenly over mesh.expert=8"),
        (
            MoEConfig(E=8, dispatch=Sort()),
            "d2e4",
            B,
            r"AllToAll\(\) does not carry the rows of Sort\(\) .* mesh.expert=4; use RaggedAllToAll",
        ),
        (MoEConfig(E=8, experts=MLP(F=6)), "d2t4", B, r"experts.F=6 does not spread evenly over mesh.tensor=4"),
        (MoEConfig(E=8), "f8", B, r"D=4 does not spread evenly over mesh.fsdp=8"),
        (MoEConfig(E=8), "d2e4", 12, r"A batch of 12 sequences does not spread evenly over 8 shards"),
        (MoEConfig(E=8, S=32), "d2e4", B, r"A shard's 2 x 8 tokens are not whole routing groups of S=32"),
        (MoEConfig(E=8, S=3), None, B, r"A shard's 16 x 8 tokens are not whole routing groups of S=3"),
        (MoEConfig(E=8, S=3, router=RoundRobin(), dispatch=Scatter(None)), None, B, r"not whole routing groups of S=3"),
        (MoEConfig(E=8, S=3, router=Sinkhorn(), dispatch=Scatter(None)), None, B, r"not whole routing groups of S=3"),
    ],
)
def test_what_does_not_spread_is_refused(cfg, mesh, batch, message):
    """Law 1: fewer experts than shards, and whatever else does not divide, is refused in one sentence."""
    x = jax.ShapeDtypeStruct((batch, L, D), jnp.float32)
    with context(mesh):
        params = {"params": shapes_of(cfg)}
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, x: MoE(cfg).apply(p, x, state=cfg.init_state()), params, x)


@pytest.mark.law(1)
@pytest.mark.parametrize("router", [NoisyTopK(), TopK()], ids=str)
def test_grouping_is_irrelevant_where_nothing_goes_by_it(router):
    """Law 1: without a limit S need not divide a shard's tokens, but noise is drawn by groups, and then it must."""
    cfg = MoEConfig(E=8, S=48, router=router, dispatch=Scatter(None))
    x, key = jax.ShapeDtypeStruct((B, L, D), jnp.float32), jax.random.key(0)
    layer = lambda key: jax.eval_shape(lambda p, x: MoE(cfg).apply(p, x, None, key), {"params": shapes_of(cfg)}, x)  # noqa: E731
    layer(None)
    if router.random:
        with pytest.raises(ValueError, match="not whole routing groups of S=48"):
            layer(key)
    else:
        layer(key)


@pytest.mark.law(4)
def test_suffix_changes_no_prefix():
    """Law 4: at a tight capacity, token-major slots leave everything before a change bit for bit alone."""
    f, cut = compiled("einsum", None)[0], 5
    assert LAYERS["einsum"].causal
    params, batch = scenario("einsum", "drops")
    before = np.asarray(f(params, batch).y)
    for seed in range(5):
        x = batch.x.copy()
        x[:, cut:] = normal(seed, B, L - cut, D)
        after = np.asarray(f(params, batch._replace(x=x)).y)
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert not (after[:, cut:] == before[:, cut:]).all()


@pytest.mark.law(4)
@pytest.mark.parametrize(("priority", "changes"), [("token-major", 0), ("choice-major", 1), ("probability", 1)])
def test_only_token_major_is_causal(priority, changes):
    """Law 4, told: changing the last token moves the first one's second choice, unless token-major."""

    def first(last, weight):
        expert = jnp.array([[[0, 1], [1, 0], last]])
        w, e = jnp.array([[[0.6, 0.4], [0.7, 0.3], weight]]), jnp.zeros((1, 3, 3))
        return position_in_expert(TokenChoice(expert, w, e, e, jnp.ones((1, 3), bool)), priority)[0, 0].tolist()

    moved = [a - b for a, b in zip(first([1, 2], [0.9, 0.1]), first([2, 0], [0.5, 0.5]), strict=True)]
    assert moved == [0, changes]


@pytest.mark.law(4)
@pytest.mark.parametrize("dispatch", [Einsum, Scatter])
def test_config_says_whether_it_is_causal(dispatch):
    """Law 4: a config is causal with token-major slots, without a limit, or choice-major with one choice."""
    one, two = Switch(), TopK(K=2)
    assert MoEConfig(E=4, router=two, dispatch=dispatch(1.0)).causal
    assert not MoEConfig(E=4, router=two, dispatch=dispatch(1.0, "choice-major")).causal
    assert MoEConfig(E=4, router=one, dispatch=dispatch(1.0, "choice-major")).causal
    assert not MoEConfig(E=4, router=one, dispatch=dispatch(1.0, "probability")).causal
    assert MoEConfig(E=4, router=two, dispatch=dispatch(None, "probability")).causal
    assert MoEConfig(E=4, router=two, dispatch=dispatch(1.0, "choice-major")).dropless().causal
    assert MoEConfig(E=4, router=two, dispatch=Sort()).causal


@pytest.mark.law(5)
@pytest.mark.parametrize(("name", "mesh"), [c for c in ON_MESH if c[1] in ("d2e4", "d8", "f2e2t2")], ids=ids)
def test_replicas_are_replicas(name, mesh):
    """Law 5: after three steps, what several devices hold copies of is bit-identical on all of them."""
    f = compiled(name, mesh)[0]
    params, batch = scenario(name, "drops")
    copies = 0
    for _ in range(3):
        step = f(params, batch)
        params, batch = step.params, batch._replace(state=step.state)
    for leaf in jax.tree.leaves(step):
        by_index = {}
        for piece in leaf.addressable_shards:
            by_index.setdefault(str(piece.index), []).append(np.asarray(piece.data).tobytes())
        assert all(len(set(same)) == 1 for same in by_index.values())
        copies += sum(len(same) == 8 for same in by_index.values())
    routers = [leaf for n, leaf in step.params.items() if n.startswith("router_")]
    assert all(leaf.sharding.is_fully_replicated for leaf in (*routers, *step.state.values()))
    assert step.aux_loss.sharding.is_fully_replicated
    assert copies > 10


@pytest.mark.law(7)
@pytest.mark.parametrize(
    ("name", "mesh"), [(n, None) for n in LAYERS] + [c for c in ON_MESH if c[1] in ("d2e4", "f2e2t2")], ids=ids
)
def test_padding_is_nowhere(name, mesh):
    """Law 7: the content of padded tokens, NaN here, changes no output, loss, count, metric or gradient.

    Bit for bit. Their own output is 0 (with a shared expert: that expert's of 0), their own gradient 0.
    """
    f = compiled(name, mesh)[0]
    params, batch = scenario(name, "padding")
    x = np.where(batch.mask[..., None], batch.x, np.nan)
    one, other = (jax.tree.map(np.asarray, f(params, b)) for b in (batch, batch._replace(x=x)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not other.grad_x[~batch.mask].any()
    assert not other.y[~batch.mask].any()
    assert one.stats["tokens"] == batch.mask.sum()


@pytest.mark.law(7)
def test_everything_padded():
    """Law 7: a batch of nothing but padding has finite losses and metrics, and no gradient from the task."""
    params, batch = scenario("einsum", "padding")
    step = compiled("einsum", None)[0](params, batch._replace(mask=np.zeros((B, L), bool)))
    assert "agreement" not in step.metrics  # with the layer before it, and there is none
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))
    assert step.stats["tokens"] == step.stats["kept"] == step.loss == 0


@pytest.mark.law(8)
@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
@pytest.mark.parametrize("name", ["einsum", "scatter"])
def test_drop_rate_is_the_oracles(name, mesh):
    """Law 8: what is dropped is told, exactly."""
    for what in ("drops", "one", "padding"):
        told, true = run(name, mesh, what).metrics["drop_rate"], truth(name, what).metrics["drop_rate"]
        assert 0 < true < 1
        np.testing.assert_allclose(told, true, rtol=1e-6)


@pytest.mark.parametrize("router", [Switch(), TopK(K=2), Top2(second="always")])
def test_bfloat16_layer(router):
    """A bfloat16 layer answers in bfloat16, and counts, loses and routes in float32."""
    layer = MoE(MoEConfig(E=8, router=router, experts=MLP(F=4, bias=True), shared=MLP(F=4)))
    x = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    y, aux = jax.eval_shape(layer.apply, params, x)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((aux._replace(expert_BLK=None), params))} == {jnp.dtype("float32")}
