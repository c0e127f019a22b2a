"""Law 8 of one MoE layer: what it reports of its choices is counted again, in the routing itself."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.audit.routing import ROUNDING, Verdict, draw_trials, tokens_choose, trial_keys
from moe_jax.core.context import Ids
from moe_jax.core.stats import Stats
from moe_jax.evaluate import drop_rate
from moe_jax.moe import MoE, MoEConfig


class Counted(NamedTuple):
    """Choices of a routing, counted one by one."""

    tokens: float
    choices_E: Float[np.ndarray, "E"]
    top1_E: Float[np.ndarray, "E"]
    kept: float


def routing_counts(cfg: MoEConfig, B: int = 4, L: int = 16, D: int = 8, seed: int = 0) -> Verdict:
    """Counts a layer's choices and drops: its statistics, its drop rate and its losses must be of these numbers.

    A quarter of the tokens is padding. Of routers whose experts choose, the recorded assignments are counted.
    """
    rng = np.random.default_rng(seed)
    given, keys_1 = draw_trials(cfg, rng, 1, B, L, D), trial_keys(cfg, rng, 1)
    params, x_BLD, _, token_BL, task_BL = jax.tree.map(lambda a: a[0], given)
    mask_BL, state = np.broadcast_to(np.arange(L) < L - L // 4, (B, L)), cfg.init_state()
    record = ("kept",) if tokens_choose(cfg) else ("assignments",)

    @jax.jit
    def run(params: Any, x_BLD: Any, mask_BL: Any, ids: Ids) -> Any:
        called = (x_BLD, mask_BL, None if keys_1 is None else keys_1[0], state, ids, record)
        return cast(tuple, MoE(cfg).apply({"params": params}, *called))[1]

    aux = jax.device_get(run(params, x_BLD, mask_BL, Ids(token_BL, task_BL)))
    if tokens_choose(cfg):
        found = count(aux.expert_BLK, aux.recorded.kept_BLK, mask_BL, cfg.E)
    else:
        choices_E = aux.recorded.assignments_BLE.sum((0, 1))
        found = Counted(mask_BL.sum(), choices_E, choices_E, float(aux.stats.kept))
    return compare_counts(cfg, aux.stats, float(aux.loss), found)


def count(
    expert_BLK: Int[np.ndarray, "B L K"], kept_BLK: Bool[np.ndarray, "B L K"], mask_BL: Bool[np.ndarray, "B L"], E: int
) -> Counted:
    """Counts choices of real tokens; expert E is none."""
    made_BLK = mask_BL[..., None] & (expert_BLK < E)
    choices_E = np.bincount(expert_BLK[made_BLK], minlength=E)
    top1_E = np.bincount(expert_BLK[..., 0][made_BLK[..., 0]], minlength=E)
    return Counted(float(mask_BL.sum()), choices_E, top1_E, float((made_BLK & kept_BLK).sum()))


def compare_counts(cfg: MoEConfig, stats: Stats, loss: float, found: Counted) -> Verdict:
    """Compares a layer's statistics and its auxiliary loss with counts."""
    for name, n in found._asdict().items():
        said, made = np.sum(getattr(stats, name)), np.sum(n)
        if np.abs(getattr(stats, name) - n).max() > ROUNDING * max(made, 1):
            return Verdict(False, f"the statistics have {said:.0f} {name}, but the routing {made:.0f}, by expert")
    choices = found.choices_E.sum()
    rate = 1 - found.kept / choices if choices else np.nan
    if not np.isclose(drop_rate(stats), rate, rtol=0, atol=ROUNDING, equal_nan=True):
        return Verdict(False, f"a drop rate of {drop_rate(stats):.3f} is logged, but {rate:.3f} are dropped")
    counted = jax.tree.map(jnp.asarray, stats._replace(**found._asdict()))
    expected = sum(float(part.weight * part(counted, cfg.init_state(), cfg.router)) for part in cfg.losses)
    if abs(loss - expected) > ROUNDING * max(abs(expected), 1e-3):
        return Verdict(False, f"the auxiliary losses are {loss:.6f}, but {expected:.6f} of the routing's choices")
    return Verdict(True, f"{choices - found.kept:.0f} of {choices:.0f} choices dropped, all counted")
