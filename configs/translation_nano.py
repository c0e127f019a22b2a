"""Can experts in an encoder and a decoder translate into four languages, each with its own words and order?

    python -m experiments.train --config=configs/translation_nano.py --workdir=runs/translation_nano

GShard's recipe (arXiv:2006.16668) at the smallest size that answers: top-2 MoE in every second layer of both stacks,
groups of one sentence, byte tokens. A toy language has its own word for each word, and says sentences backwards or
begins them elsewhere, so that nothing can be copied and attention has to find the word; held-out sentences are new.
Hardware: 2 CPU cores, under 2 GB; time: about 1.5 minutes. Expect 98% of the held-out tokens right after 400 steps,
99.9% after 600, and fewer than 1 of 10,000 wrong at the end (loss 0.001).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": 2, "expert": 4}
    config.model = {
        "kind": "EncoderDecoder",
        "D": 64,
        "N": 2,
        "attention": "MHA(H=4, A=16, position=Sinusoidal())",
        "ffn": "MLP(F=128, activation='relu')",
        "moe_layers": "every 2",
        "remat": "none",
        "moe": {
            "E": 8,
            "router": "Top2()",
            "experts": "MLP(F=128, activation='relu')",
            "dispatch": "Scatter(capacity_factor=2.0)",
            "losses": ("LoadBalance(0.01)",),
        },
    }
    config.data = {"source": "ToyTranslation()", "objective": "Translation()", "L": 20, "B": 64}
    config.optim = {
        "optimizer": "AdamW(weight_decay=0.1)",
        "schedule": "Cosine(peak=0.006, warmup=100)",
        "clip": 1.0,
    }
    config.run = {"steps": 800, "log_every": 20, "eval_every": 200, "eval_sequences": 1024, "save_every": 200}
    return config
