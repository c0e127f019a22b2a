"""How many floating-point operations a model takes, by kind: arithmetic on its config."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.core import dims
from moe_jax.core.capacity import capacity
from moe_jax.costs.parameters import size
from moe_jax.models import Model, ViTConfig
from moe_jax.models.transformer import StackShape
from moe_jax.moe import MoEConfig
from moe_jax.moe_config import sizes_of


class Flops(NamedTuple):
    """Of the matrix multiplications of one sequence's forward pass, by kind: 2 for every multiply and add.

    "scores" are attention's, over the whole length, as it is computed. Look-ups, norms and activations are left out.
    """

    kinds: Mapping[str, int]
    tokens: int  # of the sequence, those of source and target
    slots: float  # rows that experts compute for one that a token has chosen: capacity that is not filled

    @property
    def forward(self) -> int:
        return sum(self.kinds.values())

    @property
    def training(self) -> int:
        """Forward and backward, which is twice the forward: what a model needs, and MFU is measured by."""
        return 3 * self.forward

    @property
    def per_token(self) -> float:
        """Forward, of a token."""
        return self.forward / self.tokens

    def computed(self, remat: str = "none") -> float:
        """Training as it is computed: with empty slots, and layers once more where they are rematerialised."""
        again = 0 if remat == "none" else 1
        layers = sum(n * (self.slots if kind == "experts" else 1) for kind, n in self.kinds.items() if kind != "head")
        return float((3 + again) * layers + 3 * self.kinds.get("head", 0))


def flops(cfg: Model, batch: Any) -> Flops:
    """Of a sequence of batches like this one (`DataConfig.shapes`)."""
    found = Counter({"head": head(cfg, batch)})
    shapes = cfg.stacks(batch)
    for stack, sparse in zip([s for s in shapes for _ in range(cfg.N)], cfg.sparse, strict=True):
        found.update(layer(cfg, stack, sparse))
    tokens = sum(stack.L for stack in shapes)
    slots = sum(stack.L * empty(stack.moe, stack.L) for stack in shapes) / tokens
    return Flops(dict(found), tokens, slots)


def layer(cfg: Model, stack: StackShape, sparse: bool) -> dict[str, int]:
    """A layer, on the sequences of its stack."""
    D, L, M, J = cfg.D, stack.L, stack.M, cfg.J or cfg.H
    queries, keys = 2 * D * cfg.H * cfg.A, 2 * D * J * cfg.A  # with outputs, with values
    found = {
        "attention": 2 * L * (queries + keys) + 2 * bool(M) * (L * queries + M * keys),
        "scores": 2 * 2 * L * (L + M) * cfg.H * cfg.A,
    }
    dense = cfg.ffn if not sparse else stack.moe
    if not isinstance(dense, MoEConfig):
        found["dense"] = 2 * L * matrices(dense, D)
    else:
        found["experts"] = 2 * L * dense.router.K * matrices(dense.experts, D)
        found["shared"] = 2 * L * matrices(dense.shared, D)
        found["router"] = 2 * L * router(dense, D)
    if sparse and cfg.extra is not None:
        found["dense"] = found.get("dense", 0) + 2 * L * matrices(cfg.extra, D)
    return found


def matrices(expert: Any, D: int) -> int:
    """Numbers in the matrices of an expert, which a row is multiplied with."""
    names = () if expert is None else expert.params
    letters = [dims.dims_of(n).removeprefix("E") for n in names]
    sizes = {} if expert is None else {**sizes_of(expert), "D": D}
    return size([m for m in letters if len(m) > 1], sizes)


def router(cfg: MoEConfig, D: int) -> int:
    """Numbers in the matrices of a router that a token is multiplied with; what it looks up by a task is not."""
    letters = [dims.dims_of(n) for n in cfg.router.params]
    sizes = {**sizes_of(cfg.router), "E": cfg.E, "D": D}
    return size([m for m in letters if len(m) > 1 and m != "ME"], sizes)


def head(cfg: Model, batch: Any) -> int:
    """From the last layer to logits; and, of images, from patches to the first layer."""
    if isinstance(cfg, ViTConfig):
        patches = 2 * (cfg.L - 1) * cfg.patch**2 * cfg.image[2] * cfg.D
        return patches + 2 * cfg.D * (cfg.V + cfg.representation * cfg.D)
    return 2 * cfg.stacks(batch)[-1].L * cfg.D * cfg.V


def empty(cfg: Any, L: int) -> float:
    """Slots for every choice that a token of a sequence of L makes."""
    if not isinstance(cfg, MoEConfig):
        return 1.0
    factor, S, K = cfg.dispatch.capacity_factor, cfg.S or L, cfg.router.K
    if factor is None:
        return 1.0
    return capacity(S, K, cfg.E, factor, cfg.dispatch.convention) * cfg.E / (S * K)
