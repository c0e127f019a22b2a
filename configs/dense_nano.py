"""The dense baseline of glam_nano, against which its result is measured.

    python -m experiments.train --config=configs/dense_nano.py --workdir=runs/dense_nano --compare=runs/glam_nano

Derived from glam_nano by a function, so that the two cannot drift apart: every MoE layer becomes one expert of
K times the width, everything else is equal, and so are the matrix multiplications per token.
Hardware and time: as glam_nano. The held-out loss to expect: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import glam_nano
from moe_jax.config import dense_baseline


def get_config() -> ConfigDict:
    return dense_baseline(glam_nano.get_config())
