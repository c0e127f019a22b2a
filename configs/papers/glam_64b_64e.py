"""GLaM 64B/64E: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_64b_64e.py --topology=v4:8x8x16
    python -m experiments.train --config=configs/papers/glam_64b_64e.py:nano --workdir=runs/glam_64b_64e

GLaM (arXiv:2112.06905), table 4: 1.2T parameters, 96.6B of them active; 64 experts, two for a token, in every
second layer. The active count holds with the paper's vocabulary of 256,000, and with no other; the tied embedding
counts once, in both. Heads are twice as wide together as the model.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "1.2T",
    "active": "96.6B",
    "tokens": 600000000000,
    "source": "GLaM (arXiv:2112.06905), table 4",
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("64b", shape, E=64, V=256_000, fsdp=16, expert=16, tensor=4)
