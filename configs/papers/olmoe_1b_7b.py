"""OLMoE-1B-7B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/olmoe_1b_7b.py --topology=v5e:8x8
    python -m experiments.train --config=configs/papers/olmoe_1b_7b.py:nano --workdir=runs/olmoe_1b_7b

OLMoE-1B-7B (arXiv:2409.02060): 64 small experts in every layer, eight for a token, weights not normalised; queries
and keys normalised over all heads together; nothing dropped. Balance and z-loss coefficients, AdamW with decay of
everything, batch and warm-up are the release's.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import llama

PUBLISHED = {
    "total": "6.9B",
    "active": "1.3B",
    "tokens": 5117000000000,
    "source": "OLMoE (arXiv:2409.02060), table 1",
}


def get_config(shape: str = "") -> ConfigDict:
    return llama(
        shape,
        D=2048,
        N=16,
        H=16,
        A=128,
        V=50_304,
        microbatches=8,
        qk_norm="all",
        moe={
            "E": 64,
            "router": "TopK(K=8, normalize=False)",
            "experts": "GLU(F=1024, activation='silu')",
            "losses": ("LoadBalance(0.01, 'sum')", "RouterZ(0.001)"),
        },
        optim={
            "optimizer": "AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)",
            "schedule": "Cosine(peak=0.0004, warmup=2500)",
            "clip": 1.0,
            "no_decay": (),
        },
    )
