"""Golden values of other code bases: oracles/transformers_routers.json, and numbers told elsewhere."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.context import Context
from moe_jax.core.routing import TokenChoice, position_in_expert, token_choice
from moe_jax.core.stats import stats
from moe_jax.losses import Importance, LoadBalance, RouterZ
from moe_jax.routers import LossFree, Switch, Top2, TopK

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "transformers_routers.json").read_text())
BIAS_E = jnp.array(GOLDEN["bias_E"])
LOGITS_NTE = np.array([GOLDEN["logits_TE"], GOLDEN["logits2_TE"]], np.float32)
MASK_T = np.array(GOLDEN["mask_T"], bool)
T, E = LOGITS_NTE.shape[1:]

ALL, SELECTED = TopK(K=2, normalize=False), TopK(K=2)
V3 = functools.partial(LossFree, K=2, score="sigmoid", normalize=True, scale=2.5, best=2, rate=0.0)
V2 = LossFree(K=3, score="softmax", normalize=False, scale=16.0, groups=4, limit=2, best=1, rate=0.0)
# Our router of every entry. Renormalised over all that are chosen: softmax over their logits alone is the same.
ROUTERS = {
    "mixtral": SELECTED,
    "qwen2_moe": SELECTED,
    "qwen2_moe_no_norm": ALL,
    "qwen3_moe": SELECTED,
    "qwen3_moe_no_norm": ALL,
    "olmoe": ALL,
    "deepseek_v3": V3(groups=4, limit=2),
    "deepseek_v3_no_bias": V3(groups=4, limit=2),
    "deepseek_v3_two_groups": V3(groups=2, limit=1),
    "deepseek_v3_one_group": V3(),
    "deepseek_v3_one_group_no_bias": V3(),
    "deepseek_v2_greedy": ALL,
    "deepseek_v2_group_limited": V2,
    "gpt_oss": SELECTED,
    "gpt_oss_bias": SELECTED,  # its logits come through an identity gate: ours have no bias that weighs
    "switch": Switch(),
    "switch_capacity_1": Switch(),
    "switch_capacity_1_two_sequences": Switch(),
    "nllb_moe": Top2("always"),
    "nllb_moe_capacity_1": Top2("always"),
    "nllb_moe_capacity_1_norm_before": Top2("always"),
    "nllb_moe_capacity_1_prioritized": ALL,  # ranks by the probability that is not renormalised
}
# Slot priority where something is dropped. nllb_moe renormalises what was kept, which no router can know.
PRIORITY = {
    "switch_capacity_1": "token-major",
    "switch_capacity_1_two_sequences": "token-major",
    "nllb_moe_capacity_1": "choice-major",
    "nllb_moe_capacity_1_norm_before": "choice-major",
    "nllb_moe_capacity_1_prioritized": "probability",
}
RENORMALISED = ("nllb_moe_capacity_1", "nllb_moe_capacity_1_prioritized")


@functools.cache
def routings():
    """Routings of all entries, [G, S, ...] as `shape_GS` says, and who found one of `capacity` slots: one program."""

    def route(x_TD, gate_DE):
        found = {}
        for name, router in ROUTERS.items():
            entry = GOLDEN["routers"][name]
            shape_GS = tuple(entry.get("shape_GS", (1, T)))
            x, gate = (jnp.array(entry["logits"]), jnp.eye(E)) if "logits" in entry else (x_TD, gate_DE)
            ctx = Context(E, state={"bias_E": BIAS_E if entry["biased"] else jnp.zeros(E)})
            r = router({"gate_DE": gate}, x.reshape(*shape_GS, -1), jnp.ones(shape_GS, bool), ctx)
            found[name] = r, position_in_expert(r, PRIORITY.get(name, "token-major")) < entry.get("capacity", T)
        return found

    return jax.jit(route)(np.array(GOLDEN["x_TD"], np.float32), np.array(GOLDEN["gate_DE"], np.float32))


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_equal_the_reference(name):
    """The same experts, exactly, and the same weights, where nothing is dropped; the same choices dropped elsewhere."""
    entry, (r, kept) = GOLDEN["routers"][name], routings()[name]
    expert, weight, kept = (np.asarray(a).reshape(T, -1) for a in (r.expert_GSK, r.weight_GSK, kept))
    order = np.argsort(-weight, axis=-1, kind="stable")
    expert, weight, kept = (np.take_along_axis(a, order, axis=-1) for a in (expert, weight, kept))
    assert expert.tolist() == entry["expert"]
    assert kept.tolist() == entry.get("kept", np.ones_like(kept).tolist())
    if name.startswith("nllb_moe"):  # its weights are 0 where a choice was dropped
        weight = weight * kept
    if name in RENORMALISED:
        weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-20)
    np.testing.assert_allclose(weight, entry["weight"], rtol=2e-6)


def pooled(router, layers=1, shape_GS=(1, T), masked=False):
    """The sums over the tokens of so many layers."""

    def one(logits_TE):
        mask_GS = jnp.array(MASK_T if masked else np.ones(T, bool)).reshape(shape_GS)
        r = router({"gate_DE": jnp.eye(E)}, logits_TE.reshape(*shape_GS, E), mask_GS, Context(E))
        return stats(r, r.expert_GSK < E, shape_GS[0])

    of_layers = [jax.jit(one)(logits_TE) for logits_TE in LOGITS_NTE[:layers]]
    return jax.tree.map(lambda *sums: sum(sums[1:], sums[0]), *of_layers)


LOSSES = {  # name: loss, router, what differs from one sequence of one layer without padding
    "mixtral_load_balance": (LoadBalance(convention="sum"), SELECTED, {}),
    "mixtral_load_balance_masked": (LoadBalance(convention="sum"), SELECTED, {"masked": True}),
    "mixtral_load_balance_two_layers": (LoadBalance(convention="sum"), SELECTED, {"layers": 2}),
    "mixtral_load_balance_two_layers_masked": (
        LoadBalance(convention="sum"),
        SELECTED,
        {"layers": 2, "masked": True},
    ),
    "switch_load_balance": (LoadBalance(), Switch(), {}),
    "switch_load_balance_two_sequences": (LoadBalance(scope="sequence"), Switch(), {"shape_GS": (2, T // 2)}),
    "switch_router_z": (RouterZ(), Switch(), {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_reference(name):
    """The same value of every loss; groups are sequences where none is longer."""
    (loss, router, how), value = LOSSES[name], GOLDEN["losses"][name]["value"]
    s = pooled(router, **how)
    np.testing.assert_allclose(loss(s, {}, router), value, rtol=2e-6)
    if name == "switch_load_balance_two_sequences":
        np.testing.assert_allclose(LoadBalance(scope="group")(s, {}, router), value, rtol=2e-6)


def test_every_entry_is_used():
    """A new entry of the file needs a line above."""
    assert set(ROUTERS) == set(GOLDEN["routers"])
    assert set(LOSSES) == set(GOLDEN["losses"])
    assert set(PRIORITY) == {n for n, entry in GOLDEN["routers"].items() if not np.all(entry.get("kept", True))}


# ---- Told without a file


VMOE = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]  # vmoe, nn/routing_test.py


def test_losses_of_vmoe():
    """google-research/vmoe, nn/routing_test.py: its load-balancing loss is 1.0875, its importance loss 0.03875.

    They come from arithmetic by hand too: f = (2, 0, 2)/4, P = (.425, .275, .3); sums (1.7, 1.1, 1.2) of mean 4/3.
    """
    probs_GSE = jnp.array(VMOE)[None]
    weight_GSK, expert_GSK = jax.lax.top_k(probs_GSE, 2)  # V-MoE counts first choices only
    r = token_choice(expert_GSK, weight_GSK, jnp.log(probs_GSE + 1e-9), probs_GSE, jnp.ones((1, 4), bool))
    s = jax.jit(stats, static_argnums=2)(r, expert_GSK < 3, 1)
    np.testing.assert_allclose(LoadBalance(convention="first")(s, {}, None), 1.0875, rtol=1e-6)
    np.testing.assert_allclose(Importance(of="probs")(s, {}, None), 0.03875, rtol=1e-5)


@pytest.mark.law(4)
@pytest.mark.parametrize(("priority", "leaks"), [("token-major", False), ("choice-major", True), ("probability", True)])
def test_which_priorities_let_the_future_in(priority, leaks):
    """The last 4 of 12 tokens drawn again change what the first 8 keep, in most of 200 draws, or in none."""
    draws, S, prefix, K, C = 200, 12, 8, 2, 3
    rng = np.random.default_rng(0)
    probs_GSE = rng.dirichlet(np.ones(4), (draws, S)).astype(np.float32)
    again_GSE = probs_GSE.copy()
    again_GSE[:, prefix:] = rng.dirichlet(np.ones(4), (draws, S - prefix))

    @jax.jit
    def kept(probs_GSE):
        weight_GSK, expert_GSK = jax.lax.top_k(probs_GSE, K)
        r = TokenChoice(expert_GSK, weight_GSK, jnp.log(probs_GSE), probs_GSE, jnp.ones((draws, S), bool))
        return position_in_expert(r, priority) < C

    changed = (kept(probs_GSE) != kept(again_GSE))[:, :prefix].any((1, 2)).sum()
    assert (changed > draws / 2) if leaks else (changed == 0)
