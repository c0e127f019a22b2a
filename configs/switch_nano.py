"""One expert per token: how much of top-2's gain does Switch's router keep, at its simpler exchange?

    python -m experiments.train --config=configs/switch_nano.py --workdir=runs/switch_nano

The Switch Transformer's choices (arXiv:2101.03961) in the decoder of glam_nano: top-1 with the raw probability as
weight, input jitter, initialisation scaled by 0.1, experts as wide as the dense layer (ReLU).
Hardware: 2 CPU cores, under 4 GB; about glam_nano's time. Expect it to start slower than top-2, and to
cross its dense baseline late.
"""

from ml_collections import ConfigDict

from configs import glam_nano


def get_config() -> ConfigDict:
    config = glam_nano.get_config()
    config.model.ffn = "MLP(F=384, activation='relu')"
    config.model.moe.router = "Switch()"
    config.model.moe.gating = ("Jitter(0.01)",)
    config.model.moe.experts = "MLP(F=384, activation='relu')"
    config.model.moe.losses = ("LoadBalance(0.01)",)
    config.model.moe.init_scale = 0.1
    return config
