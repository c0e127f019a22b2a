"""What proves the laws on a user's own config."""

from moe_jax.audit.routing import Verdict, batch_independent, causal, trainable

__all__ = ["Verdict", "batch_independent", "causal", "trainable"]
