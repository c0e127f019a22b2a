"""GLaM (arXiv:2112.06905, table 4): a decoder with an MoE in every second layer.

Dense layers are GEGLU (three matrices), experts have two; a table of relative positions in every layer; the embedding
is tied, and counted once; RMS norms, no biases (praxis). The sum is the 137,702,416,384 that lingvo prints for its
dense 128B model, to the unit. Which of a pair of layers is sparse is not said in the paper (here the second).
"""

from ml_collections import ConfigDict

from configs.papers import _nano

SIZES = {  # D, F, N, H, A
    "0.1b": (768, 3072, 12, 12, 64),
    "1.7b": (2048, 8192, 24, 16, 128),
    "8b": (4096, 16384, 32, 32, 128),
    "64b": (8192, 32768, 64, 128, 128),
    "137b": (8192, 65536, 64, 128, 128),
}


def glam(size: str, shape: str = "", E: int = 0, V: int = 32_000, **mesh: int) -> ConfigDict:
    """A size of the table with E experts, or dense; 1,024 sequences of 1,024 tokens a step."""
    D, F, N, H, A = SIZES[size]
    config = ConfigDict()
    config.seed = 0
    config.mesh = mesh or {"fsdp": -1}
    config.model = {
        **{"D": D, "N": N},
        "attention": f"MHA(H={H}, A={A}, position=Relative())",
        "ffn": f"GLU(F={F}, activation='gelu')",
        "moe_layers": "every 2" if E else "none",
        "tied": True,
        "remat": "full",
        "dtype": "bfloat16",
    }
    if E:
        config.model.moe = {
            "E": E,
            "router": "Top2(second='always')",
            "experts": f"MLP(F={F}, activation='gelu')",
            "dispatch": "Scatter(capacity_factor=2.0, convention='gshard')",
            "losses": ("LoadBalance(0.01)",),
            "S": 1024,
        }
    config.data = {
        "source": "Tfds(name='c4')",
        "tokenizer": f"SentencePiece(V={V})",
        "objective": "NextToken()",
        "L": 1024,
        "B": 1024,
        "microbatches": 1,
    }
    config.optim = {
        "optimizer": "Adafactor(decay=0.8, smallest=128)",
        "schedule": "InverseSqrt(peak=0.01, warmup=10000)",
        "clip": 1.0,
    }
    config.run = {"steps": 600_000, "log_every": 100, "eval_every": 5000, "save_every": 1000}
    return _nano.shaped(config, shape)
