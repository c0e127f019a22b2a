"""A tiny experiment with everything that planted bugs break: limits, noise, losses, biases, two axes."""


def get_config():
    moe = {
        "E": 8,
        "router": "TopK(K=2)",
        "experts": "MLP(F=8, bias=True)",
        "dispatch": "Scatter(capacity_factor=1.0)",
        "gating": ("Noise(0.1)",),
        "losses": ("LoadBalance(0.01)", "RouterZ(0.001)"),
    }
    model = {"D": 16, "N": 2, "attention": "MHA(2, 4)", "ffn": "GLU(F=8)", "moe_layers": "all"}
    model |= {"remat": "none", "moe": moe}
    data = {"source": "Corpus()", "tokenizer": "Bytes()", "L": 16, "B": 16}
    return {"mesh": {"data": 2, "expert": 2}, "model": model, "data": data}
