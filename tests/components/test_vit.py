"""The vision transformer: its formula in numpy, the published sizes, slots for the surest tokens, every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import MHA, NoPE
from moe_jax.audit import meshes
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.data import Classification, Digits, Images
from moe_jax.dispatch import Scatter
from moe_jax.experts import MLP
from moe_jax.losses import Importance, Load
from moe_jax.models import ViTConfig
from moe_jax.models.vit import patches
from moe_jax.moe import MoE, MoEConfig
from moe_jax.optim import AdamW, Constant
from moe_jax.routers import NoisyTopK, TaskTopK
from tests import oracle

MOE = MoEConfig(
    E=4,
    router=NoisyTopK(K=2, learned=False, normalize=False),
    experts=MLP(F=6, bias=True),
    dispatch=Scatter(0.5, "probability"),
    losses=(Importance(0.5, "probs"), Load(0.5)),
    S=20,  # four images
)
SHAPE = {"patch": 2, "image": (4, 4, 3), "representation": True, "remat": "none"}
CFG = ViTConfig(
    V=7, D=8, N=2, attention=MHA(2, 4, position=NoPE(), bias=True), ffn=MLP(F=10, bias=True), moe=MOE, **SHAPE
)
B = 8


def random_batch(cfg, rows: int, padded: int = 0) -> Images:
    """Noise, with padding at the end, which is noise too."""
    rng = np.random.default_rng(0)
    real = np.arange(rows)[:, None] < rows - padded
    image = rng.normal(size=(rows, *cfg.image)).astype(np.float32)
    return Images(image, rng.integers(cfg.V, size=(rows, 1)).astype(np.int32), real, np.zeros(rows, np.int32))


BATCH = jax.tree.map(jnp.asarray, random_batch(CFG, B))


@pytest.fixture(scope="module")
def params():
    """No bias zero, no scale one; experts are chosen unevenly."""
    tree, rng = jax.device_get(jax.jit(CFG.init)(jax.random.key(0), BATCH)), np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda cfg, params, batch: cfg.apply(params, batch), static_argnums=0)


# ---------------------------------------------------------------- its formula


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale_D"] + p["bias_D"]


def attention(p, x):
    """Attention of every token to every token, [B, L, D]."""
    q, k, v = (
        np.einsum("bld,dha->bhla", x, p[f"{n}_DHA"]) + p[f"{n}_HA"][None, :, None] for n in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("bhla,had->bld", weights @ v, p["out_HAD"]) + p["out_D"]


def forward(cfg, params, batch):
    """Logits [B, V] of a model of (dense, sparse), and the oracle's result of its MoE layer, in float64."""
    params, batch = jax.tree.map(lambda a: np.asarray(a, np.float64), params), jax.device_get(batch)
    layer = jax.tree.map(lambda a: a[0], params["stack_0"])
    layer |= {f"attention_{i}": renamed(layer[f"attention_{i}"]) for i in (0, 1)}
    rows, (Y, X, _), P = len(batch.image_BYXC), cfg.image, cfg.patch
    tokens = [np.broadcast_to(params["class_D"], (rows, cfg.D))]
    for y in range(0, Y, P):
        for x in range(0, X, P):
            pixels = batch.image_BYXC[:, y : y + P, x : x + P].reshape(rows, -1)
            tokens.append(pixels @ params["patch_ID"] + params["patch_D"])
    x = np.stack(tokens, 1) + params["position_LD"]
    x = x + attention(layer["attention_0"], norm(x, layer["norm_attention_0"]))
    h, ffn = norm(x, layer["norm_ffn_0"]), layer["ffn_0"]
    x = x + oracle.ACTIVATION["gelu"](h @ ffn["up_DF"] + ffn["up_F"]) @ ffn["down_FD"] + ffn["down_D"]
    x = x + attention(layer["attention_1"], norm(x, layer["norm_attention_1"]))
    real = np.repeat(batch.loss_mask_BL, cfg.L, axis=1)
    moe = oracle.layer(cfg.moe, layer["moe_1"], norm(x, layer["norm_moe_1"]), real)
    x = norm(x + moe.y, params["norm"])[:, 0]
    x = np.tanh(x @ params["representation_DO"] + params["representation_D"])
    return x @ params["head_DV"] + params["head_V"], moe


def renamed(attention):
    """With the letter of query heads for all heads: there are as many."""
    return {name.replace("J", "H"): value for name, value in attention.items()}


@pytest.mark.parametrize("priority", ["probability", "token-major"])
def test_the_model_is_its_formula(params, apply, priority):
    """Patches, class token, positions, layer norms and attention with biases, experts, representation, head."""
    cfg = dataclasses.replace(CFG, moe=dataclasses.replace(MOE, dispatch=Scatter(0.5, priority)))
    logits_BV, moe = forward(cfg, params, BATCH)
    logits_BLV, aux = apply(cfg, params, BATCH)
    np.testing.assert_allclose(logits_BLV[:, 0], logits_BV, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux.loss, [moe.aux_loss], rtol=1e-4)
    assert aux.stats.kept.tolist() == [moe.stats["kept"]]
    assert 0.1 * moe.stats["choices_E"].sum() < moe.stats["kept"] < 0.9 * moe.stats["choices_E"].sum()


def test_patches_are_squares_row_by_row():
    image = np.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    cut = patches(jnp.asarray(image, jnp.float32), 2)
    assert cut[0].astype(int).tolist()[:4] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19]]
    assert cut[1, 0].astype(int).tolist() == [24, 25, 30, 31]


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = jax.eval_shape(cfg.init, jax.random.key(0), BATCH)
    logits_BLV, _ = jax.eval_shape(cfg.apply, params, BATCH)
    assert (logits_BLV.shape, logits_BLV.dtype) == ((B, 1, CFG.V), jnp.float32)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# ---------------------------------------------------------------- slots for the surest tokens


def test_with_half_the_slots_the_surest_tokens_keep_theirs(params):
    """Batch-prioritised routing: of an expert's first choices, those with the largest gates (arXiv:2106.05974)."""
    x_BLD = jnp.asarray(np.random.default_rng(1).normal(size=(B, CFG.L, CFG.D)), jnp.float32)
    own = jax.tree.map(lambda a: a[0], params["stack_0"]["moe_1"])
    _, aux = MoE(MOE).apply({"params": own}, x_BLD, record=("weight", "kept"))
    given = (aux.expert_BLK, aux.recorded.weight_BLK, aux.recorded.kept_BLK)
    expert_GSK, weight_GSK, kept_GSK = (np.asarray(a).reshape(2, -1, a.shape[-1]) for a in given)
    gate_GS, crowded = weight_GSK.max(-1), 0
    for g, e in np.ndindex(2, MOE.E):
        asked_S = expert_GSK[g, :, 0] == e
        kept, lost = (gate_GS[g][asked_S & (kept_GSK[g, :, 0] == mine)] for mine in (True, False))
        if len(lost):
            crowded += 1
            assert len(kept) == 5  # 0.5 * 2 choices * 20 tokens / 4 experts
            assert kept.min() > lost.max()
    assert crowded >= 2


@pytest.mark.parametrize(("priority", "same"), [("probability", True), ("token-major", False)])
def test_who_keeps_its_slot_depends_on_the_order_of_images_only_where_tokens_queue(params, apply, priority, same):
    cfg = dataclasses.replace(CFG, moe=dataclasses.replace(MOE, dispatch=Scatter(0.5, priority)))
    order = [2, 0, 3, 1, 7, 6, 4, 5]  # inside groups of four
    logits, aux = apply(cfg, params, BATCH)
    moved, _ = apply(cfg, params, jax.tree.map(lambda a: a[np.array(order)], BATCH))
    assert aux.metrics["drop_rate"].min() > 0.3
    assert np.allclose(moved, logits[np.array(order)], atol=1e-5) == same


# ---------------------------------------------------------------- published sizes


@pytest.mark.law(10)
@pytest.mark.parametrize(
    ("D", "N", "F", "H", "patch", "total"),
    [(768, 12, 3072, 12, 16, 978_974_835), (1280, 32, 5120, 16, 14, 7_160_836_211)],
    ids=["V-MoE-B/16", "V-MoE-H/14"],
)
def test_published_models_have_their_sizes(D, N, F, H, patch, total):
    """Every second layer with 32 experts, biases in them and none in the router, 18,291 classes (arXiv:2106.05974)."""
    moe = dataclasses.replace(MOE, E=32, experts=MLP(F, bias=True), S=None)
    heads = MHA(H, D // H, position=NoPE(), bias=True)
    sizes = {"V": 18_291, "D": D, "N": N, "attention": heads, "ffn": MLP(F, bias=True), "patch": patch}
    cfg = ViTConfig(**sizes, moe=moe, representation=True)
    params = jax.eval_shape(cfg.init, jax.random.key(0), random_batch(cfg, 1))
    assert sum(p.size for p in jax.tree.leaves(params)) == total


# ---------------------------------------------------------------- on a mesh


EXP = Experiment(
    model=dataclasses.replace(CFG, V=Digits.V, image=Digits.image, patch=4, moe=dataclasses.replace(MOE, E=8, S=10)),
    data=DataConfig(Digits(), objective=Classification(), L=1, B=16),
    optim=OptimConfig(AdamW(), Constant(0.01)),
    run=RunConfig(steps=2),
)
DIGITS = random_batch(EXP.model, 16, padded=3)


@pytest.fixture(scope="module")
def start():
    state = meshes.start(EXP)
    return state._replace(params=jax.tree.map(lambda p: p + 0.1 * np.float32(np.sin(p * 99)), state.params))


@pytest.fixture(scope="module")
def trial():
    return meshes.Trial(EXP, jax.devices()[:1])


@pytest.fixture(scope="module")
def one(trial, start):
    return jax.device_get(trial(start, DIGITS))


@pytest.mark.law(1)
@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=["d8", "d2e4", "f2e2t2"]
)
def test_one_model_every_mesh(mesh, start, one, monkeypatch):
    """Law 1: logits, losses, drops, gradients, one step and its evaluation; with the router's noise."""
    monkeypatch.setattr(meshes, "CLOSE", 2e-5)  # positions have gradients of all images, which nearly cancel
    exp = dataclasses.replace(EXP, mesh=tuple(mesh.items()))
    many = meshes.run_on(exp, start, DIGITS, jax.devices())
    found = meshes.compare_with_one_device(one, many, start)
    assert [f"{name} {verdict.detail}" for name, verdict in found.items() if not verdict.holds] == []
    assert one.metrics.stats.kept.sum() < one.metrics.stats.choices_E.sum()


@pytest.mark.law(7)
def test_padding_images_are_nowhere(trial, start, one):
    """Law 7: what they hold changes no loss, count, gradient or parameter, bit for bit."""
    real_B = DIGITS.loss_mask_BL[:, 0]
    image = np.where(real_B[:, None, None, None], DIGITS.image_BYXC, 9 - DIGITS.image_BYXC)
    target = np.where(DIGITS.loss_mask_BL, DIGITS.target_BL, 0)
    other = jax.device_get(trial(start, DIGITS._replace(image_BYXC=image, target_BL=target)))
    mine, theirs = (seen._replace(logits_BLV=seen.logits_BLV[real_B]) for seen in (one, other))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert (one.logits_BLV[~real_B] != other.logits_BLV[~real_B]).any()
    assert one.metrics.targets == one.evaluated.targets_Z.sum() == 13
    assert one.metrics.stats.tokens.tolist() == [13 * EXP.model.L]
    assert (one.expert_NBLK[:, ~real_B] == EXP.model.moe.E).all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, r"Patches of 3 do not cut 4 x 4 images evenly"),
        ({"image": (4, 4)}, "height, width and channels"),
        ({"causal": True}, "causal=False"),
        ({"attention": MHA(2, 4, position=NoPE(), window=2)}, "no order"),
        ({"attention": MHA(2, 4)}, "must have position=NoPE"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)


def test_a_router_by_task_is_given_the_domain_of_an_image():
    moe = dataclasses.replace(MOE, router=TaskTopK(K=2, M=2), losses=())
    cfg = dataclasses.replace(CFG, moe=moe)
    tree = jax.jit(cfg.init)(jax.random.key(0), BATCH)
    run = jax.jit(lambda domain_B: cfg.apply(tree, BATCH._replace(domain_B=domain_B))[1].expert_BLK)
    zeros, ones = (run(jnp.full(B, task, jnp.int32)) for task in (0, 1))
    assert (zeros != ones).any()
