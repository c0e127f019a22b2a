"""Switch-Base: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/switch_base.py --topology=v4:4x4x8
    python -m experiments.train --config=configs/papers/switch_base.py:nano --workdir=runs/switch_base

Switch Transformer (arXiv:2101.03961), table 9: 12 layers in each stack, 128 experts in every second one, one for a
token. The table's GEGLU of 2,048 and the released ReLU of 3,072 (here) have the same number of parameters.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import t5

PUBLISHED = {
    "total": "7B",
    "tokens": 576000000000,
    "source": "Switch Transformer (arXiv:2101.03961), table 9",
}


def get_config(shape: str = "") -> ConfigDict:
    return t5(
        shape,
        D=768,
        N=12,
        H=12,
        A=64,
        ffn="MLP(F=3072, activation='relu')",
        moe={
            "E": 128,
            "router": "Switch()",
            "dispatch": "Scatter(capacity_factor=1.25, convention='flaxformer')",
            "S": 8192,
        },
    )
