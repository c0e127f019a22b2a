"""V-MoE-B/16, Every-2: what does it hold, what does a step cost?

    python -m experiments.plan --config=configs/papers/vmoe_b_16.py --topology=v4:4x4x4
    python -m experiments.train --config=configs/papers/vmoe_b_16.py:nano --workdir=runs/vmoe_b_16

V-MoE (arXiv:2106.05974): patches of 16 pixels, 32 experts in every second layer, two for a token, noisy gates that
are not normalised, capacity 1.05 in groups of 8 images. At test time the paper fills slots by priority:
`Scatter(0.5, priority='probability', convention='vmoe')`. JFT-300M is not public; the head has its 18,291 classes.
Nano: 2 CPU cores, a minute or two.
"""

from ml_collections import ConfigDict

from configs.papers._vit import vmoe

PUBLISHED = {
    "total": "979.0M",
    "source": "V-MoE (arXiv:2106.05974), table of sizes",
}


def get_config(shape: str = "") -> ConfigDict:
    return vmoe("B", 16, 0.0008, shape)
