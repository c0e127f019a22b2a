"""Gating transforms of any router: of its input, its logits, or the experts that may be chosen. One line registers one.

    on = "input"    (x_GSD, ctx, keys_G or None) -> x_GSD     the experts still see their tokens as they are
    on = "logits"   (logits_GSI, ctx, keys_G or None) -> logits_GSI
    on = "experts"  (ctx, key) -> dropped_GE                  while training only, where it is random

They are applied in their order; without keys (evaluation) nothing is random. One that is `scheduled` reads `step_`, the
number of updates so far, in the router's state. `masked` is for experiments on a
trained model, and no config names it.
"""

from moe_jax.gating.dropout import ExpertDropout, GatingDropout
from moe_jax.gating.noise import Jitter, Noise
from moe_jax.gating.soft_cap import SoftCap
from moe_jax.gating.temperature import Temperature

GATING = (Temperature, Jitter, Noise, SoftCap, ExpertDropout, GatingDropout)

__all__ = ["GATING", *(transform.__name__ for transform in GATING)]
