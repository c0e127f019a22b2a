"""Encoders and decoders: GShard, Switch and ST-MoE (arXiv:2006.16668, 2101.03961, 2202.08906).

N layers in each of both stacks, RMS norms without biases. GShard has positions without parameters, and a vocabulary
each for source and target; Switch and ST-MoE are T5s: a table of relative positions in each stack, one vocabulary of
32,000 and 128 sentinels.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.papers import _nano


def t5(
    shape: str,
    D: int,
    N: int,
    H: int,
    A: int,
    ffn: str,
    moe: dict[str, Any],
    moe_layers: str = "every 2",
    position: str = "Relative(shared=True)",
    mesh: dict | None = None,
    **model: Any,
) -> ConfigDict:
    """Span corruption of 512 tokens, 2,048 sequences a step (2^20 tokens)."""
    config = ConfigDict()
    config.seed = 0
    config.mesh = mesh or {"fsdp": -1, "expert": 32}
    config.model = {
        "kind": "EncoderDecoder",
        **{"D": D, "N": N},
        "attention": f"MHA(H={H}, A={A}, position={position})",
        "ffn": ffn,
        "moe_layers": moe_layers,
        "tied": True,
        "remat": "save_collectives",
        "dtype": "bfloat16",
        "moe": {"experts": ffn, "losses": ("LoadBalance(0.01)",), **moe},
        **model,
    }
    config.data = {
        "source": "Tfds(name='c4')",
        "tokenizer": "SentencePiece(V=32000)",
        "objective": "SpanCorruption(density=0.15, span=3.0, sentinels=128)",
        "L": 512,
        "B": 2048,
        "microbatches": 1,
    }
    config.optim = {
        "optimizer": "Adafactor(decay=0.8)",
        "schedule": "InverseSqrt(peak=0.01, warmup=10000)",
        "clip": 1.0,
    }
    config.run = {"steps": 550_000, "log_every": 100, "eval_every": 5000, "save_every": 1000}
    return _nano.shaped(config, shape)


def gshard(shape: str, E: int, layers: int) -> ConfigDict:
    """`layers` in both stacks together, E experts in every second one; 4M tokens of each language a step."""
    moe = {
        "E": E,
        "router": "Top2(second='random')",
        "dispatch": "Scatter(capacity_factor=2.0, convention='gshard')",
        "S": 2048,
    }
    ends = {"tied": False, "position": "Sinusoidal()", "dtype": "float32"}
    config = t5("", 1024, layers // 2, 16, 128, "MLP(F=8192, activation='relu')", moe, **ends, mesh={"expert": -1})
    config.data.update(
        source="TfdsPairs(name='wmt19_translate/de-en', source='de', target='en')",
        tokenizer="SentencePiece(V=32000)",
        objective="Translation(source=SentencePiece(V=64000))",
        L=128,
        B=32_768,
        microbatches=2 if E == 128 else 1,
    )
    config.optim.optimizer = "Adafactor(decay=0.8, relative=False)"
    return _nano.shaped(config, shape)
