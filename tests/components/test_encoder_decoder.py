"""The encoder and the decoder: who sees whom, the published parts, and the same numbers in numpy and on every mesh."""

import dataclasses
import math
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from moe_jax.attention import MHA, NoPE, Relative, Sinusoidal
from moe_jax.attention.positions import BUCKETS
from moe_jax.audit import meshes, samples
from moe_jax.config import DataConfig, Experiment, RunConfig
from moe_jax.data import Pairs, SpanCorruption
from moe_jax.dispatch import Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance
from moe_jax.models import Call, EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.blocks import RMSNorm
from moe_jax.moe import MoEConfig
from moe_jax.optim import Constant, OptimConfig
from moe_jax.routers import LossFree, Top2
from moe_jax.step import Program, gradients
from moe_jax.train import train
from tests import oracle
from tests.oracle_lm import gelu, norm
from tests.texts import text_folder

MOE = MoEConfig(E=4, router=Top2(second="always"), experts=MLP(F=12), dispatch=Scatter(1.0), losses=(LoadBalance(0.1),))
T5 = Relative(shared=True)
CFG = EncoderDecoderConfig(
    V=31,
    D=16,
    N=2,
    attention=MHA(2, 8, J=1, position=T5),
    ffn=GLU(F=12, activation="gelu"),
    moe=MOE,
    dense_after_moe=MLP(F=8),
    V_source=29,
)
B, M, L = 4, 10, 7
SOURCE = (np.arange(B * M).reshape(B, M) * 7 + np.arange(B)[:, None] ** 2) % 29
TOKENS = (np.arange(B * L).reshape(B, L) * 5 + np.arange(B)[:, None] ** 2) % 31


def function_of(cfg, params):
    """(source, tokens, source_segment, segment, router) -> logits, aux, outputs of the encoder."""

    def run(*given):
        norms = lambda module, _: isinstance(module, RMSNorm) and module.name == "encoder_norm"  # noqa: E731
        model = EncoderDecoder(cfg)
        (logits, aux), found = model.apply(
            {"params": params}, *given, capture_intermediates=norms, mutable=["intermediates"]
        )
        return logits, aux, found["intermediates"]["encoder_norm"]["__call__"][0]

    whole = (np.ones_like(SOURCE), np.ones_like(TOKENS), {})
    compiled = jax.jit(lambda s, t, ss, ts, router: run(s, t, ss, ts, None, Call(router=router)))
    return lambda source, tokens, *rest: compiled(source, tokens, *rest, *whole[len(rest) :])


@pytest.fixture(scope="module")
def params():
    """Every parameter has a say, those that start at zero too."""
    tree = jax.jit(EncoderDecoder(CFG).init)(jax.random.key(0), SOURCE[:1], TOKENS[:1])["params"]
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), tree)


@pytest.fixture(scope="module")
def apply(params):
    return function_of(CFG, params)


@pytest.fixture(scope="module")
def dropless(params):
    return function_of(CFG.dropless(), params)


# ---------------------------------------------------------------- who sees whom


@pytest.mark.law(4)
def test_the_decoder_is_causal_and_the_encoder_is_not(apply):
    """Law 4, with drops: a suffix of the target changes no prefix; the last token of the source changes everything."""
    logits, aux, memory = apply(SOURCE, TOKENS)
    assert aux.metrics["drop_rate"].min() > 0
    for cut in (1, 3, 6):
        changed, _, same = apply(SOURCE, np.where(np.arange(L) < cut, TOKENS, (TOKENS + 3) % 31))
        np.testing.assert_array_equal(logits[:, :cut], changed[:, :cut])
        np.testing.assert_array_equal(memory, same)
        assert not np.isclose(logits[:, cut:], changed[:, cut:]).all(-1).any()
    changed, _, other = apply(np.where(np.arange(M) < M - 1, SOURCE, (SOURCE + 3) % 29), TOKENS)
    assert not np.isclose(memory, other).all(-1).any()
    assert not np.isclose(logits, changed).all(-1).any()


@pytest.mark.law(7)
def test_padding_is_nowhere(apply):
    """Law 7: in no layer's count, and without effect, in the source and in the target."""
    source_segment, segment = (np.arange(M) < 6).astype(int)[None], (np.arange(L) < 4).astype(int)[None]
    segments = np.repeat(source_segment, B, 0), np.repeat(segment, B, 0)
    logits, aux, memory = apply(SOURCE, TOKENS, *segments)
    assert aux.stats.tokens.tolist() == [B * 6, B * 4], "the encoder's layer, the decoder's"
    scribbled = np.where(segments[0], SOURCE, 3), np.where(segments[1], TOKENS, 5)
    other_logits, other, other_memory = apply(*scribbled, *segments)
    np.testing.assert_array_equal(logits[:, :4], other_logits[:, :4])
    np.testing.assert_array_equal(memory[:, :6], other_memory[:, :6])
    for a, b in zip(jax.tree.leaves(aux.stats), jax.tree.leaves(other.stats), strict=True):
        np.testing.assert_array_equal(a, b)
    nothing, _, _ = apply(SOURCE, TOKENS, segments[0] * 0, segments[1] * 0)
    assert np.isfinite(nothing).all()


@pytest.mark.law(11)
@pytest.mark.parametrize("position", [T5, Sinusoidal()])
def test_packed_pairs_do_not_see_each_other(params, dropless, position):
    """Two pairs in a row give the logits that each gives alone."""
    run = dropless
    if position != T5:
        attention = MHA(2, 8, J=1, position=position)
        run = function_of(dataclasses.replace(CFG.dropless(), attention=attention), params)
    places = np.array([1] * 4 + [2] * 5 + [0])[None], np.array([1] * 3 + [2] * 3 + [0])[None]
    packed, aux, _ = run(SOURCE[:1], TOKENS[:1], *places)
    assert aux.stats.tokens.tolist() == [9, 6]
    for i in (1, 2):
        rows = []
        for tokens, place in zip((SOURCE[:1], TOKENS[:1]), places, strict=True):
            own = tokens[place == i]
            row = np.zeros_like(tokens)
            row[0, : len(own)] = own
            rows += [row, (np.arange(row.shape[1]) < len(own)).astype(int)[None]]
        alone, _, _ = run(rows[0], rows[2], rows[1], rows[3])
        np.testing.assert_allclose(packed[places[1] == i], alone[0, :3], atol=2e-5)


# ---------------------------------------------------------------- what it is made of


def test_tables_and_vocabularies(params):
    """One table of positions for each stack; the source has its own embedding where it has its own vocabulary."""
    assert params["source_VD"].shape == (29, 16)
    assert params["embed_VD"].shape == (31, 16)
    shapes = lambda cfg: jax.eval_shape(EncoderDecoder(cfg).init, jax.random.key(0), SOURCE, TOKENS)["params"]  # noqa: E731
    tables = [
        p for p, x in jax.tree.leaves_with_path(params) if p[-1].key.endswith("bias_PH") and x.shape == (BUCKETS, 2)
    ]
    assert [path[0].key for path in tables] == ["decoder_bias_PH", "encoder_bias_PH"]
    assert "source_VD" not in shapes(dataclasses.replace(CFG, V_source=None))
    assert "head_DV" in shapes(dataclasses.replace(CFG, tied=False))
    bare = shapes(dataclasses.replace(CFG, attention=MHA(2, 8, J=1, position=NoPE()), dense_after_moe=None))
    assert not [p for p in jax.tree.leaves_with_path(bare) if "bias" in str(p[0]) or "dense_after_moe" in str(p[0])]
    for stack, parts in (("encoder_stack_0", {"attention"}), ("decoder_stack_0", {"attention", "cross"})):
        assert {name[:-2] for name in bare[stack] if name.startswith(("attention", "cross"))} == parts
        assert params[stack]["dense_after_moe_1"]["up_DF"].shape == (1, 16, 8)


def test_the_numbers_of_numpy(params, dropless):
    """Dense and sparse layers of both stacks, ST-MoE's `dense_after_moe`, one head of keys for two, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = slice(0, 2)
    source_segment, segment = np.ones((2, M), int), np.ones((2, L), int)
    source_segment[1, 6:], segment[1, 4:] = 0, 0
    logits, aux, _ = dropless(SOURCE[rows], TOKENS[rows], source_segment, segment)
    expected, losses = numpy_model(CFG.dropless(), p, SOURCE[rows], TOKENS[rows], source_segment, segment)
    np.testing.assert_allclose(logits[segment > 0], expected[segment > 0], atol=2e-4)
    np.testing.assert_allclose(aux.loss, losses, rtol=1e-4)


def numpy_model(cfg, p, source, tokens, source_segment, segment):
    """Logits, and the auxiliary losses of the encoder's sparse layer and of the decoder's."""
    see = source_segment[:, :, None] == source_segment[:, None]
    m, encoder = numpy_stack(cfg, p, "encoder_", p["source_VD"][source] * 4, source_segment, see, None, None)
    memory = norm(m, p["encoder_norm"]["scale_D"])
    see = (segment[:, :, None] == segment[:, None]) & np.tri(L, dtype=bool)
    across = segment[:, :, None] == source_segment[:, None]
    x, decoder = numpy_stack(cfg, p, "decoder_", p["embed_VD"][tokens] * 4, segment, see, memory, across)
    return norm(x, p["decoder_norm"]["scale_D"]) @ p["embed_VD"].T, [encoder, decoder]


def numpy_stack(cfg, p, prefix, x, segment, see, memory, across):
    w = {module: {k: v[0] for k, v in weights.items()} for module, weights in p[f"{prefix}stack_0"].items()}
    bias = t5_bias(p[f"{prefix}bias_PH"], x.shape[1], both=memory is None)
    dense_after_moe = {"up_EDF": w["dense_after_moe_1"]["up_DF"], "down_EFD": w["dense_after_moe_1"]["down_FD"]}
    scaled = lambda what, x: norm(x, w[f"norm_{what}"]["scale_D"])  # noqa: E731
    for i in (0, 1):
        h = scaled(f"attention_{i}", x)
        x = x + numpy_attention(w[f"attention_{i}"], h, h, see, bias)
        if memory is not None:
            x = x + numpy_attention(w[f"cross_{i}"], scaled(f"cross_{i}", x), memory, across, 0)
        h = scaled("ffn_0" if i == 0 else "moe_1", x)
        if i == 0:
            x = x + (gelu(h @ w["ffn_0"]["gate_DF"]) * (h @ w["ffn_0"]["up_DF"])) @ w["ffn_0"]["down_FD"]
        else:
            result = oracle.layer(cfg.moe, w["moe_1"], h, segment > 0)
            x = x + result.y
            x = x + oracle.expert(cfg.dense_after_moe, dense_after_moe, scaled("dense_after_moe_1", x))
    return x, result.aux_loss


def numpy_attention(p, x, memory, see, bias):
    q = np.einsum("bld,dha->bhla", x, p["query_DHA"])
    k, v = (np.einsum("bmd,dja->bjma", memory, p[f"{name}_DJA"]) for name in ("key", "value"))
    scores = np.where(see[:, None], q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + bias, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return np.einsum("bhla,had->bld", y, p["out_HAD"])


def t5_bias(table_PH, L, both):
    """[H, L, L]: as T5 numbers the distances that are near; keys after the query from 16 on (arXiv:1910.10683)."""
    bucket = lambda d: (d if d < 8 else 8) if d >= 0 else 16 + (-d if -d < 8 else 8)  # noqa: E731
    number = [[bucket(l - m) if both else max(l - m, 0) for m in range(L)] for l in range(L)]
    return table_PH[np.array(number)].transpose(2, 0, 1)


def test_what_routers_remember_is_the_encoders_first(params):
    """Biases that send the encoder's tokens to expert 0 and the decoder's to expert 3."""
    moe = dataclasses.replace(MOE, router=LossFree(K=1, normalize=False), dispatch=Scatter(None), losses=())
    cfg = dataclasses.replace(CFG, moe=moe)
    router = cfg.init_router()
    (name,) = router
    assert router[name].shape == (2, 4)
    router = {name: 100 * np.eye(4, dtype=np.float32)[[0, 3]]}
    _, aux, _ = function_of(cfg, params)(SOURCE, TOKENS, np.ones_like(SOURCE), np.ones_like(TOKENS), router)
    assert aux.stats.choices_E.tolist() == [[B * M, 0, 0, 0], [0, 0, 0, B * L]]
    chosen = np.asarray(aux.expert_BLK)[..., 0]
    assert chosen.shape == (2, B, M)
    assert (chosen[0] == 0).all()
    assert (chosen[1, :, :L] == 3).all()
    assert (chosen[1, :, L:] == 4).all(), "no expert: the target is shorter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": MHA(2, 8, position=Relative())}, "Relative\\(shared=True\\)"),
        ({"moe": dataclasses.replace(MOE, dispatch=Scatter(1.0, "choice-major"))}, "token-major"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)


# ---------------------------------------------------------------- a training step


@pytest.fixture(scope="module")
def step():
    """An experiment, and the gradients and losses that one device makes of it."""
    data = DataConfig(objective=SpanCorruption(sentinels=4), L=8, B=8)
    model = dataclasses.replace(
        CFG, V=data.sizes["V"], V_source=None, attention=MHA(2, 8, position=T5), N=1, moe_layers="all", remat="none"
    )
    exp = Experiment(model, data)
    state, batch = meshes.start(exp), samples.sample(exp)
    return exp, state, batch, run(exp, state, batch)


def run(exp, state, batch):
    program = Program(exp, devices=jax.devices()[: exp.devices])
    with jax.set_mesh(program.mesh):
        given = jax.device_put(state, program.shardings), program.to_global(batch)
        return jax.device_get(jax.jit(partial(gradients, exp, program.specs))(*given))


@pytest.mark.law(1)
@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str
)
def test_one_model_every_mesh(step, mesh):
    """Law 1: losses, statistics of the routing with its drops, all gradients."""
    exp, state, batch, (grads, losses) = step
    assert isinstance(batch, Pairs)
    assert 0 < losses.stats.kept.min() < losses.stats.choices_E.sum(-1).max()
    others, same = run(dataclasses.replace(exp, mesh=tuple(mesh.items())), state, batch)
    np.testing.assert_array_equal(losses.stats.kept, same.stats.kept)
    assert meshes.worst(losses, same).error < 1e-5
    assert meshes.worst(grads, others, least=1e-3 * meshes.largest(grads)).error < 1e-5


@pytest.mark.law(9)
def test_it_learns_and_goes_on_where_it_was(tmp_path):
    """Law 9, with spans that are drawn anew: an interrupted run has the same losses; and they fall."""
    data = DataConfig(text_folder(tmp_path / "text"), objective=SpanCorruption(sentinels=4), L=16, B=16)
    model = EncoderDecoderConfig(
        V=data.sizes["V"], D=16, N=1, attention=MHA(2, 8, position=T5), ffn=GLU(F=16), moe_layers="none", remat="none"
    )
    optim = OptimConfig(schedule=Constant(0.02))

    run, mesh = RunConfig(steps=24, log_every=8, eval_every=24, eval_sequences=32, save_every=8), (("data", 8),)
    exp, workdir = Experiment(model, data, optim, run, mesh), tmp_path / "run"
    straight = list(train(exp, workdir, tmp_path))
    shutil.rmtree(workdir / "checkpoints" / "24")  # as if it had ended after step 16
    again = list(train(exp, workdir, tmp_path))
    assert again[0]["step"] == 16
    losses, after = ([r["loss"] for r in records if "loss" in r] for records in (straight, again))
    assert losses[2:] == after, "the last steps, and the evaluation"
    assert losses[0] > 4.2
    assert losses[2] < 3
    assert 0.1 < straight[-2]["accuracy"] < 1
