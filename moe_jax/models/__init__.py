"""Models: Linen shells around the pure functions of the layers below."""

from moe_jax.models.lm import LM, LMConfig

__all__ = ["LM", "LMConfig"]
