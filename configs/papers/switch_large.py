"""Switch-Large: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/switch_large.py --topology=v4:4x4x8
    python -m experiments.train --config=configs/papers/switch_large.py:nano --workdir=runs/switch_large

Switch Transformer (arXiv:2101.03961), table 9: 24 layers in each stack. The released ReLU of 4,096 gives the
published count; the table's GEGLU of 2,816 would print as 27B.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import t5

PUBLISHED = {
    "total": "26B",
    "tokens": 576000000000,
    "source": "Switch Transformer (arXiv:2101.03961), table 9",
}


def get_config(shape: str = "") -> ConfigDict:
    return t5(
        shape,
        D=1024,
        N=24,
        H=16,
        A=64,
        ffn="MLP(F=4096, activation='relu')",
        moe={
            "E": 128,
            "router": "Switch()",
            "dispatch": "Scatter(capacity_factor=1.25, convention='flaxformer')",
            "S": 4096,
        },
    )
