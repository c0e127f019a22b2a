"""V-MoE (arXiv:2106.05974): vision transformers with 32 experts in every second layer, two for a token.

Layer norms, biases everywhere but in the router, a class token, learned positions, a dense layer with tanh before the
head of JFT-300M's 18,291 classes.
"""

from ml_collections import ConfigDict

from configs.papers import _nano

SIZES = {  # D, N, F, H
    "S": (512, 8, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}


def vmoe(size: str, patch: int, rate: float, shape: str = "", moe_layers: str = "every 2") -> ConfigDict:
    """A size with patches of `patch` pixels, at its peak learning rate; 4,096 images a step, groups of 8."""
    D, N, F, H = SIZES[size]
    tokens = 1 + (224 // patch) ** 2
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": -1, "expert": 32}
    config.model = {
        "kind": "ViT",
        **{"D": D, "N": N, "patch": patch},
        "attention": f"MHA(H={H}, A={D // H}, position=NoPE(), bias=True)",
        "ffn": f"MLP(F={F}, activation='gelu', bias=True)",
        "representation": True,
        "moe_layers": moe_layers,
        "remat": "save_collectives",
        "dtype": "bfloat16",
        "moe": {
            "E": 32,
            "router": "NoisyTopK(K=2, learned=False, normalize=False)",
            "experts": f"MLP(F={F}, activation='gelu', bias=True)",
            "dispatch": "Scatter(capacity_factor=1.05, convention='vmoe')",
            "losses": ("Importance(0.005, of='probs')", "Load(0.005)"),
            "S": 8 * tokens,
        },
    }
    config.data = {
        "source": "TfdsImages(name='imagenet21k', V=18291, side=224)",
        "objective": "Classification()",
        "L": 1,
        "B": 4096,
        "microbatches": 1,
    }
    config.optim = {
        "optimizer": "AdamW(b1=0.9, b2=0.999, weight_decay=0.1)",
        "schedule": f"WSD(peak={rate}, warmup=10000, decay=290000)",
        "clip": 10.0,
    }
    config.run = {"steps": 300_000, "log_every": 100, "eval_every": 5000, "save_every": 5000}
    return _nano.shaped(config, shape)
