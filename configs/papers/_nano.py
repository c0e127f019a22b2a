"""A published model at a size that trains on a laptop: its components and pattern of layers, at small widths."""

import re

from ml_collections import ConfigDict

D, H, A, F, E, L, B = 64, 4, 16, 128, 16, 64, 32


def shaped(config: ConfigDict, shape: str) -> ConfigDict:
    """The published shape (""), or "nano"."""
    if shape not in ("", "nano"):
        raise ValueError(f"the shape {shape!r} is unknown; use nano, or none for the published one")
    return nano(config) if shape else config


def nano(config: ConfigDict) -> ConfigDict:
    """Widths, layers, experts and batch of a few minutes on 8 simulated devices; everything else is as published.

    A dense layer keeps its width relative to an expert's, a query its share of key heads. Slots of experts are counted
    by the exact convention, since the others have a minimum that is made for large groups.
    """
    model, data = config.model, config.data
    images = config.model.get("kind") == "ViT"
    wide = {name: width(model[name]) for name in ("ffn", "dense_after_moe") if model.get(name, "None") != "None"}
    base = width(model.moe.experts) if model.get("moe") else wide["ffn"]
    for name, n in wide.items():
        model[name] = of_width(model[name], 8 * max(1, round(F / 8 * n / base)))
    if model.get("moe"):
        model.moe.experts = of_width(model.moe.experts, F)
        if model.moe.get("shared", "None") != "None":
            model.moe.shared = of_width(model.moe.shared, 8 * max(1, round(F / 8 * width(model.moe.shared) / base)))
        model.moe.E = min(E, model.moe.E)
        model.moe.dispatch = re.sub(r"Scatter\(.*", "Scatter(capacity_factor=1.5)", model.moe.dispatch)
        model.moe.S = None
    moe_layers = model.get("moe_layers", "none")
    model.N = 4 if moe_layers.startswith("every 4") else 2
    if moe_layers.startswith("last"):
        model.moe_layers = "last 1"
    model.attention = small_heads(model.attention)
    model.D, model.dtype, model.remat = D, "float32", "none"
    sharded = bool(model.get("moe")) and model.moe.dispatch != "Sort()"
    config.mesh = {"data": 2, "expert": 4} if sharded else {"data": 8}
    config.data = {"L": 1 if images else L, "B": B, "microbatches": 1, "objective": data.objective}
    if images:
        model.patch = 2
        config.data.source = "Digits()"
    elif "Translation" in data.objective:
        config.data.source = "ToyTranslation()"
        config.data.objective = "Translation()"
    config.optim = {"optimizer": "AdamW(weight_decay=0.1)", "schedule": "Cosine(peak=0.005, warmup=50)", "clip": 1.0}
    config.run = {"steps": 400, "log_every": 20, "eval_every": 200, "eval_sequences": 512, "save_every": 200}
    return config


def small_heads(attention: str) -> str:
    """Returns the attention with few small heads, and as large a share of heads of keys."""
    heads, keys = (re.search(rf"\b{letter}=(\d+)", attention) for letter in "HJ")
    small = re.sub(r"\bH=\d+", f"H={H}", re.sub(r"\bA=\d+", f"A={A}", attention))
    return re.sub(r"\bJ=\d+", f"J={max(1, H * int(keys[1]) // int(heads[1]))}", small) if keys else small


def width(expert: str) -> int:
    """F of an expert's constructor call."""
    return int(re.search(r"F=(\d+)", expert)[1])


def of_width(expert: str, F: int) -> str:
    """Returns the expert with another F."""
    return re.sub(r"F=\d+", f"F={F}", expert)
