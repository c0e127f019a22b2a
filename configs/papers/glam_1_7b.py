"""GLaM 1.7B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_1_7b.py --topology=v4:2x2x4
    python -m experiments.train --config=configs/papers/glam_1_7b.py:nano --workdir=runs/glam_1_7b

GLaM (arXiv:2112.06905), table 4: 1.7B parameters, 1.700B of them active; the dense model, GEGLU in every layer. The
counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "1.7B",
    "active": "1.700B",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "active": "the shape gives 1.676B, which rounds to the total as printed",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("1.7b", shape)
