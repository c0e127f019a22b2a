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
        gate, up = (groups.matmul(x, params[name]) for name in ("gate_EDF", "up_EDF"))
        hidden = groups.elementwise(lambda gate, up: activation(self.activation)(gate) * up, gate, up)
        return groups.matmul(hidden, params["down_EFD"])
