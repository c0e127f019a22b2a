"""Experts out of reach, alone or replaced; what a layer sees; the card of an expert; steering tokens to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    MLP,
    CosineTopK,
    ExpertChoice,
    Hash,
    LMConfig,
    LossFree,
    MoE,
    MoEConfig,
    NullExperts,
    Scatter,
    Sort,
    Switch,
    TopK,
    TopP,
)
from moe_jax.attention import MHA
from moe_jax.config import build
from moe_jax.core.context import Context
from moe_jax.data import Batch
from moe_jax.gating.masked import Masked
from moe_jax.inspect import probes
from moe_jax.inspect.card import additions, card, card_text
from moe_jax.inspect.fairness import columns_of_trace
from moe_jax.inspect.knockout import isolate_experts, knock_out, mask_experts, masked_losses, substitute
from moe_jax.inspect.look import trace_layers
from moe_jax.models import Call
from moe_jax.models.lm import LM
from moe_jax.models.pattern import moe_paths
from tests import cases
from tests.cases import normal

V, D, E, B, L = 29, 8, 4, 4, 10
MODEL = LMConfig(
    V=V,
    D=D,
    N=2,
    attention=MHA(2, 4),
    moe_layers="all",
    remat="none",
    moe=MoEConfig(E=E, router=TopK(K=2), experts=MLP(F=6, activation="relu2", bias=True), dispatch=Scatter(1.0)),
)
ROUTERS = (
    *(Switch(), TopK(K=2), TopK(K=2, score="sparsemax"), LossFree(K=2), CosineTopK(K=2, A=3), TopP(p=0.9, K=3)),
    *(NullExperts(K=2, M=3), Hash(K=2), ExpertChoice()),
)


def some_batch(seed: int = 0) -> Batch:
    """Two documents in a row, the last row half padding; two domains."""
    rng, place_L = np.random.default_rng(seed), np.arange(L)
    row = rng.integers(1, V, (B, L + 1)).astype(np.int32)
    segment = np.where(place_L < 4, 1, 2).repeat(B).reshape(L, B).T.astype(np.int32)
    segment[-1, 7:] = 0
    position = np.where(place_L < 4, place_L, place_L - 4).astype(np.int32) + np.zeros((B, 1), np.int32)
    domain = np.array([0, 1, 0, 1], np.int32)
    return Batch(row[:, :-1], row[:, 1:], segment, position, (segment > 0) & (place_L != 3), domain)


BATCH = some_batch()


@pytest.fixture(scope="module")
def params():
    """Twice as large a gate as at the start, so that choices differ."""
    drawn = jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), BATCH))
    bigger = lambda path, a: a + 0.3 * normal(len(str(path)), *a.shape)  # noqa: E731
    return jax.tree.map_with_path(bigger, drawn)


@pytest.fixture(scope="module")
def seen(params):
    return trace_layers(MODEL, params, [BATCH, some_batch(1)])


# ---------------------------------------------------------------- by hand


def by_hand(p, x_BLD, K, shut=(), instead=None):
    """A layer of relu^2 experts with biases, token by token; `instead`: who computes for whom."""
    y = np.zeros_like(x_BLD, dtype=np.float64)
    for b, at in np.ndindex(x_BLD.shape[:2]):
        x = x_BLD[b, at].astype(np.float64)
        logits = np.array([-1e9 if e in shut else x @ p["router_gate_DE"][:, e] for e in range(E)])
        chosen = [e for e in sorted(range(E), key=lambda e: (-logits[e], e))[:K] if e not in shut]
        if not chosen:
            continue
        weight = np.exp(logits[chosen] - logits[chosen].max())
        for w, e in zip(weight / weight.sum(), chosen, strict=True):
            e = (instead or {}).get(e, e)
            h = np.maximum(x @ p["up_EDF"][e] + p["up_EF"][e], 0) ** 2
            y[b, at] += w * (h @ p["down_EFD"][e] + p["down_ED"][e])
    return y


@pytest.fixture(scope="module")
def layer():
    """A layer with a mask, its parameters and its input."""
    cfg = dataclasses.replace(MODEL.moe, dispatch=Scatter(None), gating=(Masked(),))
    x = normal(1, B, L, D)
    p = jax.eval_shape(MoE(cfg).init, jax.random.key(0), jnp.array(x))["params"]
    p = {name: 0.7 * normal(i, *s.shape) for i, (name, s) in enumerate(sorted(p.items()))}
    return jax.jit(lambda p, state: MoE(cfg).apply({"params": p}, jnp.array(x), state=state)), p, x


@pytest.mark.parametrize("gone", [(), (1,), (0, 3), (1, 2, 3), (0, 1, 2, 3)])
def test_a_shut_expert_is_as_if_its_logit_were_minus_infinity(layer, gone):
    """To 1e-6; a token that chooses more than are left goes nowhere with the rest, and without any it gets nothing."""
    run, p, x = layer
    y, aux = run(p, {"masked_E": np.isin(np.arange(E), gone)})
    cases.close(y, by_hand(p, x, 2, gone), rel=1e-6)
    choices = np.asarray(aux.stats.choices_E)
    assert (choices[list(gone)] == 0).all()
    assert choices.sum() == B * L * min(2, E - len(gone))


def test_without_a_mask_nobody_is_shut(layer):
    run, p, x = layer
    cases.close(run(p, {})[0], by_hand(p, x, 2), rel=1e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_every_router_leaves_it_alone(router):
    """In evaluation, however much a bias prefers it."""
    G, S = 2, 6
    gone_E = np.array([False, True, False, False])
    sizes = {"D": D, "E": E, "A": 3, "M": 3}
    shapes = {name: [sizes[letter] for letter in name.rpartition("_")[2]] for name in router.params}
    weights = {name: jnp.array(normal(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    ids = jnp.arange(G * S).reshape(G, S)
    ctx = Context(
        E,
        state={"bias_E": jnp.array(9.0 * gone_E), "masked_E": jnp.array(gone_E)},
        gating=(Masked(),),
        group_G=jnp.arange(G),
        token_GS=ids,
    )
    assignments_GSE = router(weights, jnp.array(normal(9, G, S, D)), jnp.ones((G, S), bool), ctx).assignments_GSE
    assert (assignments_GSE[..., 1] == 0).all()
    assert assignments_GSE.sum() > 0


# ---------------------------------------------------------------- in a model


def without_expert(tree, gone):
    """Parameters of MoE layers without an expert."""
    axis = {"router_gate_DE": 2, "up_EDF": 1, "up_EF": 1, "down_EFD": 1, "down_ED": 1}
    cut = lambda path, a: np.delete(a, gone, axis[path[-1].key]) if path[-1].key in axis else a  # noqa: E731
    return jax.tree.map_with_path(cut, tree)


def test_the_model_without_an_expert(params):
    """Shut in every layer it is as good as deleted: the losses are those of a model that never had it."""
    smaller = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, E=E - 1))
    found = masked_losses(MODEL, params, [BATCH], masked_NE=mask_experts(MODEL, [(0, 2), (1, 2)]))
    expected = masked_losses(smaller, without_expert(params, 2), [BATCH])
    np.testing.assert_allclose(found.by_domain_Z, expected.by_domain_Z, rtol=1e-6)
    whole = masked_losses(MODEL, params, [BATCH])
    assert np.abs(whole.by_domain_Z - found.by_domain_Z).min() > 1e-4
    assert found.targets_Z.sum() == BATCH.loss_mask_BL.sum()


def replayed(params, batch, expert_NBLK):
    """Nats of each target where these choices are made."""
    args = (batch.tokens_BL, batch.segment_BL, batch.position_BL)
    run = jax.jit(lambda p, args, replay: LM(MODEL.dropless()).apply({"params": p}, *args, call=Call(replay=replay)))
    logits, _ = run(params, args, expert_NBLK)
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.target_BL[..., None], -1)[..., 0]
    return nats[batch.loss_mask_BL]


def test_one_layer_alone_is_masked(params):
    """Choices computed by hand, layer 1's after a column of its logits is -1e9, give the same loss when replayed."""
    sums, _ = jax.device_get(probes._trace_batch(MODEL.dropless(), params, {}, BATCH))
    logits_BLE = sums["logits"][1].copy()
    logits_BLE[..., 3] = -1e9
    again = np.stack([sums["expert"][0], np.argsort(-logits_BLE, axis=-1, kind="stable")[..., :2]]).astype(np.int32)
    again[:, BATCH.segment_BL == 0] = E
    found = masked_losses(MODEL, params, [BATCH], masked_NE=mask_experts(MODEL, [(1, 3)]))
    np.testing.assert_allclose(found.mean, replayed(params, BATCH, again).mean(), rtol=1e-6)


def test_all_knock_outs(params):
    """One for each expert, of several batches; the worst of them is the planted one."""
    strong = jax.tree.map(np.copy, params)
    at = moe_paths(MODEL)[1]
    strong[at.stack][at.module]["down_ED"][1, 2] += 4 * normal(5, D)
    batches = [BATCH, some_batch(1)]
    effects = knock_out(MODEL, strong, batches)
    assert effects.expert_P == tuple((n, e) for n in range(2) for e in range(E))
    for p, (n, e) in enumerate(effects.expert_P):
        one = masked_losses(MODEL, strong, batches, masked_NE=mask_experts(MODEL, [(n, e)]))
        np.testing.assert_allclose(effects.rise_P[p], one.mean - effects.base.mean, rtol=1e-9)
        np.testing.assert_allclose(effects.rise_PZ[p], one.by_domain_Z - effects.base.by_domain_Z, rtol=1e-9)
    shares = effects.base.targets_Z / effects.base.targets_Z.sum()
    np.testing.assert_allclose(effects.rise_PZ @ shares, effects.rise_P, atol=1e-9)
    assert np.abs(effects.rise_P).argmax() == effects.expert_P.index((1, 2))


def test_isolated_experts_are_the_only_ones_chosen(params):
    """In the layer nobody else is chosen, in others anybody; isolating all of them changes nothing."""
    np.testing.assert_array_equal(isolate_experts(MODEL, 1, [0, 2]), [[False] * 4, [False, True, False, True]])
    found = masked_losses(MODEL, params, [BATCH], masked_NE=isolate_experts(MODEL, 1, [0, 2]))
    same = masked_losses(MODEL, params, [BATCH], masked_NE=mask_experts(MODEL, [(1, 1), (1, 3)]))
    assert found.mean == same.mean
    every = masked_losses(MODEL, params, [BATCH], masked_NE=isolate_experts(MODEL, 0, range(E)))
    assert every.mean == masked_losses(MODEL, params, [BATCH]).mean


def test_a_substitute_computes_the_choices_of_an_expert(layer, params):
    """Every choice of an expert is computed by another at its own weight; nothing else of the model is touched."""
    run, p, x = layer
    at = moe_paths(MODEL)[1]
    given = {**params, at.stack: {**params[at.stack], at.module: {k: np.stack([w, w]) for k, w in p.items()}}}
    new = substitute(MODEL, given, 1, 2, 0)[at.stack][at.module]
    y, _ = run({name: w[1] for name, w in new.items()}, {})
    cases.close(y, by_hand(p, x, 2, instead={2: 0}), rel=1e-6)
    assert np.abs(y - by_hand(p, x, 2)).max() > 0.1
    for name, w in new.items():
        np.testing.assert_array_equal(w[0], p[name])
        if name != "router_gate_DE":
            np.testing.assert_array_equal(np.delete(w[1], 2, 0), np.delete(p[name], 2, 0))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), given, substitute(MODEL, given, 1, 2, 0))
    assert {path[-1].key for path, c in jax.tree.leaves_with_path(changed) if c} == set(MODEL.moe.experts.params)


def test_what_is_not_there(params):
    dense = dataclasses.replace(MODEL, moe=None, moe_layers="none")
    for call, words in (
        (lambda: mask_experts(MODEL, [(0, 9)]), "no expert 9 in layer 0; it has 4"),
        (lambda: mask_experts(MODEL, [(-1, 0)]), "no MoE layer -1; the model has 2"),
        (lambda: substitute(MODEL, params, 0, 0, 4), "no expert 4"),
        (lambda: masked_losses(dense, params, [BATCH]), "has no MoE layers"),
        (lambda: masked_losses(MODEL, params, []), "no target"),
        (lambda: masked_losses(MODEL, params, [BATCH], domains=1), "of domain 1, but there are domains=1"),
        (lambda: trace_layers(dense, params, [BATCH]), "no language model with MoE layers"),
        (lambda: trace_layers(MODEL, params, []), "no token"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---------------------------------------------------------------- what a model sees


def test_trace_layers(params, seen):
    """The choices, drops and losses that the model itself reports, of real tokens in order."""
    real = BATCH.segment_BL > 0
    run = jax.jit(MODEL.apply)
    logits, aux = run(params, BATCH)
    n = real.sum()
    np.testing.assert_array_equal(seen.expert_NTK[:, :n], np.asarray(aux.expert_BLK)[:, real])
    other = run(params, some_batch(1))[1]
    np.testing.assert_array_equal(seen.kept_NTK.sum((1, 2)), aux.stats.kept + other.stats.kept)
    assert 0 < (~seen.kept_NTK).sum()
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, BATCH.target_BL[..., None], -1)[..., 0]
    nats = np.where(BATCH.loss_mask_BL, nats, np.nan)[real]
    np.testing.assert_allclose(seen.loss_T[:n], nats, rtol=1e-5)
    np.testing.assert_array_equal(seen.token_T[:n], BATCH.tokens_BL[real])
    np.testing.assert_array_equal(np.unique(seen.sequence_T), np.arange(2 * B))
    np.testing.assert_array_equal(seen.domain_T, seen.sequence_T % 2)
    np.testing.assert_allclose(seen.weight_NTK.sum(-1), 1, rtol=1e-5)
    rows = columns_of_trace(seen)
    np.testing.assert_array_equal(rows.expert_TNK[5, 1], seen.expert_NTK[1, 5])
    both = aux.stats.entropy + other.stats.entropy
    np.testing.assert_allclose(rows.entropy_TN.sum(0), both, rtol=1e-5)
    assert rows.E == E


def test_looking_at_a_dropless_layer(params):
    """Where groups are free and a router remembers something."""
    moe = dataclasses.replace(MODEL.moe, router=LossFree(K=2), dispatch=Sort(), S=5)
    model = dataclasses.replace(MODEL, moe=moe)
    router = {"bias_E": np.array([[0, 0, 0, 5.0], [5.0, 0, 0, 0]], np.float32)}
    seen = trace_layers(model, params, [BATCH], router)
    assert seen.kept_NTK.all()
    assert (seen.expert_NTK[0] == 3).any(-1).all()
    assert (seen.expert_NTK[1] == 0).any(-1).all()


# ---------------------------------------------------------------- cards


def test_a_card_equals_plain_loops(params, seen):
    """Against plain loops."""
    effects = knock_out(MODEL, params, [BATCH], experts=[(1, 2)])
    found, E_, n, e = card(MODEL, params, seen, 1, 2, effects), E, 1, 2
    rows = [(t, k) for t, k in np.ndindex(seen.expert_NTK.shape[1:]) if seen.expert_NTK[n, t, k] == e]
    kept = [(t, k) for t, k in rows if seen.kept_NTK[n, t, k]]
    assert found.choices == len(rows)
    assert found.load == pytest.approx(len(rows) * E_ / seen.expert_NTK[n].size)
    assert found.drop_rate == pytest.approx(1 - len(kept) / len(rows))
    assert found.weight == pytest.approx(np.mean([seen.weight_NTK[n, t, k] for t, k in kept]))
    for share in found.domains:
        of = [t for t, _ in rows if seen.domain_T[t] == share.what]
        assert (share.n, share.share) == (len(of), pytest.approx(len(of) / len(rows)))
        assert share.lift == pytest.approx(share.share / np.mean(seen.domain_T == share.what))
    counts = {v: sum(seen.token_T[t] == v for t, _ in rows) for v in range(V)}
    assert found.tokens[0].n == max(counts.values()) == counts[found.tokens[0].what]
    at = moe_paths(MODEL)[n]
    p = {name: w[at.repeat][e].astype(np.float64) for name, w in params[at.stack][at.module].items() if name[0] != "r"}
    added = [
        seen.weight_NTK[n, t, k]
        * (np.maximum(seen.input_NTD[n, t] @ p["up_EDF"] + p["up_EF"], 0) ** 2 @ p["down_EFD"] + p["down_ED"])
        for t, k in kept
    ]
    np.testing.assert_allclose(additions(MODEL, params, seen, n, e), added, atol=1e-5)
    assert found.writes == pytest.approx(np.mean([np.sqrt((a**2).sum()) for a in added]), rel=1e-5)
    logits = (np.mean(added, 0) * params["norm"]["scale_D"]) @ params["embed_VD"].T
    assert [v for v, _ in found.promotes] == sorted(range(V), key=lambda v: -logits[v])[:8]
    assert (found.rise, found.rise_by_domain) == (effects.rise_P[0], tuple(effects.rise_PZ[0]))
    words = card_text(found, ("prose", "code"), decode=lambda v: f"<{v}>")
    assert f"'<{found.promotes[0][0]}>'" in words
    assert f"{found.rise:+.4f} nats; prose " in words


def test_planted_expert(params, seen):
    """An expert that always writes a token's embedding promotes that token."""
    planted = jax.tree.map(np.copy, params)
    at = moe_paths(MODEL)[0]
    planted[at.stack][at.module]["down_EFD"][0, 1] = 0
    planted[at.stack][at.module]["down_ED"][0, 1] = 3 * planted["embed_VD"][7] / planted["norm"]["scale_D"]
    found = card(MODEL, planted, seen, 0, 1)
    lengths = np.linalg.norm(planted["embed_VD"], axis=1)
    planted["embed_VD"] /= lengths[:, None]
    assert card(MODEL, planted, seen, 0, 1).promotes[0][0] == 7
    length = np.linalg.norm(planted[at.stack][at.module]["down_ED"][0, 1])
    assert found.writes == pytest.approx(found.weight * length, rel=1e-5)
    assert found.rise is None


def test_a_dead_expert_has_a_card(params, seen):
    dead = seen._replace(expert_NTK=np.where(seen.expert_NTK == 3, 0, seen.expert_NTK))
    found = card(MODEL, params, dead, 0, 3)
    assert (found.choices, found.load, found.domains, found.promotes) == (0, 0, (), ())
    assert (found.drop_rate, found.weight, found.writes) == (None, None, None)  # of no choices
    assert "serves   no token" in card_text(found)
    assert "dropped" not in card_text(found)


# ---------------------------------------------------------------- steering


STEERED = dataclasses.replace(MODEL.moe, router=TopK(K=1, normalize=False), dispatch=Scatter(None))
WIDE = dataclasses.replace(MODEL, N=1, moe=STEERED)


@pytest.fixture(scope="module")
def steered():
    """A small model with one MoE layer behind attention, its batch, and targets."""
    batch = BATCH._replace(segment_BL=np.ones_like(BATCH.segment_BL), position_BL=np.arange(L) + 0 * BATCH.position_BL)
    params = jax.tree.map(np.array, jax.jit(WIDE.init)(jax.random.key(3), batch))
    params["stack_0"]["attention_0"]["out_HAD"] *= 3  # earlier tokens matter
    return params, batch, probes.targets(WIDE, params, batch, 0, 12, least=4)


def test_the_gradient_is_that_of_each_position(steered):
    """Against differences of the margin when the table's row is moved, of a token that is there once."""
    params, batch, _ = steered
    one = jax.tree.map(lambda a: a[:1], batch)
    tokens = np.arange(1, L + 1, dtype=np.int32)
    slope_LD = probes._slopes(WIDE, 0, params, {}, one, tokens, 6, 2)
    assert (np.asarray(slope_LD)[7:] == 0).all()  # the future
    for at, d in ((0, 1), (4, 3), (6, 0)):
        margin = []
        for step in (-1e-2, 1e-2):
            table = params["embed_VD"].copy()
            table[tokens[at], d] += step
            given = one._replace(tokens_BL=tokens[None])
            margin.append(float(probes._margins(WIDE, 0, {**params, "embed_VD": table}, {}, given, 6, 2)[0][0]))
        np.testing.assert_allclose(slope_LD[at, d], (margin[1] - margin[0]) / 2e-2, rtol=0.02, atol=1e-4)


def test_a_probe_reaches_what_it_reports(steered):
    """Reported results hold when the model is run; the gradient finds more than chance with as many tries."""
    params, batch, goals = steered
    reports = {
        guided: probes.probe(WIDE, params, batch, goals, probes.Search(window=4, budget=3, tries=4, guided=guided))
        for guided in (True, False)
    }
    for report in reports.values():
        for attempt in report.attempts:
            row, at, layer, expert = attempt.target
            original = batch.tokens_BL[row]
            moved = np.flatnonzero(attempt.tokens_L != original)
            assert len(moved) == attempt.substitutions <= 3
            assert ((moved >= at - 4) & (moved < at)).all()
            given = batch._replace(tokens_BL=np.tile(attempt.tokens_L, (B, 1)))
            chosen = jax.device_get(probes._trace_batch(WIDE, params, {}, given))[0]["expert"][layer, 0, at]
            assert attempt.succeeded == (expert in chosen)
            assert attempt.succeeded == (attempt.margin > 0)
    guided, random = reports[True], reports[False]
    assert guided.success_rate > random.success_rate
    needed = [a.substitutions for a in guided.attempts if a.succeeded]
    assert guided.mean_substitutions == np.mean(needed)
    assert guided.success_rate == len(needed) / len(goals)


def test_targets_are_to_be_reached(steered):
    """A target's expert is not chosen yet, and enough is before it."""
    params, batch, goals = steered
    chosen = jax.device_get(probes._trace_batch(WIDE, params, {}, batch))[0]["expert"]
    assert all(g.expert not in chosen[0, g.row, g.position] and g.position >= 4 for g in goals)
    with pytest.raises(ValueError, match="may change nothing"):
        probes.Search(window=0)
    hashed = dataclasses.replace(WIDE, moe=dataclasses.replace(WIDE.moe, router=Hash(K=1)))
    with pytest.raises(ValueError, match="does not route by what it sees"):
        probes.targets(hashed, params, batch, 0, 1)
    with pytest.raises(ValueError, match="no target to steer"):
        probes.probe(WIDE, params, batch, [])


LYING = (("LM", "0,1,3", 4), ("LM", "every 2", 4), ("EncoderDecoder", "last 2", 3), ("ViT", "all", 2))


@pytest.mark.parametrize(("kind", "moe_layers", "N"), LYING)
def test_where_layers_lie(kind, moe_layers, N):
    """Every place is a MoE layer's, none is left out or named twice, and an expert is replaced in one of them alone."""
    data = {
        "LM": {"source": "Folder(path='.')"},
        "EncoderDecoder": {"source": "ToyTranslation()", "objective": "Translation()"},
        "ViT": {"source": "Digits()", "objective": "Classification()", "L": 1},
    }[kind]
    moe = {"E": 3, "router": "TopK(K=2)", "experts": "MLP(F=4)"}
    model = {
        "kind": kind,
        "D": 8,
        "N": N,
        "attention": "MHA(2, 4, position=NoPE(), bias=True)",
        "ffn": "MLP(F=4)",
        "moe_layers": moe_layers,
        "moe": moe,
    }
    exp = build({"model": {**model, **({"patch": 2} if kind == "ViT" else {})}, "data": data})
    zeros = lambda tree: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tree)  # noqa: E731
    params = zeros(jax.eval_shape(exp.model.init, jax.random.key(0), zeros(exp.data.shapes(1))))
    found = moe_paths(exp.model)
    assert len(set(found)) == len(found) == exp.model.n_moe_layers
    layers = {
        (path[0].key, path[1].key, n)
        for path, a in jax.tree.leaves_with_path(params)
        if path[-1].key == "router_gate_DE"
        for n in range(len(a))
    }
    assert layers == {tuple(at) for at in found}
    for number, at in enumerate(found):  # in the order that they are computed in
        params[at.stack][at.module]["up_EDF"][at.repeat, 1] = number + 1
    one = substitute(exp.model, params, len(found) - 1, 0, 1)
    changed = [number for number, at in enumerate(found) if one[at.stack][at.module]["up_EDF"][at.repeat, 0].any()]
    assert changed == [len(found) - 1]
