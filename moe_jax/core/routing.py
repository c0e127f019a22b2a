"""Routing: a router's decision as plain data, and the masks that define it.

The meaning of a routing, at C slots per expert and group, is two dense masks:

    slot_EGCD = dispatch_GSEC . x_GSD        y_GSD = combine_GSEC . experts(slot_EGCD)

Every dispatcher computes the same numbers, faster.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class TokenChoice(NamedTuple):
    """Each token names K experts. Expert id E is the padding id: a padded token, or a choice not taken."""

    expert_GSK: Int[Array, "G S K"]
    weight_GSK: Float[Array, "G S K"]  # combine weights: factors of the expert's output
    logits_GSE: Float[Array, "G S E"]
    probs_GSE: Float[Array, "G S E"]  # distribution that balancing losses use
    mask_GS: Bool[Array, "G S"]  # real tokens
    load_GSE: Float[Array, "G S E"] | None = None  # a smooth estimate of being chosen, where noise gives one
    sums: dict[str, Array] | None = None  # sums over this shard's tokens that a router's state is updated from

    @property
    def E(self) -> int:
        return self.logits_GSE.shape[-1]

    @property
    def assignments_GSE(self) -> Float[Array, "G S E"]:
        """Assignments of each token to each expert."""
        return _scatter_choices(jnp.ones_like(self.weight_GSK), self.expert_GSK, self.E)

    @property
    def top1_GSE(self) -> Float[Array, "G S E"]:
        """First choices of each token, as assignments."""
        return jax.nn.one_hot(self.expert_GSK[..., 0], self.E, dtype=jnp.float32)

    @property
    def combine_GSE(self) -> Float[Array, "G S E"]:
        """The weight of each expert in each token's output."""
        return _scatter_choices(self.weight_GSK, self.expert_GSK, self.E)


class SlotChoice(NamedTuple):
    """Each expert names the tokens of its C slots (expert choice). Token id S is the padding id: an empty slot."""

    token_GEC: Int[Array, "G E C"]
    weight_GEC: Float[Array, "G E C"]
    logits_GSE: Float[Array, "G S E"]
    probs_GSE: Float[Array, "G S E"]
    mask_GS: Bool[Array, "G S"]
    load_GSE: None = None
    sums: dict[str, Array] | None = None

    @property
    def E(self) -> int:
        return self.logits_GSE.shape[-1]

    @property
    def assignments_GSE(self) -> Float[Array, "G S E"]:
        return self._by_token(jnp.ones_like(self.weight_GEC))

    @property
    def top1_GSE(self) -> Float[Array, "G S E"]:
        """All assignments: experts' choices have no order."""
        return self.assignments_GSE

    @property
    def combine_GSE(self) -> Float[Array, "G S E"]:
        return self._by_token(self.weight_GEC)

    def _by_token(self, value_GEC: Float[Array, "G E C"]) -> Float[Array, "G S E"]:
        """Sums the values of slots by token and expert."""
        G, E = (jnp.arange(n) for n in self.token_GEC.shape[:2])
        where = (G[:, None, None], self.token_GEC, E[None, :, None])
        return jnp.zeros_like(self.logits_GSE).at[where].add(value_GEC, mode="drop")


class SoftSlots(NamedTuple):
    """Every slot is a mixture of all tokens, every output a mixture of all slots (Soft MoE)."""

    dispatch_GSEC: Float[Array, "G S E C"]
    combine_GSEC: Float[Array, "G S E C"]
    logits_GSE: Float[Array, "G S E"]
    probs_GSE: Float[Array, "G S E"]
    mask_GS: Bool[Array, "G S"]
    load_GSE: None = None
    sums: dict[str, Array] | None = None

    @property
    def E(self) -> int:
        return self.logits_GSE.shape[-1]

    @property
    def assignments_GSE(self) -> Float[Array, "G S E"]:
        return self.dispatch_GSEC.sum(-1)

    @property
    def top1_GSE(self) -> Float[Array, "G S E"]:
        return self.assignments_GSE

    @property
    def combine_GSE(self) -> Float[Array, "G S E"]:
        return self.combine_GSEC.sum(-1)


Routing = TokenChoice | SlotChoice | SoftSlots


def _scatter_choices(value_GSK, expert_GSK, E):
    """Sums the values of choices by expert."""
    hot = (
        value_GSK[..., k : k + 1] * jax.nn.one_hot(expert_GSK[..., k], E, dtype=value_GSK.dtype)
        for k in range(expert_GSK.shape[-1])
    )
    return sum(hot, jnp.zeros((*expert_GSK.shape[:2], E), value_GSK.dtype))


def token_choice(
    expert_GSK: Int[Array, "G S K"],
    weight_GSK: Float[Array, "G S K"],
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    mask_GS: Bool[Array, "G S"],
    load_GSE: Float[Array, "G S E"] | None = None,
    sums: dict[str, Array] | None = None,
) -> TokenChoice:
    """A routing in which padded tokens have the padding id and weight 0."""
    real_GS1, E = mask_GS[..., None], logits_GSE.shape[-1]
    return TokenChoice(
        jnp.where(real_GS1, expert_GSK, E).astype(jnp.int32),
        jnp.where(real_GS1 & (expert_GSK < E), weight_GSK, 0),
        logits_GSE,
        probs_GSE,
        mask_GS,
        load_GSE,
        sums,
    )


def position_in_expert(routing: TokenChoice, priority: str = "token-major") -> Int[Array, "G S K"]:
    """Position in expert of every choice, per group; S*K for choices of the padding id.

    token-major: tokens in order, each with all its choices; only this one is causal.
    choice-major: all first choices before any second (GShard, arXiv:2006.16668, algorithm 1).
    probability: as choice-major, tokens with a larger largest weight first (V-MoE's batch-prioritised routing,
    arXiv:2106.05974, sec. 4, whose weights are not normalised).
    """
    expert_GSK = routing.expert_GSK
    G, S, K = expert_GSK.shape
    if priority == "token-major":
        position_GSK = _positions(expert_GSK.reshape(G, S * K), routing.E).reshape(G, S, K)
    elif priority == "choice-major":
        position_GSK = _choice_major(expert_GSK, routing.E)
    else:
        order_GS1 = jnp.argsort(-routing.weight_GSK.max(-1), axis=1, stable=True)[..., None]
        position_GSK = _choice_major(jnp.take_along_axis(expert_GSK, order_GS1, axis=1), routing.E)
        position_GSK = jnp.take_along_axis(position_GSK, jnp.argsort(order_GS1, axis=1), axis=1)
    return jnp.where(expert_GSK < routing.E, position_GSK, S * K)


def _choice_major(expert_GSK, E):
    G, S, K = expert_GSK.shape
    return _positions(expert_GSK.swapaxes(1, 2).reshape(G, K * S), E).reshape(G, K, S).swapaxes(1, 2)


def _positions(expert_GR: Int[Array, "G R"], E: int) -> Int[Array, "G R"]:
    """Number of earlier entries that name the same expert: the rank after sorting, less the rank of the first."""
    (G, R), group_G1 = expert_GR.shape, jnp.arange(len(expert_GR))[:, None]
    sorted_GR, order_GR = _sorted(expert_GR, E)
    scan, compare_all = (partial(_first_entries, E=E, method=method) for method in ("scan", "compare_all"))
    first_GE = lax.platform_dependent(sorted_GR, cuda=compare_all, default=scan)  # a scan is slow on a GPU
    rank_GR = jnp.arange(R, dtype=jnp.int32)[None] - first_GE[group_G1, sorted_GR]
    return jnp.zeros((G, R), jnp.int32).at[group_G1, order_GR].set(rank_GR.astype(jnp.int32), unique_indices=True)


def _first_entries(sorted_GR: Int[Array, "G R"], *, E: int, method: str) -> Int[Array, "G _"]:
    """Index of the first entry of each expert id from 0 to E."""
    return jax.vmap(partial(jnp.searchsorted, v=jnp.arange(E + 1, dtype=sorted_GR.dtype), method=method))(sorted_GR)


def _sorted(expert_GR: Int[Array, "G R"], E: int) -> tuple[Int[Array, "G R"], Int[Array, "G R"]]:
    """Experts sorted, and the entries that they come from; stable."""
    R = expert_GR.shape[1]
    entry_GR = jnp.broadcast_to(jnp.arange(R, dtype=expert_GR.dtype)[None], expert_GR.shape)
    if (E + 1) * R > jnp.iinfo(jnp.int32).max:
        sorted_GR, order_GR = lax.sort((expert_GR, entry_GR), num_keys=1)
        return sorted_GR, order_GR
    packed_GR = lax.sort(expert_GR * R + entry_GR)  # one array of distinct keys sorts three times as fast
    return packed_GR // R, packed_GR % R


class Masks(NamedTuple):
    """The definition of a routing at C slots per expert and group."""

    dispatch_GSEC: Float[Array, "G S E C"]
    combine_GSEC: Float[Array, "G S E C"]


def masks(routing: TokenChoice, position_GSK: Int[Array, "G S K"], C: int) -> Masks:
    """Dispatch and combine masks; choices whose position in expert is at least C are dropped."""
    hot_GSKE = jax.nn.one_hot(routing.expert_GSK, routing.E, dtype=jnp.float32)
    hot_GSKC = jax.nn.one_hot(position_GSK, C, dtype=jnp.float32)
    return Masks(
        jnp.einsum("gske,gskc->gsec", hot_GSKE, hot_GSKC),
        jnp.einsum("gsk,gske,gskc->gsec", routing.weight_GSK, hot_GSKE, hot_GSKC),
    )


def slot_masks(routing: SlotChoice) -> Masks:
    """Every slot has the token that it names."""
    hot_GSEC = jax.nn.one_hot(routing.token_GEC, routing.mask_GS.shape[1], axis=1, dtype=jnp.float32)
    return Masks(hot_GSEC, hot_GSEC * routing.weight_GEC[:, None])
