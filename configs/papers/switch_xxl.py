"""Switch-XXL: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/switch_xxl.py --topology=v5p:4x8x8
    python -m experiments.train --config=configs/papers/switch_xxl.py:nano --workdir=runs/switch_xxl

Switch Transformer (arXiv:2101.03961), table 9, says 64 experts; the count needs the 128 of the release (64 give
201B). Logits have a matrix of their own.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import t5

PUBLISHED = {
    "total": "395B",
    "tokens": 576000000000,
    "source": "Switch Transformer (arXiv:2101.03961), table 9",
}


def get_config(shape: str = "") -> ConfigDict:
    return t5(
        shape,
        D=4096,
        N=24,
        H=64,
        A=64,
        ffn="GLU(F=10240, activation='gelu')",
        tied=False,
        moe={
            "E": 128,
            "router": "Switch()",
            "dispatch": "Scatter(capacity_factor=1.25, convention='flaxformer-large')",
            "S": 4096,
        },
        mesh={"fsdp": -1, "expert": 32},
    )
