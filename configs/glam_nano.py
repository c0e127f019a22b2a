"""Does a sparse layer in every second position beat the dense model of equal active FLOPs?

    python -m experiments.train --config=configs/glam_nano.py --workdir=runs/glam_nano      (or: make train)

GLaM's recipe (arXiv:2112.06905) at the smallest size that answers: dense GEGLU layers and top-2 MoE layers
in turn, relative positions, byte tokens of eight domains, experts over 4 of 8 simulated devices.
Hardware: 2 CPU cores, under 4 GB. Time and the held-out loss to expect: docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": 2, "expert": 4}
    config.model = {
        "D": 96,
        "N": 2,
        "attention": "MHA(H=4, A=24, position=Relative())",
        "ffn": "GLU(F=256, activation='gelu')",
        "moe_layers": "every 2",
        "remat": "none",
        "moe": {
            "E": 32,
            "router": "Top2(second='always')",
            "experts": "MLP(F=192)",
            "dispatch": "Scatter(capacity_factor=1.5)",
            "shared": "None",
            "gating": (),
            "losses": ("LoadBalance(0.01)", "RouterZ(0.001)"),
            "S": 512,
            "init_scale": 1.0,
        },
    }
    config.data = {"source": "Corpus()", "tokenizer": "Bytes()", "L": 64, "B": 64, "microbatches": 1}
    config.optim = {
        "optimizer": "AdamW(weight_decay=0.1)",
        "schedule": "Cosine(peak=0.008, warmup=100)",
        "clip": 1.0,
    }
    config.run = {"steps": 1200, "log_every": 20, "eval_every": 400, "eval_sequences": 1024, "save_every": 400}
    return config
