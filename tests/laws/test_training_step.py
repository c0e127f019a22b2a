"""Training: one golden step, the same on every mesh and in pieces, exact resumption, non-finite steps."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import step as trainer
from moe_jax.attention import MHA, Relative
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.data import Batch, Bytes
from moe_jax.dispatch import Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance, RouterZ, TokenEntropy, is_additive
from moe_jax.models import Call, LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import WSD, Adafactor, AdamW, Constant
from moe_jax.routers import Random, Top2
from moe_jax.step import Program
from tests import oracle_lm

MOE = MoEConfig(E=4, router=Top2(), experts=MLP(F=8), dispatch=Scatter(1.25), S=8)
MODEL = LMConfig(V=257, D=8, N=2, attention=MHA(2, 4), ffn=GLU(F=8, activation="gelu"), moe=MOE, remat="none")
CLIP = 0.1  # below the norm of the gradients, so that every step is clipped
ALWAYS = dataclasses.replace(MOE, router=Top2("always"))
EXP = Experiment(
    model=MODEL,
    data=DataConfig(tokenizer=Bytes(), L=8, B=16),
    optim=OptimConfig(optimizer=AdamW(), schedule=Constant(0.01), clip=CLIP),
    run=RunConfig(steps=6, log_every=1, eval_every=3, eval_sequences=16, save_every=3),
    mesh=(("data", 2), ("expert", 4)),
)


def batch(L=8, B=16) -> Batch:
    """Rows of a counting sequence; the last row half padding."""
    tokens = (np.arange(L + 1)[None] * 3 + np.arange(B)[:, None] * 11).astype(np.int32) % 257
    segment = np.ones((B, L), np.int32)
    segment[-1, L // 2 :] = 0
    position = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return Batch(tokens[:, :-1], tokens[:, 1:], segment, position, segment > 0, np.zeros(B, np.int32))


def close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-3, float(np.abs(x).max())))


def steps(exp, n=2):
    program = Program(exp)
    state = program.init()
    for _ in range(n):
        state, metrics = program.step(state, batch())
    return program, jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def two_steps():
    return steps(EXP)


@pytest.mark.law(5)
def test_replicas_are_replicas(two_steps):
    """Law 5: after steps, what claims to be replicated is bit-identical on every device."""
    program = two_steps[0]
    state = program.init()
    for _ in range(2):
        state, metrics = program.step(state, batch())
    checked = 0
    for x in jax.tree.leaves((state, metrics)):
        shards = {}
        for shard in x.addressable_shards:
            shards.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for copies in shards.values():
            checked += len(copies) - 1
            for copy in copies[1:]:
                np.testing.assert_array_equal(copies[0], copy)
    assert checked > 100


@pytest.mark.law(1)
def test_one_step_every_mesh(two_steps):
    """Law 1 for training, with GShard's random second expert: two steps of AdamW on one device and on 2 x 4."""
    alone = Experiment(**{**vars(EXP), "mesh": (("data", 8), ("expert", 1))})
    _, state, metrics = steps(alone)
    close(metrics, two_steps[2])
    close(state.params, two_steps[1].params, 2e-4)  # Adam's first steps are signs: rounding is amplified


@pytest.mark.law(1)
def test_pieces_add_up():
    """Accumulated gradients are the whole batch's, targets and tokens counted over all pieces (uneven by padding)."""
    losses = (RouterZ(0.1), LoadBalance(0.1, scope="sequence"), TokenEntropy(0.1))
    assert all(map(is_additive, losses))
    moe = dataclasses.replace(MOE, router=Top2("always"), losses=losses)
    whole = dataclasses.replace(EXP, model=dataclasses.replace(MODEL, moe=moe), mesh=(("data", -1),))
    tx = optax.sgd(1.0)
    results = []
    for A in (1, 2):
        exp = dataclasses.replace(whole, data=dataclasses.replace(EXP.data, microbatches=A))
        state = trainer.init(exp, tx)
        step = jax.jit(
            partial(trainer.train_step, exp, tx, optax.constant_schedule(1.0), trainer.state_specs(exp, state, {}))
        )
        results.append(step(state, jax.tree.map(jnp.asarray, batch())))
    (state1, metrics1), (state2, metrics2) = results
    close(metrics1, metrics2)
    close(state1.params, state2.params)


def told(tree):
    """Parameters as a formula: nothing depends on how random numbers are made."""
    return jax.tree.map(lambda p: 0.4 * np.sin(1.7 * np.arange(p.size).reshape(p.shape) + p.size).astype(p.dtype), tree)


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.law(1)
def test_golden_step():
    """One step of AdamW on 8 devices is that of a numpy model, and its loss a told number.

    Loss and auxiliary loss directly, gradients along a direction by central differences, their norm, parameters after
    the step from these gradients by AdamW's formulas, clipped, decay only where the suffix allows it.
    """
    exp = dataclasses.replace(
        EXP, model=dataclasses.replace(MODEL, attention=MHA(2, 4, position=Relative()), moe=ALWAYS)
    )
    program, rows = Program(exp), batch()
    state = program.init()
    params = told(jax.device_get(state.params))
    loss, aux_loss = oracle_lm.model(exp.model, params, rows)
    assert abs(loss - 5.61884) < 1e-5

    sgd = optax.sgd(1.0)
    alone = state._replace(params=params, opt_state=sgd.init(params))
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), alone)
    step = jax.jit(partial(trainer.train_step, exp, sgd, lambda _: 1.0, trainer.state_specs(exp, alone, {})))
    after, metrics = step(alone, jax.tree.map(jnp.asarray, rows))
    np.testing.assert_allclose([metrics.loss, metrics.aux_loss], [loss, aux_loss], rtol=1e-5)
    grads = {k: g - flat(after.params)[k] for k, g in flat(params).items()}
    for k in (name for name in grads if "router" in name or "up_E" in name or "value" in name):
        way = np.cos(np.arange(grads[k].size)).reshape(grads[k].shape)

        def moved(step, k=k, way=way):
            there = jax.tree.map_with_path(
                lambda path, p: p + step * way if jax.tree_util.keystr(path) == k else np.asarray(p, np.float64), params
            )
            return sum(oracle_lm.model(exp.model, there, rows))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose((grads[k] * way).sum(), slope, rtol=2e-3, atol=2e-6)

    stepped, metrics = program.step(jax.device_put(state._replace(params=params), program.shardings), rows)
    np.testing.assert_allclose([metrics.loss, metrics.aux_loss], [loss, aux_loss], rtol=1e-5)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 2 * CLIP
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    for k, mean in flat(
        optax.tree.get(stepped.opt_state, "mu")
    ).items():  # the step itself hides the norm: it is a sign
        np.testing.assert_allclose(mean, 0.1 * grads[k] * CLIP / norm, rtol=1e-3, atol=1e-7, err_msg=k)
    expected = oracle_lm.first_adamw_step(
        flat(params), grads, 0.01, CLIP, 0.9, 0.95, 1e-8, 0.1, lambda name: "_D'" not in name and "_PH" not in name
    )
    for k, value in flat(stepped.params).items():
        sure = np.abs(grads[k]) > 1e-4  # the first step is a sign: rounding decides about tiny gradients
        np.testing.assert_allclose(value[sure], expected[k][sure], rtol=1e-4, atol=1e-5, err_msg=k)


def test_noise_is_drawn_anew_in_every_layer_microbatch_and_step():
    """Random routing looks at nothing but its noise: no two MoE layers choose alike, nor two microbatches, nor steps.

    The layers are two of a block that is repeated twice. A draw used in both microbatches would make all counts even.
    """
    moe = MoEConfig(E=8, router=Random(), experts=MLP(F=2), dispatch=Scatter(None), losses=())
    attention = (MHA(2, 4), MHA(2, 4, window=3))
    model = dataclasses.replace(MODEL, N=4, attention=attention, moe=moe, moe_layers="all")
    exp = Experiment(model=model, data=dataclasses.replace(EXP.data, microbatches=2))
    rows = jax.tree.map(jnp.asarray, batch()._replace(segment_BL=np.ones((16, 8), np.int32)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), rows)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    specs = trainer.StateSpecs(*[jax.tree.map(lambda _: P(), params)] * 2, None)

    @jax.jit
    def drawn(key):
        _, losses = trainer.backward(exp, specs, params, {}, key, rows)
        _, aux = model.apply(params, rows, Call(key))
        return losses.stats.choices_E, aux.expert_BLK[..., 0]

    keys = [trainer.step_key(exp, trainer.State(jnp.int32(step), *[None] * 5)) for step in (0, 1)]
    (counts_NE, first_NBL), (_, second_NBL) = (jax.device_get(drawn(key)) for key in keys)
    draws = [*first_NBL, *second_NBL]
    for i, one in enumerate(draws):
        assert all((one == other).mean() < 0.4 for other in draws[:i])  # 1 / 8 by chance
    assert counts_NE.sum() == 4 * 16 * 8 * moe.router.K
    assert (counts_NE % 2).any(axis=1).all()


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(smallest=4)], ids=["adamw", "adafactor"])
def test_training_learns(optimizer):
    """Thirty steps on one batch: the loss falls well below its start, under both optimizers."""
    optim = OptimConfig(optimizer=optimizer, schedule=WSD(peak=0.02, warmup=3, decay=10))
    run = dataclasses.replace(EXP.run, steps=30)
    exp = dataclasses.replace(EXP, optim=optim, run=run, mesh=(("data", 8),))
    program = Program(exp)
    state, losses = program.init(), []
    for _ in range(30):
        state, metrics = program.step(state, batch())
        losses.append(float(metrics.loss))
    assert abs(losses[0] - math.log(257)) < 0.7
    assert losses[-1] < 0.85 * losses[0]


def test_a_step_that_is_not_finite_changes_nothing(two_steps):
    """Parameters and moments stay, the step is counted as skipped, and the next good one resets the row."""
    program = two_steps[0]
    good = program.init()
    before = jax.device_get(good)
    poisoned = good._replace(params={**good.params, "embed_VD": good.params["embed_VD"].at[3].set(np.nan)})
    after, metrics = program.step(jax.device_put(poisoned, program.shardings), batch())
    assert (int(metrics.skipped), int(after.skipped_in_a_row), int(after.step)) == (1, 1, 1)
    for old, new in zip(jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state), strict=True):
        np.testing.assert_array_equal(old, new)
    healed = after._replace(params=jax.device_put(before.params, program.shardings.params))
    healed, metrics = program.step(healed, batch())
    assert (int(metrics.skipped), int(healed.skipped_in_a_row)) == (1, 0)


@pytest.mark.parametrize(
    ("mine", "n", "part", "parts"),
    [({0, 1, 2, 3}, 8, 0, 2), ({4, 5, 6, 7}, 8, 1, 2), ({0}, 1, 0, 1), ({2}, 4, 2, 4), (set(range(8)), 8, 0, 1)],
)
def test_what_a_process_reads(mine, n, part, parts):
    """A process reads its own rows; all processes that share a tensor-parallel shard read the same."""
    assert trainer.process_slice(mine, n) == {"process": part, "processes": parts}


@pytest.mark.parametrize("mine", [{0, 2}, {1, 2}, {0, 1, 2}])
def test_rows_that_do_not_lie_together_are_refused(mine):
    with pytest.raises(ValueError, match="are not contiguous"):
        trainer.process_slice(mine, 8)
