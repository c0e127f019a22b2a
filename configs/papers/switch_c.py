"""Switch-C: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/switch_c.py --topology=v5p:8x8x8
    python -m experiments.train --config=configs/papers/switch_c.py:nano --workdir=runs/switch_c

Switch Transformer (arXiv:2101.03961), table 9: 15 layers in each stack, 2,048 experts in all of them. 32 heads are
the table's; the release has 30, and the count cannot tell.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import t5

PUBLISHED = {
    "total": "1571B",
    "tokens": 576000000000,
    "source": "Switch Transformer (arXiv:2101.03961), table 9",
}


def get_config(shape: str = "") -> ConfigDict:
    return t5(
        shape,
        D=2080,
        N=15,
        H=32,
        A=64,
        ffn="MLP(F=6144, activation='relu')",
        moe_layers="all",
        tied=False,
        moe={
            "E": 2048,
            "router": "Switch()",
            "dispatch": "Scatter(capacity_factor=1.0, convention='flaxformer-large')",
            "S": 2048,
        },
        mesh={"fsdp": -1, "expert": 512},
    )
