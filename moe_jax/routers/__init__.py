"""Routers: (params, x_GSD, mask_GS, ctx) -> Routing. One line here registers one.

A router declares its `params`, the number K of choices per token (at most), and other traits of `core.traits.Traits`
where they differ from the defaults: `distinct` where a token's K choices are always different experts, so that an
exchange needs room for fewer rows. A router with `state` has update(state, stats) -> new values. A router that needs
certain numbers of experts has check(E), which raises ValueError. A router that makes no TokenChoice has slots(S, E),
the slots of each of E experts for a group of S tokens.
"""

from moe_jax.routers.base_layers import BASELayer
from moe_jax.routers.controls import Random, RoundRobin
from moe_jax.routers.cosine_top_k import CosineTopK
from moe_jax.routers.expert_choice import ExpertChoice
from moe_jax.routers.hashed import Hash
from moe_jax.routers.hierarchical import Hierarchical
from moe_jax.routers.loss_free import LossFree
from moe_jax.routers.mixture_of_depths import MixtureOfDepths
from moe_jax.routers.noisy_top_k import NoisyTopK
from moe_jax.routers.null_experts import NullExperts
from moe_jax.routers.sampled import Sampled
from moe_jax.routers.sinkhorn import Sinkhorn
from moe_jax.routers.soft_moe import SoftMoE
from moe_jax.routers.switch import Switch
from moe_jax.routers.task_top_k import TaskTopK
from moe_jax.routers.top2 import Top2
from moe_jax.routers.top_k import TopK
from moe_jax.routers.top_p import TopP

ROUTERS = (
    *(Switch, TopK, Top2, NoisyTopK, LossFree, CosineTopK, TopP, NullExperts, Sampled, Hierarchical, TaskTopK),
    *(Hash, BASELayer, Sinkhorn, Random, RoundRobin),
    *(ExpertChoice, SoftMoE, MixtureOfDepths),
)

__all__ = [
    "ROUTERS",
    "BASELayer",
    "CosineTopK",
    "ExpertChoice",
    "Hash",
    "Hierarchical",
    "LossFree",
    "MixtureOfDepths",
    "NoisyTopK",
    "NullExperts",
    "Random",
    "RoundRobin",
    "Sampled",
    "Sinkhorn",
    "SoftMoE",
    "Switch",
    "TaskTopK",
    "Top2",
    "TopK",
    "TopP",
]
