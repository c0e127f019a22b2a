"""One MoE layer as independent choices, checked together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.core import dims
from moe_jax.core.ranges import PositiveFloat, PositiveInt, check_ranges
from moe_jax.core.routing import TokenChoice
from moe_jax.core.stats import Stats
from moe_jax.core.traits import Traits, traits
from moe_jax.dispatch import Scatter
from moe_jax.exchanges import AllToAll, RaggedAllToAll
from moe_jax.experts import MLP
from moe_jax.losses import Adaptive, LoadBalance, RouterZ
from moe_jax.routers import TopK

LayerState = dict[str, Array]  # state of a layer; stacked layers are a leading axis


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One MoE layer, as independent choices.

    E: number of experts.
    router: decides which experts a token goes to. experts: their computation.
    dispatch: brings tokens to their experts and outputs back, and limits how many an expert takes.
    gating: transforms of the router's input, its logits, or the experts that may be chosen, in order.
    S: tokens per routing group, in which capacity is counted; None is one sequence, whose packed documents share it. It
       does not depend on the shard, so that drops do not depend on the mesh.
    exchange: brings rows and experts that are sharded over a mesh together.
    shared: an expert that every token visits in addition to its routed ones (n shared experts of width F are one of
       width n*F; DeepSeekMoE, arXiv:2401.06066).
    losses: auxiliary losses, each with its coefficient.
    tasks: number of task ids that losses by task distinguish; larger ids count as none.
    init_scale: router and experts start with std sqrt(init_scale / fan_in); Switch found 0.1 more stable.
    """

    E: PositiveInt
    router: Any = TopK(K=2)
    experts: Any = MLP(F=1024)
    dispatch: Any = Scatter()
    exchange: Any = AllToAll()
    gating: tuple[Any, ...] = ()
    shared: Any = None
    losses: tuple[Any, ...] = (LoadBalance(0.01), RouterZ(0.001))
    S: PositiveInt | None = None
    tasks: PositiveInt = 1
    init_scale: PositiveFloat = 1.0

    def __post_init__(self):
        check_ranges(self)
        object.__setattr__(self, "gating", tuple(self.gating))  # hashable
        object.__setattr__(self, "losses", tuple(self.losses))
        router = type(self.router).__name__
        if not 1 <= self.router.K <= self.E:
            raise ValueError(f"{router}() picks K={self.router.K} of E={self.E} experts; K must lie between 1 and E.")
        for field, mark, example in (("gating", "on", "Jitter(0.01)"), ("losses", "weight", "LoadBalance(0.01)")):
            for part in getattr(self, field):
                if not hasattr(part, mark):
                    raise ValueError(f"{field} has {part!r}, which is none; give a tuple of {example} and the like.")
        for part in (self.router, *self.gating):
            if hasattr(part, "check"):
                part.check(self.E)
        makes = self.traits.routing
        if makes not in self.dispatch.accepts:
            fits = "Einsum(capacity_factor=None)" + (" or Gather()" if makes.__name__ == "SlotChoice" else "")
            fits = "Scatter(), Sort() or Einsum()" if makes is TokenChoice else fits
            raise ValueError(f"{self.dispatch} does not take what {router}() decides; use {fits} as dispatch.")
        for loss in self.losses:
            if hasattr(loss, "check"):
                loss.check(self.router)
        if sum(isinstance(loss, Adaptive) for loss in self.losses) > 1:
            raise ValueError("A layer keeps the weight of one Adaptive() loss; leave out the others.")
        inner = [getattr(loss, "loss", loss) for loss in self.losses]
        balanced = any(isinstance(loss, LoadBalance) and loss.weight for loss in inner)
        if self.traits.untrained and not balanced:
            raise ValueError(f"{self.router} has parameters that only LoadBalance() trains; add it to losses.")
        if self.shared is not None and output_width(self.shared, 0) != output_width(self.experts, 0):
            raise ValueError(
                f"shared={self.shared} has another output width than experts={self.experts}, but both are added up; "
                "give both the same O, or none (the width of the input)."
            )

    @property
    def traits(self) -> Traits:
        """Traits of the router."""
        return traits(self.router)

    @property
    def distinct(self) -> int:
        """Choices of a token that are known to be different experts; 1 where nothing is known."""
        return self.router.K if self.traits.distinct else 1

    @property
    def causal(self) -> bool:
        """Tells whether no later token changes a token's output: none affects its choices or takes its slot."""
        d = self.dispatch
        return (
            self.traits.causal
            and not (isinstance(self.exchange, RaggedAllToAll) and self.exchange.buffer)
            and (
                d.capacity_factor is None
                or d.priority == "token-major"
                or (d.priority == "choice-major" and self.router.K == 1)
            )
        )

    @property
    def random(self) -> bool:
        """Tells whether the layer needs a PRNG key while training."""
        return self.traits.random or any(t.random for t in self.gating)

    def slots(self, S: int) -> int:
        """Slots of an expert for a group of S tokens: the router's where it sets them, else the dispatcher's."""
        if self.traits.routing is not TokenChoice:
            return self.router.slots(S, self.E)
        return self.dispatch.slots(S, self.router.K, self.E)

    def group(self, B: int, L: int, training: bool) -> int:
        """Tokens of a routing group where a shard has B sequences of L, training (with a key, if it is random) or not.

        It is S, or L for S=None. Where S does not divide the B * L tokens: all of them if grouping is irrelevant,
        else ValueError.
        """
        S = self.S or L
        if B * L % S == 0:
            return S
        if not self.grouping_is_irrelevant(training):
            raise ValueError(f"A shard's {B} x {L} tokens are not whole routing groups of S={S}; S must divide them.")
        return B * L

    def sequences(self, L: int) -> int:
        """The least number of sequences of L tokens that are whole routing groups, relevant or not."""
        return math.lcm(self.S or L, L) // L

    def grouping_is_irrelevant(self, training: bool) -> bool:
        """Tells whether routing groups change nothing: no capacity, no draws, no ranks or balancing within them."""
        drawn = self.random and training
        return self.dispatch.capacity_factor is None and not drawn and not self.traits.grouped

    @property
    def needs(self) -> tuple[str, ...]:
        """The ids ("token", "task") that calls of the layer need."""
        by_task = self.tasks > 1 and "task" not in self.traits.needs
        return (*self.traits.needs, *(["task"] if by_task else []))

    def dropless(self) -> "MoEConfig":
        """Returns the layer without a limit on the rows of an expert or a shard."""
        new = self
        if self.dispatch.capacity_factor is not None:
            new = dataclasses.replace(new, dispatch=dataclasses.replace(self.dispatch, capacity_factor=None))
        if isinstance(self.exchange, RaggedAllToAll) and self.exchange.buffer:
            new = dataclasses.replace(new, exchange=dataclasses.replace(self.exchange, buffer=None))
        return new

    @property
    def spreads(self) -> bool:
        """Tells whether the exchange carries the rows of the dispatcher, so that experts may be sharded."""
        return self.dispatch.layout in self.exchange.layouts

    def init_state(self, *layers: int) -> LayerState:
        """State of the layer before its first step ({} for most), for `layers` of them in front."""
        sizes = {**sizes_of(self.router), "E": self.E}
        state = {
            name: jnp.zeros((*layers, *dims.shape_of(dims.dims_of(name), sizes)), jnp.float32)
            for part in (self.router, *self.losses)
            for name in traits(part).state
        }
        if any(getattr(t, "scheduled", False) for t in self.gating):
            state["step_"] = jnp.zeros(layers, jnp.int32)
        return state

    def update_state(self, state: LayerState, s: Stats) -> LayerState:
        """State of the layer after a step with these sums over the whole batch; layers may be stacked."""
        new = dict(state)
        for part in (self.router, *self.losses):
            if traits(part).state:
                new |= part.update(state, s)
        if "step_" in state:
            new["step_"] = state["step_"] + 1
        return new


def output_width(expert: Any, D: int) -> int:
    """Output width of an expert on tokens of width D: its O where it has one, else D."""
    return getattr(expert, "O", D)


def sizes_of(component: Any) -> Mapping[str, int]:
    """The sizes a component brings itself: its fields named by a dimension's letter."""
    letters = [f.name for f in dataclasses.fields(component) if len(f.name) == 1 and f.name.isupper()]
    letters += ["O"] * hasattr(component, "O")  # O may be a property
    return {letter: getattr(component, letter) for letter in letters}
