"""The language model and one AdamW step in numpy, float64: what a training step must come to."""

import numpy as np

from tests import oracle


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(p, x, segment):
    """Causal inside segments, relative positions nearer than 16 (each distance its own bias). x [B, L, D]."""
    B, L, _ = x.shape
    q, k, v = (np.einsum("bld,dha->bhla", x, p[n]) for n in ("query_DHA", "key_DJA", "value_DJA"))
    y = np.zeros(q.shape)
    for b, h, at in np.ndindex(B, q.shape[1], L):
        seen = [m for m in range(at + 1) if segment[b, m] == segment[b, at]]
        scores = [q[b, h, at] @ k[b, h, m] / np.sqrt(q.shape[3]) + p["bias_PH"][at - m, h] for m in seen]
        y[b, h, at] = oracle.softmax(np.array(scores)) @ v[b, h, seen]
    return np.einsum("bhla,had->bld", y, p["out_HAD"])


def model(cfg, params, batch):
    """Mean nats per target and mean auxiliary loss of a model of one stack of (dense, sparse) layers."""
    params = _float64(params)
    embed, stack = params["embed_VD"], params["stack_0"]
    x = embed[batch.tokens_BL] * np.sqrt(cfg.D)
    aux = []
    for n in range(cfg.N // 2):
        p = {module: {k: w[n] for k, w in weights.items()} for module, weights in stack.items()}
        for i in (0, 1):
            x = x + attention(p[f"attention_{i}"], norm(x, p[f"norm_attention_{i}"]["scale_D"]), batch.segment_BL)
            h = norm(x, p["norm_ffn_0" if i == 0 else "norm_moe_1"]["scale_D"])
            if i == 0:
                w = p["ffn_0"]
                x = x + (gelu(h @ w["gate_DF"]) * (h @ w["up_DF"])) @ w["down_FD"]
            else:
                result = oracle.layer(cfg.moe, p["moe_1"], h, batch.segment_BL > 0)
                x, aux = x + result.y, [*aux, result.aux_loss]
    logits = norm(x, params["norm"]["scale_D"]) @ embed.T
    nats = [
        np.log(np.exp(logits[b, at] - logits[b, at].max()).sum())
        + logits[b, at].max()
        - logits[b, at, batch.target_BL[b, at]]
        for b, at in np.argwhere(batch.loss_mask_BL)
    ]
    return np.mean(nats), np.mean(aux)


def first_adamw_step(params, grads, rate, clip, b1, b2, eps, weight_decay, decayed):
    """Parameters (by name) after AdamW's first step on clipped gradients (arXiv:1711.05101, algorithm 2)."""
    total = np.sqrt(sum((g**2).sum() for g in grads.values()))
    after = {}
    for name, p in params.items():
        g = grads[name] * min(1, clip / total)
        m, v = (1 - b1) * g / (1 - b1), (1 - b2) * g**2 / (1 - b2)
        after[name] = p - rate * (m / (np.sqrt(v) + eps) + weight_decay * p * decayed(name))
    return after


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
