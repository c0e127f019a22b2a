"""DeepSeekMoE 16B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/deepseekmoe_16b.py --topology=v5p:4x4x4
    python -m experiments.train --config=configs/papers/deepseekmoe_16b.py:nano --workdir=runs/deepseekmoe_16b

DeepSeekMoE 16B (arXiv:2401.06066): fine-grained experts, 64 of which a token visits six, beside two that every
token visits (here one of twice the width, which is the same); the first layer is dense. Weights are not normalised.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import llama

PUBLISHED = {
    "total": "16.4B",
    "active": "2.8B",
    "tokens": 2000000000000,
    "source": "DeepSeekMoE (arXiv:2401.06066), table 2",
}


def get_config(shape: str = "") -> ConfigDict:
    return llama(
        shape,
        D=2048,
        N=28,
        H=16,
        A=128,
        V=102_400,
        B=4608,
        microbatches=9,
        ffn="GLU(F=10944, activation='silu')",
        moe_layers="last 27",
        moe={
            "E": 64,
            "router": "TopK(K=6, normalize=False)",
            "experts": "GLU(F=1408, activation='silu')",
            "shared": "GLU(F=2816, activation='silu')",
            "losses": ("LoadBalance(0.001)",),
        },
    )
