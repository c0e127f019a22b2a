"""Statistics of a routing: sums over tokens, and the metrics computed from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.routing import Routing


class Stats(NamedTuple):
    """Sums over real tokens: added up over shards, batches and steps before anything is divided.

    Stacked layers are leading axes.
    """

    tokens: Float[Array, "*N"]
    kept: Float[Array, "*N"]  # choices that reached their expert
    choices_E: Float[Array, "*N E"]  # choices per expert, before any was dropped
    top1_E: Float[Array, "*N E"]  # first choices only
    probs_E: Float[Array, "*N E"]
    combine_E: Float[Array, "*N E"]  # combine weights
    load_E: Float[Array, "*N E"]  # a smooth estimate of choices_E, where noise gives one; otherwise choices_E
    entropy: Float[Array, "*N"]  # of each token's distribution over experts, nats
    z_squared: Float[Array, "*N"]  # squared log-partition of the router's logits
    group_balance: Float[Array, "*N"]  # E * sum_e f_e P_e of each routing group, times its tokens
    sequence_balance: Float[Array, "*N"]  # the same of each sequence
    tokens_M: Float[Array, "*N M"]  # by task
    probs_ME: Float[Array, "*N M E"]
    entropy_M: Float[Array, "*N M"]
    # Of every MoE layer of a stack but the first; None where no layer has one before it to compare with.
    agreed: Float[Array, "P"] | None = None  # choices that the MoE layer before has made for the same token
    compared: Float[Array, "P"] | None = None  # choices
    sums: dict[str, Array] | None = None  # sums that the router's state is updated from


def stats(
    routing: Routing, kept: Bool[Array, "G _ _"], B: int, task_GS: Int[Array, "G S"] | None = None, tasks: int = 1
) -> Stats:
    """The sums over this shard's tokens, which are B sequences."""
    mask_GS1 = routing.mask_GS[..., None].astype(jnp.float32)
    probs_GSE = routing.probs_GSE * mask_GS1
    assignments_GSE = routing.assignments_GSE
    entropy_GS = -(probs_GSE * jnp.log(jnp.maximum(routing.probs_GSE, 1e-30))).sum(-1)
    z_GS1 = jax.nn.logsumexp(routing.logits_GSE, axis=-1, keepdims=True)
    load_GSE = assignments_GSE if routing.load_GSE is None else routing.load_GSE * mask_GS1
    task_GS = jnp.zeros(routing.mask_GS.shape, jnp.int32) if task_GS is None else task_GS
    task_GSM = mask_GS1 * jax.nn.one_hot(task_GS, tasks, dtype=jnp.float32)
    return Stats(
        tokens=mask_GS1.sum(),
        kept=kept.sum(dtype=jnp.float32),
        choices_E=assignments_GSE.sum((0, 1)),
        top1_E=routing.top1_GSE.sum((0, 1)),
        probs_E=probs_GSE.sum((0, 1)),
        combine_E=routing.combine_GSE.sum((0, 1)),
        load_E=load_GSE.sum((0, 1)),
        entropy=entropy_GS.sum(),
        z_squared=(z_GS1**2 * mask_GS1).sum(),
        group_balance=_balance(assignments_GSE, probs_GSE, mask_GS1),
        sequence_balance=_balance(*(a.reshape(B, -1, a.shape[-1]) for a in (assignments_GSE, probs_GSE, mask_GS1))),
        tokens_M=task_GSM.sum((0, 1)),
        probs_ME=jnp.einsum("gsm,gse->me", task_GSM, probs_GSE),
        entropy_M=jnp.einsum("gsm,gs->m", task_GSM, entropy_GS),
        sums=routing.sums,
    )


def _balance(assignments_GSE, probs_GSE, mask_GS1):
    """The sum over groups of their tokens times E * sum_e f_e P_e."""
    assignments_GE = assignments_GSE.sum(1)
    f_GE = assignments_GE / jnp.maximum(assignments_GE.sum(-1, keepdims=True), 1)
    return assignments_GE.shape[-1] * (f_GE * probs_GSE.sum(1)).sum()


def entropy(p_E: Float[Array, "*N E"]) -> Float[Array, "*N"]:
    """-sum p log p in nats, 0 log 0 = 0."""
    return -(p_E * jnp.log(jnp.maximum(p_E, 1e-30))).sum(-1)


def ratio(a: Array, b: Array) -> Array:
    """a / b for counts b, 0 / 0 = 0."""
    return a / jnp.maximum(b, 1)


def describe(s: Stats) -> dict[str, Array]:
    """Metrics of a routing; loads are relative to the balanced one where noted, entropies in nats.

    load: fractions of choices. load_percentiles: of load / mean, at 0, 25, 50, 75 and 100 %. load_cv: standard
    deviation / mean. max_violation: (max - mean) / mean (arXiv:2408.15664). agreement: choices that the MoE layer
    before made for the same token, [P] for the layers that have one before them in their stack; absent where nothing
    was compared (by chance: experts per token / E; arXiv:2401.04088, table 5).
    """
    s = jax.tree.map(jnp.asarray, s)  # sums over steps are numpy's
    choices = s.choices_E.sum(-1)
    load_E = ratio(s.choices_E, choices[..., None])
    relative_E = load_E * load_E.shape[-1]  # 1 where balanced
    compared = {} if s.agreed is None or s.compared is None else {"agreement": ratio(s.agreed, s.compared)}
    return {
        "load": load_E,
        "load_percentiles": jnp.moveaxis(jnp.percentile(relative_E, jnp.array([0, 25, 50, 75, 100]), axis=-1), 0, -1),
        "load_max_over_mean": relative_E.max(-1),
        "load_cv": relative_E.std(-1),
        "load_entropy": entropy(load_E),
        "max_violation": relative_E.max(-1) - 1,
        "dead_experts": (s.choices_E == 0).sum(-1, dtype=jnp.int32),
        "drop_rate": ratio(choices - s.kept, choices),
        "active_experts": ratio(choices, s.tokens),
        "router_entropy": ratio(s.entropy, s.tokens),
    } | compared
