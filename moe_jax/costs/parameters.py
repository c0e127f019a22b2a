"""How many parameters a model has, by kind, in all and for a token: arithmetic on its config."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax.core import dims
from moe_jax.models import EncoderDecoderConfig, Model, ViTConfig
from moe_jax.models.blocks import BUCKETS
from moe_jax.moe import MoEConfig
from moe_jax.moe_config import sizes_of

KINDS = ("attention", "dense", "experts", "shared", "router", "norm", "position", "embedding", "head")
Letters = Iterable[str]  # dimensions of several parameters, "DF" and the like


class Kind(NamedTuple):
    """Parameters of one kind: all, and those that a token meets: K of E experts."""

    total: int
    active: int


class Parameters(NamedTuple):
    """Of a model, by kind. Embeddings and heads count in both, once where they are tied."""

    kinds: Mapping[str, Kind]

    @property
    def total(self) -> int:
        return sum(kind.total for kind in self.kinds.values())

    @property
    def active(self) -> int:
        return sum(kind.active for kind in self.kinds.values())


def parameters(cfg: Model) -> Parameters:
    """Counts a model's parameters; a router that chooses fewer experts for some tokens counts with its most, K."""
    counts = Counter(ends(cfg))
    for i, sparse in enumerate(cfg.sparse):
        counts.update(layer(cfg, sparse, attends=i >= cfg.N))
    active = dict(counts)
    if isinstance(cfg.moe, MoEConfig):
        active["experts"] = counts["experts"] * cfg.moe.router.K // cfg.moe.E
    return Parameters({kind: Kind(counts[kind], active.get(kind, 0)) for kind in KINDS})


def layer(cfg: Model, sparse: bool, attends: bool = False) -> dict[str, int]:
    """Parameters of one layer; `attends`: to a memory too, as a decoder's."""
    heads = {"D": cfg.D, "H": cfg.H, "J": cfg.J or cfg.H, "A": cfg.A, "P": BUCKETS}
    attention = ["DHA", "DJA", "DJA", "HAD"] + ["HA", "JA", "JA", "D"] * cfg.biases
    attention += {"none": [], "head": ["A", "A"], "all": ["HA", "JA"]}[cfg.qk_norm]
    extra = sparse and cfg.extra is not None
    norms = 2 + attends + extra
    found = {
        "attention": (1 + attends) * size(attention, heads),
        "position": size(["PH"], heads) if cfg.position == "relative" else 0,
        "norm": norms * cfg.D * (1 + cfg.biases),
    }
    if not sparse or not isinstance(cfg.moe, MoEConfig):
        found["dense"] = of(cfg.moe if sparse else cfg.ffn, cfg.D)
    else:
        found |= moe(cfg.moe, cfg.D)
    if extra:
        found["dense"] = found.get("dense", 0) + of(cfg.extra, cfg.D)
    return found


def moe(cfg: MoEConfig, D: int) -> dict[str, int]:
    """Parameters of a MoE layer."""
    return {
        "experts": cfg.E * of(cfg.experts, D),
        "shared": of(cfg.shared, D),
        "router": size(map(dims.dims_of, cfg.router.params), {**sizes_of(cfg.router), "E": cfg.E, "D": D}),
    }


def ends(cfg: Model) -> dict[str, int]:
    """Parameters outside of the layers."""
    found = {"norm": cfg.STACKS * cfg.D * (1 + cfg.biases)}
    if cfg.position == "shared":
        found["position"] = cfg.STACKS * BUCKETS * cfg.H
    if isinstance(cfg, ViTConfig):
        patch = cfg.patch**2 * cfg.image[2]
        found |= {"embedding": (patch + 2) * cfg.D, "position": cfg.L * cfg.D}  # a bias, and the class token
        found["head"] = (cfg.D + 1) * cfg.V + cfg.representation * (cfg.D + 1) * cfg.D
        return found
    separate = cfg.V_source or 0 if isinstance(cfg, EncoderDecoderConfig) else 0
    return found | {"embedding": (cfg.V + separate) * cfg.D, "head": 0 if cfg.tied else cfg.V * cfg.D}


def of(expert: Any, D: int) -> int:
    """Parameters of one expert, or of none."""
    if expert is None:
        return 0
    return size(map(dims.dims_of, expert.params), {**sizes_of(expert), "D": D, "E": 1})


def size(arrays: Letters, sizes: Mapping[str, int]) -> int:
    """How many numbers arrays of these dimensions have."""
    return sum(math.prod(dims.shape(letters, sizes)) for letters in arrays)
