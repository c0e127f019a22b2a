"""Parameters of a model by kind, in all and for a token: arithmetic on its config."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax.core import dims
from moe_jax.models import EncoderDecoderConfig, Model, ViTConfig
from moe_jax.models.blocks import NORM_VECTORS
from moe_jax.models.pattern import Sublayer, layer_counts
from moe_jax.moe import MoEConfig
from moe_jax.moe_config import sizes_of

PARAMETER_KINDS = ("attention", "dense", "experts", "shared", "router", "norm", "position", "embedding", "head")
Letters = Iterable[str]  # dimensions of several parameters, "DF" and the like


class Kind(NamedTuple):
    """Parameters of one kind: total, and active for a token: K of E experts."""

    total: int
    active: int


class ParameterCount(NamedTuple):
    """Parameter counts of a model, by kind. Embeddings and heads count in both, once if tied."""

    kinds: Mapping[str, Kind]

    @property
    def total(self) -> int:
        return sum(kind.total for kind in self.kinds.values())

    @property
    def active(self) -> int:
        return sum(kind.active for kind in self.kinds.values())


def parameters(cfg: Model) -> ParameterCount:
    """Counts a model's parameters; a router that chooses fewer experts for some tokens counts with its most, K."""
    counts = Counter(ends(cfg))
    for sub, n in sublayer_counts(cfg):
        counts.update({kind: n * count for kind, count in sublayer_parameters(cfg, sub).items()})
    active = dict(counts)
    if cfg.routed is not None:
        active["experts"] = counts["experts"] * cfg.routed.router.K // cfg.routed.E
    return ParameterCount({kind: Kind(counts[kind], active.get(kind, 0)) for kind in PARAMETER_KINDS})


def sublayer_counts(cfg: Model) -> Iterator[tuple[Sublayer, int]]:
    """Yields the kinds of parts of a model, and how many there are of each."""
    for stack in cfg.stacks():
        for layer, n in layer_counts(cfg, stack).items():
            yield from ((sub, n) for sub in layer)


def sublayer_parameters(cfg: Model, sub: Sublayer) -> dict[str, int]:
    """Parameters of one part of a layer, its norm's among them."""
    return {"norm": cfg.D * NORM_VECTORS[cfg.norm], **PARTS[sub.kind](sub.part, cfg.D)}


def attention_parameters(part: Any, D: int) -> dict[str, int]:
    """Parameters of an attention, tables of positions separately."""
    letters = [dims.dims_of(name) for name in part.params]
    sizes = {**part.sizes, "D": D}
    tables = [m for m in letters if m.startswith("P")]
    return {
        "attention": n_parameters([m for m in letters if m not in tables], sizes),
        "position": n_parameters(tables, sizes),
    }


def dense_parameters(expert: Any, D: int) -> dict[str, int]:
    """Parameters of a dense feed-forward part."""
    return {"dense": expert_parameters(expert, D)}


def moe_parameters(cfg: MoEConfig, D: int) -> dict[str, int]:
    """Parameters of an MoE layer."""
    return {
        "experts": cfg.E * expert_parameters(cfg.experts, D),
        "shared": expert_parameters(cfg.shared, D),
        "router": n_parameters(map(dims.dims_of, cfg.router.params), {**sizes_of(cfg.router), "E": cfg.E, "D": D}),
    }


def ends(cfg: Model) -> dict[str, int]:
    """Parameters outside of the layers."""
    shared = [n_parameters([dims.dims_of(name)], sizes) for name, sizes in cfg.stack_params.items()]
    found = {"norm": cfg.STACKS * cfg.D * NORM_VECTORS[cfg.norm], "position": cfg.STACKS * sum(shared)}
    if isinstance(cfg, ViTConfig):
        patch = cfg.patch**2 * cfg.image[2]
        found |= {"embedding": (patch + 2) * cfg.D, "position": cfg.L * cfg.D}  # a bias, and the class token
        found["head"] = (cfg.D + 1) * cfg.V + cfg.representation * (cfg.D + 1) * cfg.D
        return found
    separate = cfg.V_source or 0 if isinstance(cfg, EncoderDecoderConfig) else 0
    return found | {"embedding": (cfg.V + separate) * cfg.D, "head": 0 if cfg.tied else cfg.V * cfg.D}


PARTS: dict[str, Callable[[Any, int], dict[str, int]]] = {
    "attention": attention_parameters,
    "dense": dense_parameters,
    "moe": moe_parameters,
}


def expert_parameters(expert: Any, D: int) -> int:
    """Parameters of one expert; 0 for None."""
    if expert is None:
        return 0
    return n_parameters(map(dims.dims_of, expert.params), {**sizes_of(expert), "D": D, "E": 1})


def n_parameters(arrays: Letters, sizes: Mapping[str, int]) -> int:
    """Counts the numbers in arrays of these dimensions."""
    return sum(math.prod(dims.shape_of(letters, sizes)) for letters in arrays)
