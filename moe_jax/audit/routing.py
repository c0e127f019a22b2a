"""Laws 3 and 4 of one MoE layer, tried on it: does its router train, does it depend on later tokens or other sequences?

Every trial has small random parameters and tokens of its own (B sequences of length L and width D; all else is the
config's), which share a direction, so that some experts are popular and overflow. All trials are one compiled program,
run before and after a change: any difference is an effect of the change.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.core.context import Ids
from moe_jax.core.routing import TokenChoice
from moe_jax.moe import MoE, MoEConfig

TINY = 1e-4  # a gradient below this is rounding; gradients here are of order 1
ROUNDING = 1e-5  # relative to the largest output: the rounding of matrix products depends on their size, so on the load


class Verdict(NamedTuple):
    """Verdict on a law, and the evidence."""

    holds: bool
    detail: str


class Trials(NamedTuple):
    """T independent inputs of a layer."""

    params: dict[str, np.ndarray]  # [T, ...] each
    x_TBLD: Float[np.ndarray, "T B L D"]
    mask_TBL: Bool[np.ndarray, "T B L"]
    token_TBL: Int[np.ndarray, "T B L"]
    task_TBL: Int[np.ndarray, "T B L"]


class RoutingTrace(NamedTuple):
    """Trace of a layer on the tokens of T trials."""

    y_TBLD: Float[Array, "T B L D"]
    assignments_TBLE: Float[Array, "T B L E"]  # dropped ones too
    weight_TBLE: Float[Array, "T B L E"]
    kept_TBLK: Bool[Array, "T B L K"]


def trainable(cfg: MoEConfig, B: int = 4, L: int = 16, D: int = 8, trials: int = 20, seed: int = 0) -> Verdict:
    """Law 3: in training mode, the task loss alone gives every router parameter a gradient.

    The task is a squared error of y_BLD to a random target. A violation is a parameter without a gradient in any
    trial, if the router does not declare it `untrained`.
    """
    if not cfg.router.params:
        return Verdict(True, "no parameters")
    rng = np.random.default_rng(seed)
    given = draw_trials(cfg, rng, trials, B, L, D)
    target_TBLD = rng.normal(size=given.x_TBLD.shape).astype(np.float32)
    found = router_gradients(cfg, given, trial_keys(cfg, rng, trials), target_TBLD)
    still = [name for name, g in found.items() if not np.abs(g).max() > TINY]
    if not still:
        return Verdict(True, f"all of {', '.join(found)}")
    declared = set(still) <= set(cfg.traits.untrained)
    return Verdict(declared, f"not {', '.join(still)}" + ", as declared" * declared)


def causal(
    cfg: MoEConfig, training: bool, B: int = 4, L: int = 16, D: int = 8, trials: int = 200, seed: int = 0
) -> Verdict:
    """Law 4: later tokens change nothing at earlier positions, in training mode (with the same key) or in evaluation.

    In every trial one sequence has other tokens and ids from a random position on, and in every fourth trial it ends
    earlier. A violation is any difference before that position in an assignment, a weight or a drop, bit for bit, or
    in y_BLD by more than rounding.
    """
    rng = np.random.default_rng(seed)
    given = draw_trials(cfg, rng, trials, B, L, D)
    mine_TB1 = one_of(rng, trials, B)[..., None]
    later_T1L = np.arange(L) >= rng.integers(1, L, size=(trials, 1, 1))
    return compare_traces(cfg, training, rng, given, mine_TB1 & later_T1L, mine_TB1 & ~later_T1L, "a prefix")


def batch_independent(
    cfg: MoEConfig, training: bool, B: int = 4, L: int = 16, D: int = 8, trials: int = 200, seed: int = 0
) -> Verdict:
    """The other sequences of a batch change nothing in one of them, in training mode or in evaluation.

    In every trial all other sequences change, in every fourth they end earlier; violations as in `causal`. The config's
    S sets the tokens that compete for slots: None is one sequence.
    """
    rng = np.random.default_rng(seed)
    given = draw_trials(cfg, rng, trials, B, L, D)
    mine_TBL = np.repeat(one_of(rng, trials, B)[..., None], L, axis=-1)
    return compare_traces(cfg, training, rng, given, ~mine_TBL, mine_TBL, "a sequence")


# ---------------------------------------------------------------- inputs


def draw_trials(cfg: MoEConfig, rng: np.random.Generator, T: int, B: int, L: int, D: int) -> Trials:
    """Trials with parameters of about unit gain, also where they start at zero."""
    x = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    shapes = jax.eval_shape(MoE(cfg).init, jax.random.key(0), x)["params"]

    def normal(like):
        fan_in = like.shape[-2] if like.ndim > 1 else 1
        return (rng.normal(size=(T, *like.shape)) / fan_in**0.5).astype(np.float32)

    return draw_tokens(cfg, rng, jax.tree.map(normal, shapes), (T, B, L, D))


def draw_tokens(
    cfg: MoEConfig, rng: np.random.Generator, params: dict[str, np.ndarray], shape: tuple[int, int, int, int]
) -> Trials:
    """Tokens that share a direction, from none to strongly; few different ids, so that they collide."""
    T, B, L, D = shape
    shared_T11D = rng.uniform(0, 3, size=(T, 1, 1, 1)) * rng.normal(size=(T, 1, 1, D))
    tasks = max(cfg.tasks, cfg.traits.tasks)
    return Trials(
        params,
        (rng.normal(size=shape) + shared_T11D).astype(np.float32),
        np.ones((T, B, L), bool),
        rng.integers(8, size=(T, B, L), dtype=np.int32),
        rng.integers(tasks, size=(T, B, L), dtype=np.int32),
    )


def trial_keys(cfg: MoEConfig, rng: np.random.Generator, T: int) -> Key[Array, "T"] | None:
    """A key for each trial; None where nothing is random, so that training and evaluation are one program."""
    data = jnp.asarray(rng.integers(2**32, size=(T, 2), dtype=np.uint32))
    return jax.random.wrap_key_data(data, impl="threefry2x32") if cfg.random else None


def one_of(rng: np.random.Generator, T: int, n: int) -> Bool[np.ndarray, "T n"]:
    """Masks of one index of n, drawn for each trial."""
    return np.arange(n) == rng.integers(n, size=(T, 1))


def changed(cfg: MoEConfig, rng: np.random.Generator, trials: Trials, where_TBL: Bool[np.ndarray, "T B L"]) -> Trials:
    """Trials with other tokens at these positions; in every fourth trial, the sequences end among them."""
    other, (T, B, L) = draw_tokens(cfg, rng, trials.params, trials.x_TBLD.shape), where_TBL.shape
    padding_T11 = (np.arange(T) % 4 == 0)[:, None, None]
    over_TBL = np.arange(L) >= rng.integers(L, size=(T, B, 1))
    return Trials(
        trials.params,
        np.where(where_TBL[..., None], other.x_TBLD, trials.x_TBLD),
        ~(where_TBL & padding_T11 & over_TBL),
        np.where(where_TBL, other.token_TBL, trials.token_TBL),
        np.where(where_TBL, other.task_TBL, trials.task_TBL),
    )


# ---------------------------------------------------------------- the layer, in all trials at once


@partial(jax.jit, static_argnums=0)
def router_gradients(
    cfg: MoEConfig, given: Trials, key_T: Key[Array, "T"] | None, target_TBLD: Float[Array, "T B L D"]
) -> dict[str, Array]:
    """Gradients of the task loss by each of the router's parameters, [T, ...]."""

    def loss(router, params, x_BLD, mask_BL, token_BL, task_BL, key, target_BLD):
        params = params | {f"router_{name}": value for name, value in router.items()}
        y_BLD, _ = MoE(cfg).apply({"params": params}, x_BLD, mask_BL, key, cfg.init_state(), Ids(token_BL, task_BL))
        return ((y_BLD - target_BLD) ** 2).mean(-1).sum()

    router = {name: given.params[f"router_{name}"] for name in cfg.router.params}
    return jax.vmap(jax.grad(loss))(router, *given, key_T, target_TBLD)


@partial(jax.jit, static_argnums=0)
def trace_routing(cfg: MoEConfig, trials: Trials, key_T: Key[Array, "T"] | None) -> RoutingTrace:
    """Runs the layer on all trials, without keys in evaluation mode."""
    record = ("assignments", "combine", *(["kept"] if tokens_choose(cfg) else []))

    def one(params, x_BLD, mask_BL, token_BL, task_BL, key):
        trials = (x_BLD, mask_BL, key, cfg.init_state(), Ids(token_BL, task_BL), record)
        y_BLD, aux = cast(tuple, MoE(cfg).apply({"params": params}, *trials))
        recorded = aux.recorded
        kept_BLK = (
            jnp.ones_like(recorded.assignments_BLE, bool) if recorded.kept_BLK is None else recorded.kept_BLK
        )  # not recorded
        return RoutingTrace(y_BLD, recorded.assignments_BLE, recorded.combine_BLE, kept_BLK)

    return jax.vmap(one)(*trials, key_T)


def tokens_choose(cfg: MoEConfig) -> bool:
    """Returns whether the layer's router names experts for tokens, so that choices can be dropped."""
    return cfg.traits.routing is TokenChoice


def compare_traces(
    cfg: MoEConfig,
    training: bool,
    rng: np.random.Generator,
    given: Trials,
    where_TBL: Bool[np.ndarray, "T B L"],
    watched_TBL: Bool[np.ndarray, "T B L"],
    what: str,
) -> Verdict:
    """Tells whether a change of some tokens changes anything at the watched ones, and what."""
    key_T = trial_keys(cfg, rng, len(where_TBL))
    inputs = (given, changed(cfg, rng, given, where_TBL))
    run = partial(trace_routing, cfg, key_T=key_T if training else None)
    one, other = (jax.tree.map(np.asarray, run(trials)) for trials in inputs)
    largest_T111 = np.abs(one.y_TBLD).max((1, 2, 3), keepdims=True)
    differs = {
        "who was chosen": one.assignments_TBLE != other.assignments_TBLE,
        "a weight": one.weight_TBLE != other.weight_TBLE,
        "a drop": one.kept_TBLK != other.kept_TBLK,
        "the output": np.abs(one.y_TBLD - other.y_TBLD) > ROUNDING * largest_T111,
    }
    moved = {name: (d.any(-1) & watched_TBL).any((1, 2)) for name, d in differs.items()}
    any_T = np.any([*moved.values()], axis=0)
    through = ", ".join(f"{name} in {moved_T.sum()}" for name, moved_T in moved.items() if moved_T.any())
    detail = f"{what} changed in {any_T.sum()} of {len(any_T)} trials" + (f" ({through})" if through else "")
    return Verdict(not any_T.any(), detail)
