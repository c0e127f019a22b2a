"""Auxiliary losses: functions of global sums, so equal on every mesh. One line here registers one."""

from moe_jax.losses.load_balance import load_balance
from moe_jax.losses.router_z import router_z

LOSSES = (load_balance, router_z)

__all__ = ["LOSSES", "load_balance", "router_z"]
