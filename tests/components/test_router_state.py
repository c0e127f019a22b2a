"""State of routers: updated once a step from global counts, in the training state, equal on every device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    LM,
    MLP,
    Adaptive,
    BASELayer,
    ExpertChoice,
    Gather,
    Hash,
    Hierarchical,
    LoadBalance,
    LossFree,
    MoEConfig,
    Scatter,
    Sinkhorn,
    TaskTopK,
    Temperature,
    Top2,
)
from moe_jax.data import Folder
from moe_jax.models import Call
from moe_jax.step import Program, check_tasks
from moe_jax.train import train
from tests import oracle_routing
from tests.laws.test_training_step import EXP, MODEL, batch

RATE = 0.01
MOE = MoEConfig(
    E=4,
    router=LossFree(K=2, rate=RATE),
    experts=MLP(F=8),
    dispatch=Scatter(None),
    gating=(Temperature(2.0, 0.5, 4),),
    losses=(Adaptive(LoadBalance(0.01)),),
)


def experiment(moe=MOE, mesh=(("data", 2), ("expert", 4)), microbatches=1, **model):
    model = {"N": 4, **model}
    data = dataclasses.replace(EXP.data, microbatches=microbatches)
    return dataclasses.replace(EXP, model=dataclasses.replace(MODEL, moe=moe, **model), data=data, mesh=mesh)


@functools.cache
def trained(exp, steps=3):
    """The states and metrics of a few steps, on the host, and the last state where it lies."""
    program = Program(exp)
    state, seen = program.init(), []
    for _ in range(steps):
        state, metrics = program.step(state, batch())
        seen.append((jax.device_get(state), jax.device_get(metrics)))
    return seen, state


def test_a_step_moves_the_bias_by_the_global_counts():
    """b += rate * sign(mean - load), by layer, of the counts that the step reports; the schedule counts updates."""
    bias_NE = np.zeros((2, 4))
    for step, (state, metrics) in enumerate(trained(experiment())[0]):
        counts_NE = metrics.stats.choices_E
        assert (counts_NE.sum(-1) == 2 * metrics.stats.tokens).all()
        bias_NE = np.stack([oracle_routing.bias_update(b, n, RATE) for b, n in zip(bias_NE, counts_NE, strict=True)])
        np.testing.assert_allclose(state.router["bias_E"], bias_NE, atol=1e-7)
        assert state.router["step_"].tolist() == [step + 1] * 2
        assert np.abs(state.router["log_weight_"]).max() > 0
    assert len(np.unique(bias_NE.round(6))) > 1


@pytest.mark.law(1)
@pytest.mark.parametrize(
    "change",
    [
        {"mesh": (("data", 8), ("expert", 1))},
        {"microbatches": 2},
        {"remat": "full"},
    ],
    ids=["mesh", "accumulation", "remat"],
)
def test_the_same_whatever_the_program(change):
    """One bias on every mesh, with gradients accumulated in pieces, and with everything computed twice."""
    one, other = trained(experiment())[0][-1][0].router, trained(experiment(**change))[0][-1][0].router
    assert set(one) == {"bias_E", "step_", "log_weight_"}
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)


@pytest.mark.law(5)
@pytest.mark.parametrize("router", [LossFree(K=2), Sinkhorn(K=2)], ids=str)
def test_replicas_are_replicas(router):
    """Law 5: what routers remember is bit-identical on every device after steps."""
    moe = MOE if isinstance(router, LossFree) else dataclasses.replace(MOE, router=router)
    state = trained(experiment(moe, causal=isinstance(router, LossFree)))[1]
    for name, leaf in state.router.items():
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(copies) == 1, name
        assert len(leaf.addressable_shards) == 8
        assert leaf.sharding.is_fully_replicated


def test_sinkhorn_remembers_the_mean_potential():
    """Centred, and no longer zero; evaluation goes by it."""
    moe = dataclasses.replace(MOE, router=Sinkhorn(K=2))
    potential_NE = trained(experiment(moe, causal=False))[0][-1][0].router["potential_E"]
    np.testing.assert_allclose(potential_NE.mean(-1), 0, atol=1e-5)
    assert np.abs(potential_NE).max() > 1e-3


def test_a_step_that_is_not_finite_is_not_remembered():
    program = Program(experiment())
    good = program.init()
    poisoned = good._replace(params={**good.params, "embed_VD": good.params["embed_VD"].at[3].set(np.nan)})
    before = jax.device_get(good.router)
    after, metrics = program.step(jax.device_put(poisoned, program.shardings), batch())
    assert int(metrics.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after.router))


@pytest.mark.law(9)
def test_what_is_remembered_is_saved(tmp_path):
    """Law 9: a run that was interrupted goes on with its biases, schedules and weights, bit for bit."""
    for i in range(60):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    exp = experiment()
    exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, source=Folder(str(tmp_path / "text"))))
    losses = lambda records: {r["step"]: (r["loss"], r["aux_loss"]) for r in records if r["kind"] == "train"}  # noqa: E731
    whole = losses(train(exp, tmp_path / "whole", tmp_path / "data"))
    for record in train(exp, tmp_path / "cut", tmp_path / "data"):
        if record["kind"] == "eval":
            break  # after step 3, which is saved; the generator is closed here, as by an interruption
    rest = losses(train(exp, tmp_path / "cut", tmp_path / "data"))
    assert rest == {step: loss for step, loss in whole.items() if step > 3}


# ---- in a language model


def params_of(cfg):
    return jax.jit(LM(cfg).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def test_layers_are_compared_and_choices_replayed():
    """Agreement is the oracle's, of scanned stacks too; a recording, made again, gives the same logits bit for bit."""
    moe = dataclasses.replace(MOE, router=Top2(), gating=(), losses=())
    cfg = dataclasses.replace(MODEL, moe=moe, N=6, moe_layers="every 2")
    params = params_of(cfg)
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(3), p.shape), params)
    tokens, key = jnp.asarray(batch().tokens_BL), jax.random.key(5)
    run = jax.jit(
        lambda tokens, key, replay=None: LM(cfg).apply({"params": params}, tokens, call=Call(key, replay=replay))
    )
    logits, aux = run(tokens, key)
    assert aux.expert_BLK.shape == (3, *tokens.shape, 2)
    flat = np.asarray(aux.expert_BLK).reshape(3, -1, 2)
    told = [oracle_routing.agreement(flat[n - 1], flat[n], 4) for n in (1, 2)]
    np.testing.assert_allclose(aux.metrics["agreement"], told, rtol=1e-6)
    assert 0.1 < min(told)
    assert max(told) < 0.9

    again, _ = run(tokens, key, aux.expert_BLK)
    np.testing.assert_array_equal(logits, again)
    other, changed = run(tokens, key, (aux.expert_BLK + 1) % 4)
    assert (np.asarray(changed.expert_BLK) == (flat.reshape(aux.expert_BLK.shape) + 1) % 4).all()
    assert not np.allclose(logits, other)


def test_domains_and_tokens_reach_the_routers():
    """A gate that sees tasks alone sends a row by its domain, a hash every token by its id."""
    rows = jax.tree.map(jnp.asarray, batch()._replace(domain_B=np.arange(16, dtype=np.int32) % 2))
    for router in (TaskTopK(K=2, M=2, token=False), Hash(K=1)):
        cfg = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, router=router, gating=(), losses=()))
        _, aux = jax.jit(lambda p, cfg=cfg: cfg.apply(p, rows))(params_of(cfg))
        expert_BL = np.asarray(aux.expert_BLK)[0, ..., 0][:15]
        by = np.asarray(rows.tokens_BL[:15] if isinstance(router, Hash) else rows.domain_B[:15, None])
        by = np.broadcast_to(by, (15, 8))
        for value in np.unique(by):
            assert len(np.unique(expert_BL[by == value])) == 1
        assert len(np.unique(expert_BL)) > 1


@pytest.mark.law(4)
@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (dict(router=ExpertChoice(), dispatch=Gather()), r"ExpertChoice\(\) decides about a token by later ones; in a"),
        (dict(router=BASELayer()), r"BASELayer\(\) decides about a token by later ones"),
        (dict(router=Sinkhorn()), r"say causal=False"),
    ],
    ids=lambda v: type(v.get("router")).__name__ if isinstance(v, dict) else "",
)
def test_what_sees_the_future_is_refused(moe, message):
    """Law 4: in a causal model, unless the user says otherwise."""
    moe = dataclasses.replace(MOE, gating=(), losses=(), **moe)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, moe=moe)
    dataclasses.replace(MODEL, moe=moe, causal=False)


def test_a_router_without_its_state_is_refused():
    cfg = dataclasses.replace(MODEL, moe=MOE)
    with pytest.raises(ValueError, match=r"keeps bias_E, log_weight_, step_ from step to step, but was called with"):
        jax.eval_shape(LM(cfg).apply, {"params": jax.eval_shape(lambda: params_of(cfg))}, jnp.zeros((1, 8), int))


def test_groups_of_experts_are_no_tasks():
    """M of a router that does not go by tasks has nothing to do with the domains."""
    moe = dataclasses.replace(MOE, router=Hierarchical(M=2, outer=1, inner=1), tasks=8)
    check_tasks(experiment(moe), domains=8)


def test_more_domains_than_tasks_are_refused():
    with pytest.raises(ValueError, match=r"The data has 8 domains, but config.model.moe.router.M=2; set it to 8"):
        Program(experiment(dataclasses.replace(MOE, router=TaskTopK(M=2), gating=(), losses=())), domains=8)
    with pytest.raises(ValueError, match=r"The data has 8 domains, but config.model.moe.tasks=3; set it to 8"):
        Program(experiment(dataclasses.replace(MOE, tasks=3)), domains=8)
