import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.core.activation import activation
from moe_jax.core.groups import Groups
from moe_jax.core.ranges import PositiveInt, check_ranges


@dataclasses.dataclass(frozen=True)
class GLU:
    """Gated linear unit (arXiv:2002.05202): SwiGLU with activation "silu", GEGLU with "gelu"."""

    F: PositiveInt
    activation: str = "silu"
    params: ClassVar = ("gate_EDF", "up_EDF", "down_EFD")

    def __post_init__(self):
        check_ranges(self)
        activation(self.activation)

    def __call__(self, params: Mapping[str, Array], x: Float[Array, "... D"], groups: Groups) -> Float[Array, "... D"]:
        gate = activation(self.activation)(groups.matmul(x, params["gate_EDF"]))
        return groups.matmul(gate * groups.matmul(x, params["up_EDF"]), params["down_EFD"])
