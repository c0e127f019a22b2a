"""Attentions in numpy, float64 and plain loops, from the papers' formulas. `attention` is told apart by class names.

It imports nothing of moe_jax; configurations are only read, by their fields.
"""

import math
from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Queries by document (0 is padding) and position in it, and keys where these are not the same tokens."""

    segment: np.ndarray  # [B, L]
    position: np.ndarray
    both: bool = False  # a query sees keys after it
    key_segment: np.ndarray | None = None  # [B, M]
    key_position: np.ndarray | None = None


# ---------------------------------------------------------------- positions


def turns_per_position(position, width):
    """Radians by which every pair of a head of this width turns from one position to the next."""
    n = int(width * position.fraction) // 2
    theta = [position.base ** (-2 * i / (2 * n)) for i in range(n)]
    scaling = position.scaling
    return np.array([scaled(scaling, i, n, theta[i], position.base) for i in range(n)]) if scaling else np.array(theta)


def scaled(s, i, n, theta, base):
    """The frequency of pair i of n under a scaling."""
    kind = type(s).__name__
    if kind == "Linear":
        return theta / s.factor
    if kind == "Llama3":
        wavelength = 2 * math.pi / theta
        if wavelength < s.original / s.high:
            return theta
        if wavelength > s.original / s.low:
            return theta / s.factor
        smooth = (s.original / wavelength - s.low) / (s.high - s.low)
        return (1 - smooth) * theta / s.factor + smooth * theta
    assert kind == "YaRN"
    index = lambda turns: 2 * n * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n - 1)
    ramp = min(max((i - low) / (high - low or 0.001), 0), 1)
    return theta / s.factor * ramp + theta * (1 - ramp)


def longer(s):
    """Factors of YaRN: of cosines and sines, and of MLA's scores."""
    if type(s).__name__ != "YaRN":
        return 1.0, 1.0
    m = lambda scale: 0.1 * scale * math.log(s.factor) + 1  # noqa: E731
    of_scores = m(s.mscale_all_dim) ** 2 if s.mscale_all_dim else 1.0
    if s.attention is not None:
        return s.attention, of_scores
    return (m(s.mscale) / m(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else m(1)), of_scores


def turn(position, x, at):
    """Queries or keys [B, L, H, A] at positions [B, L]: pairs are complex numbers, turned."""
    if type(position).__name__ != "Rotary":
        return x
    w = turns_per_position(position, x.shape[-1])
    n, y = len(w), x.copy()
    z = x[..., :n] + 1j * x[..., n : 2 * n]
    z = z * np.exp(1j * at[:, :, None, None] * w) * longer(position.scaling)[0]
    y[..., :n], y[..., n : 2 * n] = z.real, z.imag
    return y


def bucket(distance, both):
    """T5's bucket of a key `distance` places before its query, of 32, the last from 128 on."""
    n = 16 if both else 32
    first = n if both and distance < 0 else 0
    distance = abs(distance) if both else max(distance, 0)
    if distance < n // 2:
        return first + distance
    far = n // 2 + int(math.log(distance / (n // 2)) / math.log(128 / (n // 2)) * (n - n // 2))
    return first + min(far, n - 1)


# ---------------------------------------------------------------- scores


def weigh(part, q, k, v, tokens, scale, bias=None, sink=None):
    """Sums of values [B, M, H, O] by the softmax of the scores of keys that are seen."""
    (B, L, H, _), M = q.shape, k.shape[1]
    key_segment = tokens.segment if tokens.key_segment is None else tokens.key_segment
    key_position = tokens.position if tokens.key_position is None else tokens.key_position
    y = np.zeros((B, L, H, v.shape[-1]))
    for b, i, h in np.ndindex(B, L, H):
        seen = []
        for m in range(M):
            back = tokens.position[b, i] - key_position[b, m]
            near = tokens.both or (back >= 0 and (part.window is None or back < part.window))
            if tokens.segment[b, i] == key_segment[b, m] and near:
                seen.append(m)
        score = [scale * q[b, i, h] @ k[b, m, h] + (0 if bias is None else bias[h](i - m)) for m in seen]
        e = np.exp(np.array(score) - max(score))
        rest = 0 if sink is None else math.exp(sink[h] - max(score))
        y[b, i, h] = e @ v[b, seen, h] / (e.sum() + rest)
    return y


def rms(x, axes, scale):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated(part, p, x, y, element):
    if part.gate == "head":
        y = y * sigmoid(x @ p["gate_DH"])[..., None]
    return y * sigmoid(np.einsum("bld,dha->blha", x, p[element])) if part.gate == "element" else y


# ---------------------------------------------------------------- attentions


def mha(part, p, x, tokens, memory):
    q, k, v = (np.einsum("bld,dha->blha", z, p[n]) for z, n in zip((x, memory, memory), MATRICES, strict=True))
    if part.bias:
        q, k, v = q + p["query_HA"], k + p["key_JA"], v + p["value_JA"]
    if part.qk_norm == "head":
        q, k = rms(q, -1, p["scale_query_A"]), rms(k, -1, p["scale_key_A"])
    if part.qk_norm == "all":
        q, k = rms(q, (-2, -1), p["scale_query_HA"]), rms(k, (-2, -1), p["scale_key_JA"])
    q = turn(part.position, q, tokens.position)
    k = turn(part.position, k, tokens.position if tokens.key_position is None else tokens.key_position)
    k, v = (np.repeat(z, part.H // z.shape[2], axis=2) for z in (k, v))
    bias = None
    if type(part.position).__name__ == "Relative":
        bias = [lambda d, h=h: p["bias_PH"][bucket(d, tokens.both), h] for h in range(part.H)]
    scale = part.A**-0.5 if part.scale is None else part.scale
    y = weigh(part, q, k, v, tokens, scale, bias, p["sink_H"] if part.sinks else None)
    y = np.einsum("blha,had->bld", gated(part, p, x, y, "gate_DHA"), p["out_HAD"])
    return y + p["out_D"] if part.bias else y


MATRICES = ("query_DHA", "key_DJA", "value_DJA")


def mla(part, p, x, tokens, memory):
    latent = rms(x @ p["latent_DW"], -1, p["scale_latent_W"])
    rope = turn(part.position, (x @ p["key_rope_DU"])[:, :, None], tokens.position)
    if part.Q is None:
        q = np.einsum("bld,dhi->blhi", x, p["query_DHI"])
    else:
        q = np.einsum("blq,qhi->blhi", rms(x @ p["query_down_DQ"], -1, p["scale_query_Q"]), p["query_QHI"])
    q = np.concatenate([q[..., : part.A], turn(part.position, q[..., part.A :], tokens.position)], -1)
    k = np.einsum("blw,wha->blha", latent, p["key_WHA"])
    k = np.concatenate([k, np.repeat(rope, part.H, axis=2)], -1)
    v = np.einsum("blw,who->blho", latent, p["value_WHO"])
    scale = part.scale
    if scale is None:
        scale = (part.A + part.U) ** -0.5 * longer(getattr(part.position, "scaling", None))[1]
    y = weigh(part, q, k, v, tokens, scale)
    return np.einsum("blho,hod->bld", gated(part, p, x, y, "gate_DHO"), p["out_HOD"])


ATTEND = {"MHA": mha, "MLA": mla}


def attention(part, p, x, tokens, memory=None):
    """x [B, L, D] -> [B, L, D]; p: parameters of the layer and of its stack."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    x = np.asarray(x, np.float64)
    return ATTEND[type(part).__name__](part, p, x, tokens, x if memory is None else np.asarray(memory, np.float64))
