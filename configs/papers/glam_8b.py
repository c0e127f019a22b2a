"""GLaM 8B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_8b.py --topology=v4:4x4x4
    python -m experiments.train --config=configs/papers/glam_8b.py:nano --workdir=runs/glam_8b

GLaM (arXiv:2112.06905), table 4: 8.7B parameters, 8.7B of them active; the dense model, GEGLU in every layer. The
counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "8.7B",
    "active": "8.7B",
    "source": "GLaM (arXiv:2112.06905), table 4",
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("8b", shape)
