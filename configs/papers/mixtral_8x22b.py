"""Mixtral 8x22B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/mixtral_8x22b.py --topology=v5p:4x4x8
    python -m experiments.train --config=configs/papers/mixtral_8x22b.py:nano --workdir=runs/mixtral_8x22b

Mixtral 8x22B: as 8x7B, wider and deeper; the vocabulary of the later release, 32,768. Batch, learning rate and data
are not published; these are guesses.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import llama

PUBLISHED = {
    "total": "141B",
    "active": "39B",
    "source": "Mixtral 8x22B, release notes of April 2024",
}


def get_config(shape: str = "") -> ConfigDict:
    return llama(
        shape,
        D=6144,
        N=56,
        H=48,
        J=8,
        A=128,
        V=32_768,
        base=1e6,
        moe={
            "E": 8,
            "router": "TopK(K=2)",
            "experts": "GLU(F=16384, activation='silu')",
            "losses": ("LoadBalance(0.001)",),
        },
    )
