"""GLaM 0.1B/64E (arXiv:2112.06905, table 4) on a Cloud TPU slice.

    python -m experiments.plan --config=configs/glam_pod.py --topology=v5e:4x4
    python -m experiments.prepare --config=configs/glam_pod.py --data_dir=/mnt/data
    python -m experiments.train --config=configs/glam_pod.py --data_dir=/mnt/data --workdir=/mnt/bucket/glam_pod

1,907,612,928 parameters, 152,296,704 of them active, embeddings included (the paper: 1.9B and 145M). 12 layers, every
second one with 64 experts of the dense layer's width. Experts are sharded over the expert axis, the batch over both
axes; -1 takes the rest of the devices.
Hardware: a slice of at least 16 TPU devices (v5e-16, v4-32), bfloat16. 100,000 steps of 256 sequences of 1,024 tokens,
26.2B tokens. Time by the plan: at least 0.21 s a step, 92 chip-hours or more; 9.0 of 15.8 GiB on a device of v5e:4x4.
Expect nothing of the loss from here: this config has not been run on a TPU by its authors.
C4 takes a cluster to make: experiments/launch/README.md has data that one machine can prepare.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": -1, "expert": 16}
    config.model = {
        "D": 768,
        "N": 12,
        "attention": "MHA(H=12, A=64, position=Relative())",
        "ffn": "GLU(F=3072, activation='gelu')",
        "moe_layers": "every 2",
        "tied": True,
        "remat": "full",
        "dtype": "bfloat16",
        "moe": {
            "E": 64,
            "router": "Top2(second='random')",
            "experts": "MLP(F=3072)",
            "dispatch": "Scatter(capacity_factor=1.25)",
            "shared": "None",
            "gating": (),
            "losses": ("LoadBalance(0.01)",),
            "S": 1024,
            "init_scale": 1.0,
        },
    }
    config.data = {
        "source": "Tfds(name='c4', text='text')",
        "tokenizer": "SentencePiece(V=32000)",
        "L": 1024,
        "B": 256,
        "microbatches": 1,
    }
    config.optim = {
        "optimizer": "Adafactor(decay=0.8, momentum=0.9)",
        "schedule": "InverseSqrt(peak=0.01, warmup=10000)",
        "clip": 1.0,
    }
    config.run = {
        "steps": 100_000,
        "log_every": 100,
        "eval_every": 2000,
        "eval_sequences": 4096,
        "save_every": 2000,
    }
    return config
