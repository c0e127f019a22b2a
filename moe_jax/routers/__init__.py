"""Routers: (params, x_GSD, mask_GS, ctx) -> Routing. One line here registers one.

A router declares its `params` (the suffix is the shape; those in `zeros` start at zero), the number K of choices per
token (at most), and whether it is `random`: trains otherwise than it evaluates, and needs keys for it. Where it differs
from the most, it also declares

    causal = False   its choices depend on later tokens
    grouped = True   its choices depend on a token's place in its routing group
    makes            the kind of routing, if not TokenChoice
    state            names of what it remembers, with update(state, stats) -> new values
    needs            "token" or "task": the ids it routes by
    gives            "load": a smooth estimate of it
    nulls            how many of its choices are experts that do nothing
    untrained        parameters that the task loss does not reach (law 3)
    check(E)         raises ValueError where E does not fit
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
