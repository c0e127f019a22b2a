"""Does a vision transformer with experts in every second layer beat the dense one of equal active FLOPs on few images?

    python -m experiments.train --config=configs/vmoe_nano.py --workdir=runs/vmoe_nano

V-MoE's choices (arXiv:2106.05974) on 1,463 digits of 8 x 8 pixels: noisy top-2 of all the softmax, its importance and
load losses, its rounding of capacity, slots to the surest tokens first, groups of eight images.
Hardware: 2 CPU cores, under 2 GB; time: two minutes. Expect 90.0 % (88.6 to 91.9) of the held-out digits right, mean
of three seeds and their range; its dense baseline had 89.5 % (88.0 to 90.4). See experiments/vision.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": 2, "expert": 4}
    config.model = {
        "kind": "ViT",
        "patch": 2,
        "D": 48,
        "N": 4,
        "attention": "MHA(H=4, A=12, position=NoPE(), bias=True)",
        "ffn": "MLP(F=96, bias=True)",
        "moe_layers": "every 2",
        "remat": "none",
        "moe": {
            "E": 8,
            "router": "NoisyTopK(K=2, learned=False, normalize=False)",
            "experts": "MLP(F=96, bias=True)",
            "dispatch": "Scatter(capacity_factor=1.05, priority='probability', convention='vmoe')",
            "losses": ("Importance(0.005, of='probs')", "Load(0.005)"),
            "S": 136,
        },
    }
    config.data = {"source": "Digits()", "objective": "Classification(shift=1)", "L": 1, "B": 64}
    config.optim = {
        "optimizer": "AdamW(weight_decay=0.1)",
        "schedule": "Cosine(peak=0.003, warmup=100)",
        "clip": 1.0,
    }
    config.run = {"steps": 1000, "log_every": 50, "eval_every": 250, "eval_sequences": 512, "save_every": 500}
    return config
