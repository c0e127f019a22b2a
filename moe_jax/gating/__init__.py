"""Gating transforms of any router: of its input, its logits, or the experts that may be chosen. One line registers one.

    on = "input"    (x_GSD, ctx, keys_G or None) -> x_GSD     experts still get the tokens unchanged
    on = "logits"   (logits_GSI, ctx, keys_G or None) -> logits_GSI
    on = "experts"  (ctx, key) -> dropped_GE                  while training only, where it is random

Transforms are applied in order; without keys (evaluation) nothing is random. A `scheduled` transform reads `step_`, the
number of updates so far, from the router's state. `masked` is for experiments on a trained model, not
for configs.
"""

from moe_jax.gating.dropout import ExpertDropout, GatingDropout
from moe_jax.gating.noise import Jitter, Noise
from moe_jax.gating.soft_cap import SoftCap
from moe_jax.gating.temperature import Temperature

GATING = (Temperature, Jitter, Noise, SoftCap, ExpertDropout, GatingDropout)

__all__ = ["GATING", "ExpertDropout", "GatingDropout", "Jitter", "Noise", "SoftCap", "Temperature"]
