import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Float

from moe_jax.core.activation import activation
from moe_jax.core.groups import Groups
from moe_jax.core.ranges import PositiveInt, check_ranges


@dataclasses.dataclass(frozen=True)
class MLP:
    """Two matrices with an activation between them, with or without biases."""

    F: PositiveInt  # hidden width
    activation: str = "gelu"
    bias: bool = False  # whether both matrices have biases

    def __post_init__(self):
        check_ranges(self)
        activation(self.activation)

    @property
    def params(self) -> tuple[str, ...]:
        return ("up_EDF", "down_EFD") + (("up_EF", "down_ED") if self.bias else ())

    def __call__(self, params: Mapping[str, Array], x: Float[Array, "... D"], groups: Groups) -> Float[Array, "... D"]:
        h = groups.matmul(x, params["up_EDF"])
        if self.bias:
            h = groups.bias(h, params["up_EF"])
        y = groups.matmul(groups.elementwise(activation(self.activation), h), params["down_EFD"])
        return groups.bias(y, params["down_ED"]) if self.bias else y
