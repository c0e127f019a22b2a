"""GShard MoE(128E, 36L): what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/gshard_128e_36l.py --topology=v4:4x4x8
    python -m experiments.train --config=configs/papers/gshard_128e_36l.py:nano --workdir=runs/gshard_128e_36l

GShard (arXiv:2006.16668), table 1: 36 layers in both stacks together, 128 experts in every second one, the second
chosen at random by its weight; translation from 100 languages. Source and target have vocabularies of their own
(64,000 and 32,000); an expert a core. Slots go by token, not by choice, so that the decoder is causal.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._t5 import gshard

PUBLISHED = {
    "total": "37B",
    "source": "GShard (arXiv:2006.16668), table 1",
    "differs": {
        "total": "a nominal size from a grid of sizes; the shape gives 39.5B",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return gshard(shape, E=128, layers=36)
