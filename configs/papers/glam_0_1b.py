"""GLaM 0.1B: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_0_1b.py --topology=v4:2x2x4
    python -m experiments.train --config=configs/papers/glam_0_1b.py:nano --workdir=runs/glam_0_1b

GLaM (arXiv:2112.06905), table 4: 130M parameters, 130M of them active; the dense model, GEGLU in every layer. The
counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts once, in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "130M",
    "active": "130M",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "total": "the shape gives 137.8M with V=32,000; unexplained",
        "active": "as the total",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("0.1b", shape)
