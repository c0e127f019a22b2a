"""Adversarial search: steers a token to an expert by changing the tokens before it.

The guided search is HotFlip's (arXiv:1712.06751): the gradient of the goal by the embedding at a position estimates, to
first order, the effect of every substitution there; the best few are tried, the best of these is kept, and so on. The
baseline tries as many random substitutions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.inspect.look import check_language_model, trace_batch
from moe_jax.models.pattern import check_expert
from moe_jax.moe import MoEConfig


@dataclasses.dataclass(frozen=True)
class Search:
    """Limits of a search: what may be changed, and how many attempts are made.

    window: positions before the token, of its own document, whose tokens may be changed. itself: the token too.
    budget: substitutions at most. tries: candidates evaluated for each.
    guided: candidates by gradient, or at random.
    """

    window: int = 8
    itself: bool = False
    budget: int = 4
    tries: int = 16
    guided: bool = True

    def __post_init__(self):
        for name in ("budget", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"Search({name}={getattr(self, name)}) tries nothing; give at least 1.")
        if self.window < (0 if self.itself else 1):
            raise ValueError(f"Search(window={self.window}) may change nothing; give a window of at least 1.")


class Target(NamedTuple):
    """A token of a batch, and where it is to be steered."""

    row: int
    position: int
    layer: int
    expert: int


class Attempt(NamedTuple):
    """Result of a search: the tokens it ended with, and the number of substitutions."""

    target: Target
    succeeded: bool
    substitutions: int
    margin: float  # final logit of the expert less the K-th largest of the others
    tokens_L: Int[np.ndarray, "L"]


class Report(NamedTuple):
    """Summary of several attempts: success rate, and mean number of substitutions (NaN: none succeeded)."""

    attempts: tuple[Attempt, ...]

    @property
    def success_rate(self) -> float:
        return float(np.mean([a.succeeded for a in self.attempts]))

    @property
    def mean_substitutions(self) -> float:
        needed = [a.substitutions for a in self.attempts if a.succeeded]
        return float(np.mean(needed)) if needed else float("nan")


def targets(
    model: Any,
    params: Any,
    batch: Any,
    layer: int,
    n: int,
    router: Mapping[str, Any] | None = None,
    seed: int = 0,
    least: int = 1,
) -> list[Target]:
    """Draws n random tokens, each with a random expert that it does not choose.

    At least `least` tokens of their document precede them. ValueError where there is no such token.
    """
    check_probed_model(model, layer, 0)
    rng = np.random.default_rng(seed)
    traced, _ = jax.device_get(_trace_batch(model, params, dict(router or {}), batch))
    may_BL = (np.asarray(batch.segment_BL) > 0) & (np.asarray(batch.position_BL) >= least)
    positions = np.argwhere(may_BL)
    if not len(positions):
        raise ValueError(f"No token of the batch has {least} before it in its document; give longer documents.")
    found = []
    for b, at in positions[rng.choice(len(positions), n, replace=len(positions) < n)]:
        free = np.setdiff1d(np.arange(model.moe.E), traced["expert"][layer, b, at])
        if len(free):
            found.append(Target(int(b), int(at), layer, int(rng.choice(free))))
    if not found:
        raise ValueError("Every token chooses every expert, so that there is nowhere to steer it to.")
    return found


def probe(
    model: Any,
    params: Any,
    batch: Any,
    goals: Sequence[Target],
    search: Search = Search(),
    router: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Report:
    """Tries to steer every target, one after another, in evaluation on one device with nothing dropped."""
    for goal in goals:
        check_probed_model(model, goal.layer, goal.expert)
    if not goals:
        raise ValueError("There is no target to steer; `targets` finds some.")
    free, state, rng = model.dropless(), dict(router or {}), np.random.default_rng(seed)
    return Report(tuple(_attempt(free, params, state, batch, goal, search, rng) for goal in goals))


def check_probed_model(model: Any, layer: int, expert: int) -> None:
    """Refuses a model whose routing does not follow from embeddings."""
    check_language_model(model)
    check_expert(model, layer, expert)
    if not model.moe.router.params or "token" in model.moe.traits.needs:
        raise ValueError(f"{model.moe.router} does not route by what it sees, so that no gradient leads anywhere.")


def _attempt(model, params, state, batch, goal: Target, search: Search, rng: np.random.Generator) -> Attempt:
    one = jax.tree.map(lambda a: np.asarray(a)[goal.row : goal.row + 1], batch)
    tokens_L, positions = one.tokens_BL[0].copy(), editable_positions(one, goal, search)
    value = partial(_values, model, params, state, one, goal)
    (margin,), (done,) = value(tokens_L[None])
    original_L, changed = tokens_L, 0
    while not done and changed < search.budget and len(positions):
        suggest = _guided if search.guided else _random
        candidates_CL = suggest(model, params, state, one, goal, tokens_L, positions, search.tries, rng)
        margin_C, done_C = value(candidates_CL)
        best = int(np.argmax(np.where(done_C, np.inf, margin_C)))
        if not done_C[best] and margin_C[best] <= margin:
            if search.guided:  # the same gradient would suggest the same candidates again
                break
            changed += 1  # a draw without gain counts too
            continue
        tokens_L, margin, done, changed = candidates_CL[best], margin_C[best], done_C[best], changed + 1
    return Attempt(goal, bool(done), int((tokens_L != original_L).sum()), float(margin), tokens_L)


def editable_positions(one: Any, goal: Target, search: Search) -> Int[np.ndarray, "W"]:
    """Positions whose tokens may be changed: before the target, in its document."""
    at, segment_L = goal.position, one.segment_BL[0]
    position_W = np.arange(max(0, at - search.window), at + int(search.itself))
    return position_W[segment_L[position_W] == segment_L[at]]


def _random(model, params, state, one, goal, tokens_L, positions, tries, rng) -> Int[np.ndarray, "C L"]:
    """Draws random substitutions, each of one token."""
    candidates_CL = np.repeat(tokens_L[None], tries, axis=0)
    where_C = rng.choice(positions, tries)
    shift_C = rng.integers(1, model.V, tries)  # never the same token
    candidates_CL[np.arange(tries), where_C] = (tokens_L[where_C] + shift_C) % model.V
    return candidates_CL


def _guided(model, params, state, one, goal, tokens_L, positions, tries, rng) -> Int[np.ndarray, "C L"]:
    """Chooses the substitutions with the largest first-order gain, gradient . (new embedding - old embedding)."""
    slope_LD = np.asarray(_slopes(model, goal.layer, params, state, one, tokens_L, goal.position, goal.expert))
    embed_VD = np.asarray(params["embed_VD"], np.float64)
    gain_WV = slope_LD[positions] @ embed_VD.T
    gain_WV -= gain_WV[np.arange(len(positions)), tokens_L[positions]][:, None]
    gain_WV[np.arange(len(positions)), tokens_L[positions]] = -np.inf
    order = np.argsort(-gain_WV, axis=None, kind="stable")[:tries]
    order = np.pad(order, (0, tries - len(order)), mode="edge")  # a constant number, so that nothing is compiled again
    w_C, v_C = np.unravel_index(order, gain_WV.shape)
    candidates_CL = np.repeat(tokens_L[None], tries, axis=0)
    candidates_CL[np.arange(tries), positions[w_C]] = v_C
    return candidates_CL


# ---------------------------------------------------------------- margins and their gradients


_trace_batch: Callable = jax.jit(trace_batch, static_argnums=0)


def _values(model, params, state, one, goal, tokens_CL) -> tuple[Float[np.ndarray, "C"], Bool[np.ndarray, "C"]]:
    """The margin of the goal in each of these sequences, and whether it is reached."""
    C = len(tokens_CL)
    batch = jax.tree.map(lambda a: np.repeat(a, C, axis=0), one)._replace(tokens_BL=tokens_CL.astype(np.int32))
    out = _margins(model, goal.layer, params, state, batch, goal.position, goal.expert)
    margin_C, done_C = (np.asarray(a) for a in out)
    return margin_C, done_C


@partial(jax.jit, static_argnums=(0, 1))
def _margins(model, layer, params, state, batch, position, expert) -> tuple[Array, Array]:
    traced, _ = trace_batch(model, params, state, batch)
    chosen_BK = traced["expert"][layer, :, position]
    return target_margins(traced["logits"][layer, :, position], expert, model.moe), (chosen_BK == expert).any(-1)


@partial(jax.jit, static_argnums=(0, 1))
def _slopes(model, layer, params, state, one, tokens_L, position, expert) -> Float[Array, "L D"]:
    """The gradient of the margin by the embedding at each position.

    Each position gets a vocabulary entry of its own, with the embedding of its token, so that the gradient by the table
    has a row per position.
    """
    (L,), V = tokens_L.shape, model.V
    wide = dataclasses.replace(model, V=V + L)
    others = {name: w for name, w in params.items() if name != "embed_VD"}
    if "head_DV" in others:  # untied; it does not affect the margin
        others["head_DV"] = jnp.pad(others["head_DV"], ((0, 0), (0, L)))
    batch = one._replace(tokens_BL=(V + jnp.arange(L, dtype=jnp.int32))[None])

    def margin(own_LD):
        table = jnp.concatenate([params["embed_VD"], own_LD])
        traced, _ = trace_batch(wide, {**others, "embed_VD": table}, state, batch)
        return target_margins(traced["logits"][layer, :, position], expert, model.moe)[0]

    return jax.grad(margin)(params["embed_VD"][tokens_L])


def target_margins(logits_BE: Float[Array, "B E"], expert: Int[Array, ""] | int, moe: MoEConfig) -> Float[Array, "B"]:
    """The expert's logit less the K-th largest of the others: above zero, it is among the K largest."""
    others_BE = jnp.where(jnp.arange(moe.E)[None] == expert, -jnp.inf, logits_BE)
    if moe.router.K >= moe.E:  # all experts are chosen
        return jnp.full(len(logits_BE), jnp.inf)
    return jnp.take(logits_BE, expert, axis=-1) - jax.lax.top_k(others_BE, moe.router.K)[0][:, -1]
