"""Qwen3-30B-A3B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/qwen3_30b_a3b.py --topology=v5p:4x4x4
    python -m experiments.train --config=configs/papers/qwen3_30b_a3b.py:nano --workdir=runs/qwen3_30b_a3b

Qwen3 (arXiv:2505.09388): 128 experts in every layer, eight for a token, weights normalised; queries and keys
normalised by head; four heads of keys and values. Balance is counted over the whole batch. Batch and learning rate
are guesses.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._llama import qwen3

PUBLISHED = {
    "total": "30.5B",
    "active": "3.3B",
    "source": "Qwen3 technical report (arXiv:2505.09388), table 2, and model card",
    "differs": {
        "active": "the shape gives 3.35B with embedding and head, which the model card truncates to 3.3",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return qwen3(shape, D=2048, N=48, H=32, F=768)
