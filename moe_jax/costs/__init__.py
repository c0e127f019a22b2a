"""Costs of a config, by arithmetic on it alone: parameters, FLOPs, memory, energy, communication."""

from moe_jax.costs.flops import Flops, flops, scores
from moe_jax.costs.parameters import KINDS, Kind, Parameters, parameters

__all__ = ["KINDS", "Flops", "Kind", "Parameters", "flops", "parameters", "scores"]
