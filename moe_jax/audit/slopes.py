"""Law 3 of one MoE layer, by finite differences: the router's gradient is the slope of the loss, not only nonzero.

A weight whose denominator has no gradient trains too, but in another direction.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from moe_jax.audit.routing import Trials, Verdict, draw_trials, tokens_choose, trial_keys
from moe_jax.core.context import Ids
from moe_jax.core.routing import SoftSlots
from moe_jax.moe import RECORDED, MoE, MoEConfig

DISTANCE = 0.02  # of parameters of about unit gain: long enough for float32, short enough for few choices to change
NEAR = 0.01  # relative to the slopes; a missing term of the gradient is at least several times as large


class TaskTrace(NamedTuple):
    """Task loss of a layer in T trials, what the choices were, and the gradients by the router's parameters."""

    loss_T: Float[Array, "T"]
    choices: Any  # arrays [T, ...]
    grads: dict[str, Array]  # [T, ...] each


def gradients_are_slopes(cfg: MoEConfig, trials: int = 16, seed: int = 0) -> Verdict:
    """Law 3: the task loss changes along a random direction of the router's parameters as its gradient says.

    Central differences on 2 sequences of 8 tokens of width 8, in training mode, with the same noise. Trials in which
    the step changes a choice or a drop are left out; the verdict is on the median of the others.
    """
    if not cfg.router.params:
        return Verdict(True, "no parameters")
    cfg, rng = dataclasses.replace(cfg, S=None), np.random.default_rng(seed)
    given = draw_trials(cfg, rng, trials, B=2, L=8, D=8)
    target_TBLD = rng.normal(size=given.x_TBLD.shape).astype(np.float32)
    run = partial(trace_task, cfg, given, key_T=trial_keys(cfg, rng, trials), target_TBLD=target_TBLD)
    router = {name: given.params[f"router_{name}"] for name in cfg.router.params}
    way = jax.tree.map(lambda w: (rng.normal(size=w.shape) / w[0].size ** 0.5).astype(np.float32), router)
    at, ahead, behind = (
        jax.device_get(run({n: w + step * way[n] for n, w in router.items()})) for step in (0, DISTANCE, -DISTANCE)
    )
    slope_T = (ahead.loss_T.astype(np.float64) - behind.loss_T) / (2 * DISTANCE)
    told_T = sum((at.grads[n] * way[n]).reshape(trials, -1).sum(-1, dtype=np.float64) for n in router)
    still_T = same_choices(at.choices, ahead.choices) & same_choices(at.choices, behind.choices)
    if not still_T.any():
        return Verdict(True, "every step changed a choice")
    size = np.sqrt((slope_T[still_T] ** 2).mean())
    error = float(np.median(np.abs(slope_T - told_T)[still_T]) / max(size, 1e-3))
    detail = f"{error:.0e} from finite differences in {still_T.sum()} of {trials} trials"
    return Verdict(error <= NEAR, detail + ("" if error <= NEAR else f", where {NEAR:.0e} is rounding"))


def same_choices(one: Any, other: Any) -> np.ndarray:
    """Tells for each trial whether all choices and drops are the same."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return np.all([(a == b).reshape(len(a), -1).all(-1) for a, b in pairs], axis=0)


@partial(jax.jit, static_argnums=0)
def trace_task(
    cfg: MoEConfig,
    given: Trials,
    router: dict[str, Array],
    key_T: Key[Array, "T"] | None,
    target_TBLD: Float[Array, "T B L D"],
) -> TaskTrace:
    """Runs a layer on all trials, with these parameters of its router; the task is that of `routing.trainable`."""
    # Soft slots are no choices: they change with every step, and smoothly.
    record = () if cfg.traits.routing is SoftSlots else ("assignments", *(["kept"] if tokens_choose(cfg) else []))

    def loss(router, params, x_BLD, mask_BL, token_BL, task_BL, key, target_BLD):
        params = params | {f"router_{name}": value for name, value in router.items()}
        called = (x_BLD, mask_BL, key, cfg.init_state(), Ids(token_BL, task_BL), record)
        y_BLD, aux = cast(tuple, MoE(cfg).apply({"params": params}, *called))
        choices = [getattr(aux.recorded, RECORDED[name]) for name in record]
        return ((y_BLD - target_BLD) ** 2).mean(-1).sum(), choices or [jnp.zeros(())]

    (loss_T, choices), grads = jax.vmap(jax.value_and_grad(loss, has_aux=True))(router, *given, key_T, target_TBLD)
    return TaskTrace(loss_T, choices, grads)
