"""Costs of a config, by arithmetic on it alone: parameters, FLOPs, memory, energy, communication."""

from moe_jax.costs.flops import Flops, flops, score_flops
from moe_jax.costs.parameters import PARAMETER_KINDS, Kind, ParameterCount, parameters

__all__ = ["PARAMETER_KINDS", "Flops", "Kind", "ParameterCount", "flops", "parameters", "score_flops"]
