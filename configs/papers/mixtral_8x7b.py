"""Mixtral 8x7B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/mixtral_8x7b.py --topology=v5p:4x4x4
    python -m experiments.train --config=configs/papers/mixtral_8x7b.py:nano --workdir=runs/mixtral_8x7b

Mixtral 8x7B (arXiv:2401.04088): 8 SwiGLU experts in every layer, two for a token, weights from a softmax over the
two logits; 8 heads of keys and values for 32 of queries; base of the rotary positions 1e6. The active count rounds
12.88B. Batch, learning rate and data are not published; these are guesses.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import llama

PUBLISHED = {
    "total": "46.7B",
    "active": "12.9B",
    "source": "Mixtral of Experts (arXiv:2401.04088), table 1 and release",
}


def get_config(shape: str = "") -> ConfigDict:
    return llama(
        shape,
        D=4096,
        N=32,
        H=32,
        J=8,
        A=128,
        V=32_000,
        microbatches=4,
        base=1e6,
        moe={
            "E": 8,
            "router": "TopK(K=2)",
            "experts": "GLU(F=14336, activation='silu')",
            "losses": ("LoadBalance(0.02)",),
        },
        mesh={"fsdp": -1, "expert": 8},
        remat="full",
    )
