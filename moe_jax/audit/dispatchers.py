"""Law 2 of one MoE layer: every dispatcher that fits its routing gives the same numbers."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.audit.meshes import CLOSE, SURE, largest, worst
from moe_jax.audit.routing import Verdict, draw_trials, tokens_choose, trial_keys
from moe_jax.core.context import Ids
from moe_jax.dispatch import Einsum, Gather, Scatter, Sort
from moe_jax.moe import RECORDED, MoE, MoEConfig


def dispatchers(cfg: MoEConfig, B: int = 4, L: int = 16, D: int = 8, seed: int = 0) -> Verdict:
    """Compares outputs, gradients and drops of the layer's dispatcher and others with the definition, `Einsum`."""
    rng = np.random.default_rng(seed)
    given = jax.tree.map(lambda a: jnp.asarray(a[0]), draw_trials(cfg, rng, 1, B, L, D))
    keys_1 = trial_keys(cfg, rng, 1)
    target = rng.normal(size=given.x_TBLD.shape).astype(np.float32)
    arrived = "kept" if tokens_choose(cfg) else "assignments"  # experts that choose drop nothing

    def run(dispatch: Any) -> Any:
        layer = MoE(dataclasses.replace(cfg, dispatch=dispatch))

        def loss(params, x_BLD):
            given_ids = Ids(given.token_TBL, given.task_TBL)
            key = None if keys_1 is None else keys_1[0]
            called = (x_BLD, given.mask_TBL, key, cfg.init_state(), given_ids, (arrived,))
            y_BLD, aux = cast(tuple, layer.apply({"params": params}, *called))
            kept = getattr(aux.recorded, RECORDED[arrived])
            return ((y_BLD - target) ** 2).mean() + aux.loss, (y_BLD, kept, aux.stats)

        gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (value, (y_BLD, kept, stats)), grads = jax.device_get(gradients(given.params, given.x_TBLD))
        return {"loss": value, "y": y_BLD, "kept": stats.kept}, grads, kept, stats.choices_E.sum()

    definition, *others = fitting_dispatchers(cfg)
    outputs, grads, kept, asked = run(definition)
    counted, actual = outputs["kept"], kept.sum()
    if abs(counted - actual) > 0.5:  # assignments of soft slots are rounded
        return Verdict(False, f"the statistics count {counted:.0f} choices as kept, of {actual:.0f} that are")
    for other in others:
        other_outputs, other_grads, other_kept, _ = run(other)
        name = type(other).__name__
        if not np.array_equal(kept, other_kept):
            return Verdict(False, f"{name}() drops others than Einsum()")
        for what, found in (
            ("outputs", worst(outputs, other_outputs)),
            ("gradients", worst(grads, other_grads, least=largest(grads) * SURE)),
        ):
            if not found.error <= CLOSE:
                return Verdict(False, f"{name}() has other {what} than Einsum(), by {found.error:.1e} in {found.where}")
    names = ", ".join(f"{type(d).__name__}()" for d in (definition, *others))
    return Verdict(True, f"{names}; {asked - counted:.0f} of {asked:.0f} choices dropped")


def fitting_dispatchers(cfg: MoEConfig) -> list[Any]:
    """The definition, then every dispatcher that must give the same numbers for the layer's routing."""
    own, routing = cfg.dispatch, cfg.traits.routing
    limit = {f: getattr(own, f) for f in ("priority", "convention") if hasattr(own, f)}
    several: list[Any] = [Einsum(own.capacity_factor, **limit), Scatter(own.capacity_factor, **limit)]
    if own.capacity_factor is None:
        several += [Sort(), Gather()]
    return [d for d in several if routing in d.accepts]
