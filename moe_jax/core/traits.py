"""Traits of a router: what it declares about itself, with the defaults for what it leaves out."""

from typing import Any, NamedTuple

from moe_jax.core.routing import TokenChoice


class Traits(NamedTuple):
    """Attributes that a router may declare (class variables, fields or properties), and their defaults.

    Losses and gating transforms are read in the same way for what they share with routers: `state`, `random`.
    """

    params: tuple[str, ...] = ()  # names of its parameters, whose suffixes are their shapes (`gate_DE`)
    zeros: tuple[str, ...] = ()  # those of them that start at zero
    untrained: tuple[str, ...] = ()  # those of them that the task loss does not reach (law 3)
    K: int = 1  # choices per token, at most; for slots the number per token on average, rounded up
    routing: type = TokenChoice  # kind of routing: TokenChoice, SlotChoice or SoftSlots
    random: bool = False  # trains otherwise than it evaluates, and needs keys for it
    causal: bool = True  # False: choices depend on later tokens
    grouped: bool = False  # choices depend on a token's place in its routing group, or on others; default: not causal
    needs: tuple[str, ...] = ()  # ids that it routes by: "token", "task"
    tasks: int = 1  # tasks that it tells apart; default: its field M where it needs task ids
    state: tuple[str, ...] = ()  # names of what it remembers; it has update(state, stats) -> new values
    gives: tuple[str, ...] = ()  # "load": a smooth estimate of each expert's load
    nulls: int = 0  # experts beside the E ones that do nothing
    score: str = "softmax"  # name of the function from logits to scores (`core.scores.SCORES`)
    normalize: bool = False  # weights are divided by their sum over the chosen
    groups: int = 1  # groups of experts of which it limits the number per token


def traits(component: Any) -> Traits:
    """Returns the traits of a router, of its class (those that are class variables), or of None: all defaults."""
    found = {name: getattr(component, name) for name in Traits._fields if hasattr(component, name)}
    default = {"grouped": not found.get("causal", True)}
    if "task" in found.get("needs", ()):
        default["tasks"] = component.M
    return Traits(**(default | found))
