"""GLaM 1.7B/256E: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_1_7b_256e.py --topology=v4:4x4x8
    python -m experiments.train --config=configs/papers/glam_1_7b_256e.py:nano --workdir=runs/glam_1_7b_256e

GLaM (arXiv:2112.06905), table 4: 105B parameters, 1.886B of them active; 256 experts, two for a token, in every
second layer. The counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts
once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "105B",
    "active": "1.886B",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "total": "the shape gives 104.2B; inconsistent with the other rows of the table",
        "active": "the shape gives 1.884B; inconsistent as the total is",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("1.7b", shape, E=256, fsdp=-1, expert=32)
