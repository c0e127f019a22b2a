"""What a router decides, as plain data, and what it means.

The meaning of a routing, at a capacity of C slots per expert and group, is two dense masks:

    slot_EGCD = dispatch_GSEC . x_GSD        y_GSD = combine_GSEC . experts(slot_EGCD)

Every dispatcher is a faster way to the same numbers.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PRIORITIES = ("token-major", "choice-major", "probability")


class TokenChoice(NamedTuple):
    """Each token names K experts. Expert id E means "nowhere": padding, or a choice not taken."""

    expert_GSK: Int[Array, "G S K"]
    weight_GSK: Float[Array, "G S K"]  # what the expert's output is multiplied with
    logits_GSE: Float[Array, "G S E"]
    probs_GSE: Float[Array, "G S E"]  # what balancing losses see
    mask_GS: Bool[Array, "G S"]  # real tokens

    @property
    def E(self) -> int:
        return self.logits_GSE.shape[-1]


def token_choice(
    expert_GSK: Int[Array, "G S K"],
    weight_GSK: Float[Array, "G S K"],
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    mask_GS: Bool[Array, "G S"],
) -> TokenChoice:
    """A routing in which padded tokens go nowhere, with no weight."""
    real_GS1, E = mask_GS[..., None], logits_GSE.shape[-1]
    return TokenChoice(
        jnp.where(real_GS1, expert_GSK, E).astype(jnp.int32),
        jnp.where(real_GS1 & (expert_GSK < E), weight_GSK, 0),
        logits_GSE,
        probs_GSE,
        mask_GS,
    )


def capacity(S: int, K: int, E: int, factor: float) -> int:
    """Slots per expert for a group of S tokens with K choices each: ceil(factor * K * S / E), exactly.

    The factor is read as the decimal it is written as, and K is part of the formula (as in V-MoE; in
    Switch's and GShard's formulas a top-2 factor would be twice as large). Never more than S.
    """
    return min(S, math.ceil(Fraction(str(factor)) * K * S / E))


def queue(routing: TokenChoice, priority: str = "token-major") -> Int[Array, "G S K"]:
    """Position of every choice in its expert's queue, per group; S*K for choices that go nowhere.

    token-major: tokens in order, each with all its choices; only this one is causal.
    choice-major: all first choices before any second (GShard, arXiv:2006.16668, algorithm 1).
    probability: as choice-major, tokens with larger first weight first (V-MoE's batch-prioritised routing,
    arXiv:2106.05974, sec. 4).
    """
    expert_GSK = routing.expert_GSK
    G, S, K = expert_GSK.shape
    if priority == "token-major":
        place_GSK = _positions(expert_GSK.reshape(G, S * K), routing.E).reshape(G, S, K)
    elif priority == "choice-major":
        place_GSK = _choice_major(expert_GSK, routing.E)
    else:
        order_GS1 = jnp.argsort(-routing.weight_GSK.max(-1), axis=1, stable=True)[..., None]
        place_GSK = _choice_major(jnp.take_along_axis(expert_GSK, order_GS1, axis=1), routing.E)
        place_GSK = jnp.take_along_axis(place_GSK, jnp.argsort(order_GS1, axis=1), axis=1)
    return jnp.where(expert_GSK < routing.E, place_GSK, S * K)


def _choice_major(expert_GSK, E):
    G, S, K = expert_GSK.shape
    return _positions(expert_GSK.swapaxes(1, 2).reshape(G, K * S), E).reshape(G, K, S).swapaxes(1, 2)


def _positions(expert_GR: Int[Array, "G R"], E: int) -> Int[Array, "G R"]:
    """How many entries before each one name the same expert."""
    hot_GRE = jax.nn.one_hot(expert_GR, E, dtype=jnp.int32)
    return ((jnp.cumsum(hot_GRE, axis=1) - hot_GRE) * hot_GRE).sum(-1)


class Masks(NamedTuple):
    """The definition of a routing at C slots per expert and group."""

    dispatch_GSEC: Float[Array, "G S E C"]
    combine_GSEC: Float[Array, "G S E C"]


def masks(routing: TokenChoice, queue_GSK: Int[Array, "G S K"], C: int) -> Masks:
    """Choices whose place in the queue is at least C are dropped."""
    hot_GSKE = jax.nn.one_hot(routing.expert_GSK, routing.E)
    hot_GSKC = jax.nn.one_hot(queue_GSK, C)
    return Masks(
        jnp.einsum("gske,gskc->gsec", hot_GSKE, hot_GSKC),
        jnp.einsum("gsk,gske,gskc->gsec", routing.weight_GSK, hot_GSKE, hot_GSKC),
    )


class Stats(NamedTuple):
    """Sums over real tokens: added up over shards, batches and steps before anything is divided.

    Layers may be stacked in front.
    """

    tokens: Float[Array, "*N"]
    kept: Float[Array, "*N"]  # choices that reached their expert
    choices_E: Float[Array, "*N E"]  # choices per expert, before any was dropped
    probs_E: Float[Array, "*N E"]
    entropy: Float[Array, "*N"]  # of each token's distribution over experts, nats
    z_squared: Float[Array, "*N"]  # squared log-partition of the router's logits


def stats(routing: TokenChoice, kept_GSK: Bool[Array, "G S K"]) -> Stats:
    """The sums over this shard's tokens."""
    mask_GS1 = routing.mask_GS[..., None].astype(jnp.float32)
    hot_GSKE = jax.nn.one_hot(routing.expert_GSK, routing.E)
    probs_GSE = routing.probs_GSE * mask_GS1
    entropy_GSE = -probs_GSE * jnp.log(jnp.maximum(routing.probs_GSE, 1e-30))
    z_GS1 = jax.nn.logsumexp(routing.logits_GSE, axis=-1, keepdims=True)
    return Stats(
        tokens=mask_GS1.sum(),
        kept=kept_GSK.sum(dtype=jnp.float32),
        choices_E=hot_GSKE.sum((0, 1, 2)),
        probs_E=probs_GSE.sum((0, 1)),
        entropy=entropy_GSE.sum(),
        z_squared=(z_GS1**2 * mask_GS1).sum(),
    )


def describe(s: Stats) -> dict[str, Array]:
    """Metrics of a routing: load (fractions of choices, their spread), drop rate, router entropy in nats."""
    choices = s.choices_E.sum(-1)
    load_E = s.choices_E / jnp.maximum(choices, 1)[..., None]
    relative_E = load_E * load_E.shape[-1]  # 1 where balanced
    return {
        "load": load_E,
        "load_max_over_mean": relative_E.max(-1),
        "load_cv": relative_E.std(-1),
        "dead_experts": (s.choices_E == 0).sum(-1),
        "drop_rate": 1 - s.kept / jnp.maximum(choices, 1),
        "router_entropy": s.entropy / jnp.maximum(s.tokens, 1),
    }


def check_capacity(dispatch) -> None:
    """Refuses a dispatcher whose capacity factor or slot priority makes no sense."""
    name, factor = type(dispatch).__name__, dispatch.capacity_factor
    if factor is not None and not factor > 0:
        raise ValueError(f"{name}(capacity_factor={factor}) leaves no slots; use 1.25, say, or None to drop nothing.")
    if dispatch.priority not in PRIORITIES:
        raise ValueError(f"{name}(priority={dispatch.priority!r}) is unknown; use one of {', '.join(PRIORITIES)}.")
