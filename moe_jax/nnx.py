"""Layers as modules of Flax NNX: shells over the same functions and names of parameters as those of Linen.

It is imported by name, `from moe_jax import nnx`, so that users of Linen do not wait for NNX.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from moe_jax import moe
from moe_jax.core import shard
from moe_jax.core.context import Ids
from moe_jax.core.groups import Dense
from moe_jax.core.parameter import draw
from moe_jax.moe_config import LayerState, MoEConfig


class RouterState(nnx.Variable):
    """NNX variable of a layer's state (`MoEConfig.init_state`), as nnx.BatchStat is of running averages."""


class MoE(nnx.Module):
    """A sparse layer for any NNX model: `MoE(MoEConfig(E=8), D, rngs=nnx.Rngs(0))` or `MoE.of(D, rngs=rngs, E=8)`.

    D: the width of its input. Parameters are nnx.Param attributes with the names that Linen has (`router_gate_DE`,
    `up_EDF`); under a mesh (`jax.set_mesh`, `make_mesh`) the layer is sharded as Linen's is. `router_state` holds a
    RouterState for each name of `MoEConfig.init_state`; calls read it, `update` writes it.
    """

    def __init__(self, cfg: MoEConfig, D: int, *, rngs: nnx.Rngs):
        self.cfg, self.D = cfg, D
        moe.make_params(cfg, D, partial(create, self, rngs, exchange=cfg.exchange))
        self.router_state = nnx.Dict({name: RouterState(value) for name, value in cfg.init_state().items()})

    @classmethod
    def of(cls, D: int, *, rngs: nnx.Rngs, **fields: Any) -> "MoE":
        """The layer from the fields of a `MoEConfig`."""
        return cls(MoEConfig(**fields), D, rngs=rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BL: Bool[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        state: LayerState | None = None,
        ids: Ids = Ids(),
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L O"], moe.Aux]:
        """Output and report of the layer, as `moe_jax.MoE`; ValueError where x is not D wide.

        state: the state of the layer; by default that of `router_state`.
        """
        check_width(x_BLD, self.D)
        params = moe.make_params(self.cfg, self.D, partial(created, self))
        state = self._state() if state is None else state
        return moe.apply(self.cfg, params, x_BLD, mask_BL, key, state, ids, record)

    def update(self, aux: moe.Aux) -> None:
        """Updates the state after a step whose calls returned `aux`; once a step, as `MoEConfig.update_state`."""
        for name, value in self.cfg.update_state(self._state(), aux.stats).items():
            self.router_state[name][...] = value

    def _state(self) -> LayerState:
        return {name: variable[...] for name, variable in self.router_state.items()}


class FeedForward(nnx.Module):
    """A dense layer, one expert for every token: `FeedForward(GLU(F=1024), D, rngs=nnx.Rngs(0))`.

    Its parameters are nnx.Param attributes without a dimension of experts (`up_DF`).
    """

    def __init__(self, expert: Any, D: int, *, rngs: nnx.Rngs, init_scale: float = 1.0):
        self.expert, self.D = expert, D
        moe.dense_params_from(expert, "{}", D, partial(create, self, rngs), init_scale)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L O"]:
        """The expert's output; ValueError where x is not D wide."""
        check_width(x_BLD, self.D)
        here, params = shard.local(), moe.dense_params_from(self.expert, "{}", self.D, partial(created, self))
        return here.tensor_exit(
            self.expert(moe.gather_params(here, params, x_BLD.dtype), here.tensor_enter(x_BLD), Dense())
        )


def create(
    module: nnx.Module, rngs: nnx.Rngs, name: str, sizes: Mapping[str, int], scale: float, exchange: Any = None
) -> Array:
    """A new parameter of a module, in float32; the name's suffix is its shape."""
    setattr(module, name, nnx.Param(draw(rngs.params(), name, sizes, moe.initializer(name, scale), exchange)))
    return getattr(module, name)[...]


def created(module: nnx.Module, name: str, sizes: Mapping[str, int], scale: float) -> Array:
    """Returns an existing parameter of a module, for `make_params`."""
    return getattr(module, name)[...]


def check_width(x_BLD: Array, D: int) -> None:
    """Refuses tokens of another width than D."""
    if x_BLD.shape[-1] != D:
        raise ValueError(f"Tokens are {x_BLD.shape[-1]} wide, but the layer was made for D={D}; make one for them.")
