"""GLaM 137B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_137b.py --topology=v4:8x8x8
    python -m experiments.train --config=configs/papers/glam_137b.py:nano --workdir=runs/glam_137b

GLaM (arXiv:2112.06905), table 4: 137B parameters, 137B of them active; the dense model, GEGLU in every layer. The
counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "137B",
    "active": "137B",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "total": "the shape gives 137.7B, lingvo's 137,702,416,384 to the unit; the paper truncates",
        "active": "as the total",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("137b", shape)
