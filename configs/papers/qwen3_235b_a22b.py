"""Qwen3-235B-A22B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/qwen3_235b_a22b.py --topology=v5p:4x8x8
    python -m experiments.train --config=configs/papers/qwen3_235b_a22b.py:nano --workdir=runs/qwen3_235b_a22b

Qwen3 (arXiv:2505.09388): 128 experts in every layer, eight for a token, weights normalised; queries and keys
normalised by head; four heads of keys and values. Balance is counted over the whole batch. Batch and learning rate
are guesses.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import qwen3

PUBLISHED = {
    "total": "235B",
    "active": "22B",
    "source": "Qwen3 technical report (arXiv:2505.09388), table 2, and model card",
}


def get_config(shape: str = "") -> ConfigDict:
    return qwen3(shape, D=4096, N=94, H=64, F=1536)
