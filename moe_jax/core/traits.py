"""Traits of a router: its declarations, with defaults for those it leaves out."""

from typing import Any, NamedTuple

from moe_jax.core.routing import TokenChoice


class Traits(NamedTuple):
    """Attributes that a router may declare (class variables, fields or properties), and their defaults.

    Losses and gating transforms may declare those that they share with routers: `state`, `random`.
    """

    params: tuple[str, ...] = ()  # names of its parameters, whose suffixes are their shapes (`gate_DE`)
    zeros: tuple[str, ...] = ()  # parameters that start at zero
    untrained: tuple[str, ...] = ()  # parameters without a gradient of the task loss (law 3)
    K: int = 1  # choices per token, at most; for slots the number per token on average, rounded up
    routing: type = TokenChoice  # kind of routing: TokenChoice, SlotChoice or SoftSlots
    distinct: bool = False  # a token's choices are different experts, always: fewer rows can come to a shard
    random: bool = False  # draws at random in training, and needs keys for it
    causal: bool = True  # False: choices depend on later tokens
    grouped: bool = (
        False  # choices depend on the position in the routing group, or on other tokens; default: not causal
    )
    needs: tuple[str, ...] = ()  # ids that it routes by: "token", "task"
    tasks: int = 1  # number of tasks that it distinguishes; default: its field M where it needs task ids
    state: tuple[str, ...] = ()  # names of its state; the router has update(state, stats) -> new values
    gives: tuple[str, ...] = ()  # "load": a smooth estimate of each expert's load
    nulls: int = 0  # experts, in addition to E, that do nothing
    score: str = "softmax"  # name of the function from logits to scores (`core.scores.SCORES`)
    normalize: bool = False  # weights are divided by their sum over the chosen
    groups: int = 1  # groups of experts, whose number per token it limits


def traits(component: Any) -> Traits:
    """Returns the traits of a router, of its class (those that are class variables), or of None: all defaults."""
    found = {name: getattr(component, name) for name in Traits._fields if hasattr(component, name)}
    default = {"grouped": not found.get("causal", True)}
    if "task" in found.get("needs", ()):
        default["tasks"] = component.M
    return Traits(**(default | found))
