"""The language model: packed documents, causality, layouts, and the same numbers on every mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import MHA, Relative
from moe_jax.attention.positions import BUCKETS, buckets
from moe_jax.core import dims
from moe_jax.core.shard import RULES
from moe_jax.core.shardings import shardings
from moe_jax.data import cross_entropy
from moe_jax.dispatch import Scatter, Sort
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance
from moe_jax.models import LM, LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.routers import Top2
from tests.cases import mesh_of

MOE = MoEConfig(E=4, router=Top2(second="always"), experts=MLP(F=12), dispatch=Scatter(1.0), losses=(LoadBalance(0.1),))
CFG = LMConfig(V=31, D=16, N=4, attention=MHA(2, 8, position=Relative()), ffn=GLU(F=12, activation="gelu"), moe=MOE)
B, L = 8, 12
TOKENS = (np.arange(B * L).reshape(B, L) * 7 + np.arange(B)[:, None] ** 2) % 31


@pytest.fixture(scope="module")
def params():
    tree = LM(CFG).init(jax.random.key(0), jnp.zeros((1, L), jnp.int32))["params"]
    # biases and relative positions start at zero: give every parameter a say
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), tree)


@pytest.mark.law(4)
def test_a_suffix_changes_no_prefix(params):
    """Law 4, through attention and routing, with drops (capacity factor 1)."""
    apply = jax.jit(lambda tokens: LM(CFG).apply({"params": params}, tokens))
    logits, aux = apply(jnp.asarray(TOKENS))
    assert aux.metrics["drop_rate"].max() > 0
    for cut in (1, 5, 11):
        changed, _ = apply(jnp.asarray(np.where(np.arange(L) < cut, TOKENS, (TOKENS + 3) % 31)))
        np.testing.assert_array_equal(logits[:, :cut], changed[:, :cut])
        assert not np.allclose(logits[:, cut:], changed[:, cut:])


@pytest.mark.law(11)
def test_packed_documents_do_not_see_each_other(params):
    """Two documents in a row give the logits that each gives alone; padding gives and takes nothing."""
    cfg = CFG.dropless()
    apply = jax.jit(lambda t, s, p: LM(cfg).apply({"params": params}, t, s, p))
    tokens, first = TOKENS[:1], 5
    segment = np.where(np.arange(L) < first, 1, np.where(np.arange(L) < 10, 2, 0))[None]
    position = np.where(np.arange(L) < first, np.arange(L), np.arange(L) - first)[None]
    packed, aux = apply(tokens, segment, position)
    assert aux.stats.tokens.tolist() == [10, 10]

    def alone(part):  # moved to the front, the rest padding
        n = part.shape[1]
        row = np.zeros((1, L), int)
        row[:, :n] = part
        return apply(row, (np.arange(L) < n).astype(int)[None], np.arange(L)[None])[0][:, :n]

    np.testing.assert_allclose(packed[:, :first], alone(tokens[:, :first]), atol=2e-5)
    np.testing.assert_allclose(packed[:, first:10], alone(tokens[:, first:10]), atol=2e-5)
    other = tokens.copy()
    other[:, 10:] = 3
    np.testing.assert_array_equal(packed[:, :10], apply(other, segment, position)[0][:, :10])


def objective(cfg, params, tokens):
    logits, aux = LM(cfg).apply({"params": params}, tokens[:, :-1])
    return cross_entropy(logits, tokens[:, 1:]).mean() + aux.loss.mean(), (logits, aux)


@pytest.mark.law(1)
@pytest.mark.parametrize(("shape", "remat"), [("d2e4", "none"), ("d8", "full"), ("d2e4", "save_collectives")], ids=str)
def test_one_model_every_mesh(params, shape, remat):
    """Law 1 for a whole model: loss, logits, statistics, all gradients; scanned, with and without remat."""
    cfg = dataclasses.replace(CFG, remat=remat)
    f = jax.jit(jax.value_and_grad(partial(objective, cfg), has_aux=True))
    alone = jax.jit(jax.value_and_grad(partial(objective, CFG), has_aux=True))(params, TOKENS)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        spread = f(jax.device_put(params, shardings(params, mesh)), TOKENS)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(a).max())))


def test_parameters_lie_where_their_names_say(params, mesh):
    """Experts are spread along E, matrices along D, hidden units and heads, routers nowhere, nor stacked layers."""
    laid = shardings(params, mesh)
    spread = {str(path[-1].key) for path, s in jax.tree.leaves_with_path(laid) if not s.is_fully_replicated}
    assert spread == {"up_EDF", "down_EFD"}
    layer = dims.specs(params, RULES)["stack_0"]
    assert layer["moe_1"]["up_EDF"] == jax.P(None, ("expert",), ("fsdp",), ("tensor",))
    assert layer["attention_0"]["out_HAD"] == jax.P(None, ("tensor",), None, ("fsdp",))
    assert layer["moe_1"]["router_gate_DE"] == layer["norm_moe_1"]["scale_D"] == jax.P()


def test_the_dense_twin_has_the_width_of_the_chosen_experts():
    assert CFG.dense_baseline().moe == MLP(F=24)
    shared = dataclasses.replace(CFG, moe=dataclasses.replace(MOE, shared=MLP(F=5)))
    assert shared.dense_baseline().moe == MLP(F=29)
    logits, aux = LM(CFG.dense_baseline()).init_with_output(jax.random.key(0), jnp.asarray(TOKENS))[0]
    assert aux is None
    assert logits.shape == (B, L, 31)


def test_bfloat16_keeps_parameters_routing_and_logits_in_float32(params):
    cfg = dataclasses.replace(CFG, dtype="bfloat16", tied=False, attention=MHA(2, 8))
    shapes = jax.eval_shape(lambda k: LM(cfg).init_with_output(k, jnp.asarray(TOKENS)), jax.random.key(0))
    (logits, aux), variables = shapes
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((aux._replace(expert_BLK=None), variables))} == {jnp.dtype("float32")}


def test_relative_positions_are_t5s():
    """Exact below 16, then logarithmic up to 128; the future counts as 0 and is masked."""
    found = buckets(199 - np.arange(200))
    assert found[199 - np.arange(16)].tolist() == list(range(16))
    assert [int(found[199 - d]) for d in (16, 20, 32, 64, 127, 128, 199)] == [16, 17, 21, 26, 31, 31, 31]
    assert buckets(-np.arange(4)).tolist() == [0, 0, 0, 0]
    assert BUCKETS == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": dataclasses.replace(MOE, dispatch=Scatter(1.0, "choice-major"))}, "token-major"),
        ({"moe": dataclasses.replace(MOE, dispatch=Scatter(1.0, "probability"))}, "causal=False"),
        ({"moe": None}, "moe_layers='none'"),
        ({"attention": "MHA(2, 8)"}, "must be one of MHA"),
        ({"attention": ()}, "must be one of MHA"),
        ({"attention": (MHA(2, 8),) * 5}, "N=4 layers"),
        ({"attention": tuple(MHA(H, 8, position=Relative(shared=True)) for H in (2, 4))}, "share bias_PH"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"moe_layers": "every 5"}, "n <= N=4"),
        ({"moe_layers": "1,4"}, r"\[4\]"),
        ({"D": 0}, "D=0"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)


def test_what_is_safe_is_not_refused():
    """Nothing is dropped, so no later token can take a slot; or the user said so."""
    for dispatch in (Sort(), Scatter(None, "choice-major")):
        dataclasses.replace(CFG, moe=dataclasses.replace(MOE, dispatch=dispatch))
    dataclasses.replace(CFG, moe=dataclasses.replace(MOE, dispatch=Scatter(1.0, "probability")), causal=False)
