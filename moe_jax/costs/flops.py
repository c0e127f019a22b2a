"""Floating-point operations of a model, by kind: arithmetic on its config."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.attention.layer import is_attention_matrix
from moe_jax.core import dims
from moe_jax.costs.parameters import n_parameters
from moe_jax.models import Model, ViTConfig
from moe_jax.models.pattern import StackShape, Sublayer, layer_counts
from moe_jax.moe import MoEConfig
from moe_jax.moe_config import sizes_of


class Flops(NamedTuple):
    """FLOPs of the matrix multiplications of one sequence's forward pass, by kind: 2 for every multiply and add.

    "scores" are attention's, over the full length, masked pairs included. Look-ups, norms and activations are left out.
    """

    kinds: Mapping[str, int]
    tokens: int  # of the sequence, those of source and target
    slots: float  # expert rows computed per row chosen: unfilled capacity

    @property
    def forward(self) -> int:
        return sum(self.kinds.values())

    @property
    def training(self) -> int:
        """FLOPs of forward and backward, which is twice the forward; MFU is measured by them."""
        return 3 * self.forward

    @property
    def per_token(self) -> float:
        """Forward FLOPs per token."""
        return self.forward / self.tokens

    def computed(self, remat: str = "none") -> float:
        """FLOPs of training as computed: with empty slots, and a second forward pass of rematerialised layers."""
        again = 0 if remat == "none" else 1
        layers = sum(n * (self.slots if kind == "experts" else 1) for kind, n in self.kinds.items() if kind != "head")
        return float((3 + again) * layers + 3 * self.kinds.get("head", 0))


def flops(cfg: Model, batch: Any) -> Flops:
    """Counts the FLOPs of one sequence of a batch like this one (`DataConfig.shapes`)."""
    found = Counter({"head": head_flops(cfg, batch)})
    shapes = cfg.stacks(batch)
    for stack in shapes:
        for layer, n in layer_counts(cfg, stack).items():
            for sub in layer:
                found.update({kind: n * of for kind, of in PARTS[sub.kind](sub, stack, cfg.D).items()})
    tokens = sum(stack.L for stack in shapes)
    slots = sum(stack.L * empty_slots(stack.moe if cfg.routed else None, stack.L) for stack in shapes) / tokens
    return Flops(dict(found), tokens, slots)


def score_flops(cfg: Model, batch: Any) -> int:
    """Number of scores (query, key, head) of all layers, for one sequence of a batch like this one."""
    return sum(
        n * stack.L * n_keys(sub, stack) * sub.part.sizes["H"]
        for stack in cfg.stacks(batch)
        for layer, n in layer_counts(cfg, stack).items()
        for sub in layer
        if sub.kind == "attention"
    )


def n_keys(sub: Sublayer, stack: StackShape) -> int:
    """Number of keys that every query of an attention is compared with, masked or not."""
    return stack.M if sub.memory else stack.L


def attention_flops(sub: Sublayer, stack: StackShape, D: int) -> dict[str, int]:
    """FLOPs of an attention on a sequence of its stack; keys and values are projected from a memory, if any."""
    part, M, sizes = sub.part, n_keys(sub, stack), {**sub.part.sizes, "D": D}
    tokens = {name: M if name in part.of_memory else stack.L for name in part.params if is_attention_matrix(name)}
    matrices = sum(2 * n * n_parameters([dims.dims_of(name)], sizes) for name, n in tokens.items())
    return {"attention": matrices, "scores": part.score_flops(stack.L, M)}


def dense_flops(sub: Sublayer, stack: StackShape, D: int) -> dict[str, int]:
    """FLOPs of a dense feed-forward part on a sequence of its stack."""
    return {"dense": 2 * stack.L * matmul_flops(sub.part, D)}


def moe_flops(sub: Sublayer, stack: StackShape, D: int) -> dict[str, int]:
    """FLOPs of an MoE layer on a sequence of its stack: K experts per token."""
    cfg, L = sub.part, stack.L
    return {
        "experts": 2 * L * cfg.router.K * matmul_flops(cfg.experts, D),
        "shared": 2 * L * matmul_flops(cfg.shared, D),
        "router": 2 * L * router_flops(cfg, D),
    }


PARTS: dict[str, Callable[[Sublayer, StackShape, int], dict[str, int]]] = {
    "attention": attention_flops,
    "dense": dense_flops,
    "moe": moe_flops,
}


def matmul_flops(expert: Any, D: int) -> int:
    """Numbers in the matrices of an expert: multiply-adds per row."""
    names = () if expert is None else expert.params
    letters = [dims.dims_of(n).removeprefix("E") for n in names]
    sizes = {} if expert is None else {**sizes_of(expert), "D": D}
    return n_parameters([m for m in letters if len(m) > 1], sizes)


def router_flops(cfg: MoEConfig, D: int) -> int:
    """Numbers in the matrices of a router: multiply-adds per token; look-ups by task are not included."""
    letters = [dims.dims_of(n) for n in cfg.router.params]
    sizes = {**sizes_of(cfg.router), "E": cfg.E, "D": D}
    return n_parameters([m for m in letters if len(m) > 1 and m != "ME"], sizes)


def head_flops(cfg: Model, batch: Any) -> int:
    """FLOPs from the last layer to logits; for images also of the projection of patches."""
    if isinstance(cfg, ViTConfig):
        patches = 2 * (cfg.L - 1) * cfg.patch**2 * cfg.image[2] * cfg.D
        return patches + 2 * cfg.D * (cfg.V + cfg.representation * cfg.D)
    return 2 * cfg.stacks(batch)[-1].L * cfg.D * cfg.V


def empty_slots(cfg: MoEConfig | None, L: int) -> float:
    """Expert slots per choice, for sequences of L tokens; 1 without capacity."""
    if cfg is None or cfg.dispatch.capacity_factor is None:
        return 1.0
    S = cfg.group(cfg.sequences(L), L, training=True)
    return cfg.dispatch.slots(S, cfg.router.K, cfg.E) * cfg.E / (S * cfg.router.K)
