"""GLaM 0.1B/64E: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/glam_0_1b_64e.py --topology=v4:2x2x4
    python -m experiments.train --config=configs/papers/glam_0_1b_64e.py:nano --workdir=runs/glam_0_1b_64e

GLaM (arXiv:2112.06905), table 4: 1.9B parameters, 145M of them active; 64 experts, two for a token, in every second
layer. The counts hold with a vocabulary of 32,000, though the paper says 256,000; the tied embedding counts once,
in both.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._glam import glam

PUBLISHED = {
    "total": "1.9B",
    "active": "145M",
    "source": "GLaM (arXiv:2112.06905), table 4",
    "differs": {
        "active": "the shape gives 5% more with any vocabulary that matches the total; unexplained",
    },
}


def get_config(shape: str = "") -> ConfigDict:
    return glam("0.1b", shape, E=64, data=-1, expert=16)
