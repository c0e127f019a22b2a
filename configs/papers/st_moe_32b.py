"""ST-MoE-32B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/st_moe_32b.py --topology=v5p:4x8x8
    python -m experiments.train --config=configs/papers/st_moe_32b.py:nano --workdir=runs/st_moe_32b

ST-MoE (arXiv:2202.08906), table 11: 64 experts in every fourth layer, two for a token, the second where its weight
is at least a fifth. 24 layers in each stack, and a dense feed-forward with its own norm after each sparse one, as
released; the table's 27 layers without it have as many parameters in print.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import t5

PUBLISHED = {
    "total": "269B",
    "tokens": 1500000000000,
    "source": "ST-MoE (arXiv:2202.08906), table 11",
}


def get_config(shape: str = "") -> ConfigDict:
    return t5(
        shape,
        D=5120,
        N=24,
        H=64,
        A=128,
        ffn="GLU(F=20480, activation='gelu')",
        dense_after_moe="GLU(F=20480, activation='gelu')",
        moe_layers="every 4",
        tied=False,
        moe={
            "E": 64,
            "router": "Top2(second='random', threshold=0.2)",
            "dispatch": "Scatter(capacity_factor=1.25, convention='flaxformer')",
            "losses": ("LoadBalance(0.01)", "RouterZ(0.001)"),
            "S": 4096,
        },
        mesh={"fsdp": -1, "expert": 16},
    )
