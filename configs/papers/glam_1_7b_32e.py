"""GLaM 1.7B/32E: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_1_7b_32e.py --topology=v4:4x4x4
    python -m experiments.train --config=configs/papers/glam_1_7b_32e.py:nano --workdir=runs/glam_1_7b_32e

GLaM (arXiv:2112.06905), table 4: 20B parameters, 1.878B of them active; 32 experts, two for a token, in every
second layer. The counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts
once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "20B",
    "active": "1.878B",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "total": "an error of the paper: 32 experts in 12 layers are 12.9B, 14.0B with the rest",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("1.7b", shape, E=32, fsdp=-1, expert=16)
