"""Dropless top-2 in every layer: what does it cost to drop nothing?

    python -m experiments.train --config=configs/mixtral_nano.py --workdir=runs/mixtral_nano

Mixtral's choices (arXiv:2401.04088): SwiGLU experts in all layers, weights from a softmax over the two selected
logits, rotary positions, untied embeddings, no token ever dropped. Rows are sorted by expert and multiplied in
groups, so every device holds all 8 experts, and the mesh is data only.
Hardware: 2 CPU cores, under 4 GB; about twice glam_nano's time. Expect a drop rate of exactly 0.
"""

from ml_collections import ConfigDict

from configs import glam_nano


def get_config() -> ConfigDict:
    config = glam_nano.get_config()
    config.mesh = {"data": 8, "expert": 1}
    config.model.attention = "MHA(H=4, A=24)"
    config.model.tied = False
    config.model.moe_layers = "all"
    config.model.moe.E = 8
    config.model.moe.router = "TopK(K=2)"
    config.model.moe.experts = "GLU(F=128, activation='silu')"
    config.model.moe.dispatch = "Sort()"
    config.model.moe.losses = ("LoadBalance(0.02)",)
    return config
