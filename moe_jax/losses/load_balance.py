import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from moe_jax.core.ranges import NonNegativeFloat, check_ranges
from moe_jax.core.stats import Stats, ratio
from moe_jax.core.traits import traits

SCOPES = ("batch", "group", "sequence")


class BalanceConvention(NamedTuple):
    """Convention of a balancing loss: the choices it counts, and its value in balance, for E experts and K choices."""

    first: bool
    balanced: str  # "1", "K", "1/K" or "1/E^2"


BALANCE_CONVENTIONS = {
    "switch": BalanceConvention(False, "1"),  # arXiv:2101.03961, eq. 4; DeepSeekMoE
    "first": BalanceConvention(True, "1"),  # Mesh TensorFlow, V-MoE
    "gshard": BalanceConvention(True, "1/E^2"),  # arXiv:2006.16668, algorithm 1
    "sum": BalanceConvention(False, "K"),  # Hugging Face transformers, MaxText, flaxformer's top-k
    "mean": BalanceConvention(False, "1/K"),  # levanter
}


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """Load-balancing loss E * sum_e f_e * P_e (arXiv:2101.03961, eqs. 4-6): 1 when balanced, E when collapsed.

    f is the fraction of choices that fell on an expert (before any is dropped; no gradient), P the mean router
    probability.
    convention: which choices are counted, and the value when balanced; `convert` carries a coefficient over.
    scope: f and P of the whole batch, or of each routing "group" or "sequence", then averaged by tokens (DeepSeek-V3,
    arXiv:2412.19437, eqs. 17-20); narrower scopes count all choices.

    A router's null experts, all alike, count with the mean of their loads (AdaMoE, arXiv:2406.13233, sec. 3.3).
    """

    weight: NonNegativeFloat = 0.01  # coefficient in the total loss
    convention: str = "switch"
    scope: str = "batch"

    def __post_init__(self):
        check_ranges(self)
        if self.convention not in BALANCE_CONVENTIONS:
            raise ValueError(
                f"LoadBalance(convention={self.convention!r}) is unknown; use one of {', '.join(BALANCE_CONVENTIONS)}."
            )
        if self.scope not in SCOPES:
            raise ValueError(f"LoadBalance(scope={self.scope!r}) is unknown; use one of {', '.join(SCOPES)}.")
        if self.scope != "batch" and BALANCE_CONVENTIONS[self.convention].first:
            raise ValueError(
                f"LoadBalance(convention={self.convention!r}, scope={self.scope!r}) would need first choices of every "
                f"{self.scope}; use scope='batch', or a convention that counts all choices."
            )

    @property
    def additive(self) -> bool:
        """Tells whether it is a mean over tokens: the products of a batch's means are not, those of a group's are."""
        return self.scope != "batch"

    def check(self, router: Any) -> None:
        if traits(router).nulls and (self.scope != "batch" or BALANCE_CONVENTIONS[self.convention].first):
            raise ValueError(
                f"{self} does not count null experts; with {type(router).__name__}() use scope='batch', and a "
                "convention that counts all choices."
            )

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        convention, E, K = BALANCE_CONVENTIONS[self.convention], s.choices_E.shape[-1], traits(router).K
        if nulls := traits(router).nulls:
            f_E, P_E = ratio(s.choices_E, K * s.tokens[..., None]), ratio(s.probs_E, s.tokens[..., None])
            null_part = (1 - f_E.sum(-1)) / nulls * (1 - P_E.sum(-1))
            balance = (E + nulls) * ((f_E * P_E).sum(-1) + null_part)
        elif self.scope != "batch":
            balance = ratio(s.group_balance if self.scope == "group" else s.sequence_balance, s.tokens)
        else:
            counts_E = s.top1_E if convention.first else s.choices_E
            f_E = ratio(counts_E, counts_E.sum(-1, keepdims=True))
            balance = E * (f_E * ratio(s.probs_E, s.tokens[..., None])).sum(-1)
        return balance * balanced_value(self.convention, E, K)


def balanced_value(convention: str, E: int, K: int) -> float:
    """Value of a convention's loss when the load is balanced."""
    return {"1": 1.0, "K": float(K), "1/K": 1 / K, "1/E^2": 1 / E**2}[BALANCE_CONVENTIONS[convention].balanced]


def convert(
    coefficient: float,
    source: str,
    target: str,
    E: int,
    K: int,
    layers: int = 1,
    source_layers: str = "mean",
    target_layers: str = "mean",
) -> float:
    """Converts a published coefficient between conventions, for E experts, K choices and a number of MoE layers.

    `source_layers`, `target_layers`: whether the layers' losses are averaged ("mean") or added up ("sum"). Between
    conventions that count the same choices the loss is equal; between first and all choices loss and gradient are
    equal where the load is balanced.
    """
    for convention in (source, target):
        if convention not in BALANCE_CONVENTIONS:
            raise ValueError(f"Convention {convention!r} is unknown; use one of {', '.join(BALANCE_CONVENTIONS)}.")
    for over in (source_layers, target_layers):
        if over not in ("mean", "sum"):
            raise ValueError(f"Losses of layers are reduced by 'mean' or 'sum', not {over!r}.")
    times = {"mean": 1, "sum": layers}
    scale = balanced_value(source, E, K) * times[source_layers]
    return coefficient * scale / (balanced_value(target, E, K) * times[target_layers])
