"""GLaM 1.7B/64E: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_1_7b_64e.py --topology=v4:4x4x4
    python -m experiments.train --config=configs/papers/glam_1_7b_64e.py:nano --workdir=runs/glam_1_7b_64e

GLaM (arXiv:2112.06905), table 4: 27B parameters, 1.879B of them active; 64 experts, two for a token, in every
second layer. The counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts
once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "27B",
    "active": "1.879B",
    "source": "GLaM (arXiv:2112.06905), table 4",
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("1.7b", shape, E=64, fsdp=-1, expert=16)
