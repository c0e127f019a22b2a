"""Layers that are measured, by name, and dispatchers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from moe_jax.config import suggestion
from moe_jax.core.groups import Ragged
from moe_jax.dispatch import Einsum, Scatter, Sort
from moe_jax.exchanges import AllToAll, RaggedAllToAll
from moe_jax.experts import GLU, MLP
from moe_jax.moe import MoEConfig
from moe_jax.routers import TopK

Value = TypeVar("Value")
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """T tokens of width D in sequences of L, which are the routing groups; each visits K of E experts.

    dtype: of tokens, which is the compute type.
    weights: type of the experts' parameters; float32 ones are cast where they are used, as in training.
    """

    name: str
    T: int
    D: int
    E: int
    K: int
    experts: Any
    L: int = 512
    dtype: str = "float32"
    weights: str = "float32"
    gpu: bool = False

    def layer(self, dispatch: Any) -> MoEConfig:
        """The MoE layer: the usual router and losses, and the exchange that carries the dispatcher's rows."""
        exchange = RaggedAllToAll() if dispatch.layout is Ragged else AllToAll()
        router = TopK(K=self.K, normalize=self.K > 1)  # the weight of one choice is its probability
        return MoEConfig(self.E, router, self.experts, dispatch, exchange, S=self.L)

    @property
    def dense_baseline(self) -> Any:
        """The dense layer of the same active FLOPs: one expert of K times the width."""
        return dataclasses.replace(self.experts, F=self.K * self.experts.F)


GROWTH = {"T": 4096, "D": 256, "K": 2, "experts": MLP(F=256)}  # the same rows and FLOPs, among more and more experts
GPU: tuple[tuple[str, Any], ...] = (
    ("", {"dtype": "bfloat16", "weights": "bfloat16", "gpu": True}),
    ("-cast", {"dtype": "bfloat16", "gpu": True}),
)
NAMED = (
    Shape("coarse-k1", T=4096, D=512, E=8, K=1, experts=MLP(F=2048)),
    Shape("coarse-k2", T=4096, D=512, E=8, K=2, experts=MLP(F=2048)),
    Shape("fine", T=4096, D=512, E=64, K=2, experts=MLP(F=1024)),
    # F/D of the published models, at an eighth and at a quarter of their widths.
    Shape("mixtral", T=4096, D=512, E=8, K=2, experts=GLU(F=1792)),  # Mixtral 8x7B: 14336 / 4096
    Shape("qwen3", T=4096, D=512, E=128, K=8, experts=GLU(F=192)),  # Qwen3-30B-A3B: 768 / 2048
    *(Shape(f"growth-{E}", E=E, **GROWTH) for E in (8, 64, 512)),
    *(Shape(f"gpu-a{cast}", T=24576, D=1536, E=128, K=8, experts=MLP(F=256), **types) for cast, types in GPU),
    *(Shape(f"gpu-b{cast}", T=32768, D=4096, E=64, K=4, experts=MLP(F=1024), **types) for cast, types in GPU),
)
SHAPES = {shape.name: shape for shape in NAMED}
QUICK = Shape("quick", T=64, D=32, E=8, K=2, experts=MLP(F=16), L=8)
QUICK_GLU = dataclasses.replace(QUICK, name="quick-glu", experts=GLU(F=16))
DISPATCHERS = {
    "Scatter(1.25)": Scatter(1.25),
    "Scatter(1.0)": Scatter(1.0),
    "Scatter(None)": Scatter(None),
    "Sort()": Sort(),
    "Einsum(1.25)": Einsum(1.25),
}


def usable(platform: str) -> dict[str, Shape]:
    """The shapes that are measured on a platform."""
    return {name: shape for name, shape in SHAPES.items() if shape.gpu <= (platform == "gpu")}


def choose(flag: str, names: Sequence[str] | None, known: Mapping[str, Value]) -> dict[str, Value]:
    """Values that a flag names, or all; ValueError lists the known names for an unknown one."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"--{flag} names {name!r}, which is none{suggestion(name, known)}")
    return {name: known[name] for name in names or known}


def masks_bytes(shape: Shape, C: int) -> int:
    """Bytes of the two dense float32 masks [T, E, C] that Einsum makes."""
    return 2 * 4 * shape.T * shape.E * C
