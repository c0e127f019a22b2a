"""Does a bias that moves against the load balance experts as well as a loss?

    python -m experiments.train --config=configs/deepseek_nano.py --workdir=runs/deepseek_nano --compare=runs/glam_nano

DeepSeek-V3's choices (arXiv:2412.19437) at glam_nano's active FLOPs: 64 fine-grained experts, three per token, and a
shared expert that every token visits; sigmoid scores, and a bias, for the selection only, that rises where an
expert has less than the mean load; a sequence-wise loss of 0.0001. The bias moves ten times as fast as the paper's,
in a run that is far shorter.
Hardware: 2 CPU cores, under 4 GB. Time: about glam_nano's, 3:41 beside another job. Expect yes: a held-out loss of
1.343 (seed 0; glam_nano 1.371 on the same text), the busiest expert at 1.25 times the mean load.
"""

from ml_collections import ConfigDict

from configs import glam_nano


def get_config() -> ConfigDict:
    config = glam_nano.get_config()
    config.model.moe.E = 64
    config.model.moe.router = "LossFree(K=3, rate=0.01)"
    config.model.moe.experts = "GLU(F=64, activation='silu')"
    config.model.moe.shared = "GLU(F=64, activation='silu')"
    config.model.moe.losses = ("LoadBalance(0.0001, scope='sequence')",)
    return config
