"""Routing ideas in numpy, float64 and plain loops, each from its paper: the library must agree with them.

It imports nothing of moe_jax; routers are only read, by their fields. Every router here routes ONE group of
S tokens, of which mask_S marks the real ones. Names as in tests/oracle.py: S tokens of a group, T real tokens of
a layer, D width, E experts, K choices, C slots, A width of a router, M null experts, groups of experts or tasks.

    p         the router's parameters, float64            noise   random numbers of the group; None in evaluation
    chosen    ids [S, K] that are not decided again       state   bias_E or potential_E
    token_S   ids of tokens, for Hash                     task_S  ids of tasks, for TaskTopK
    E         for Hash and RoundRobin, which have no parameters
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment


class Choice(NamedTuple):
    """Experts named by each token and their weights; expert E is nowhere."""

    named_SK: np.ndarray  # the best K, used or not; with `chosen`, those
    expert_SK: np.ndarray
    weight_SK: np.ndarray
    logits_SE: np.ndarray
    probs_SE: np.ndarray
    load_SE: np.ndarray | None = None  # a smooth stand-in of "is chosen", where the paper has one


# ---- Scores of one token's logits


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def sparsemax(x):
    """The nearest point of the simplex, by sorting (Martins & Astudillo 2016, arXiv:1602.02068, algorithm 1)."""
    z = np.sort(x)[::-1]
    k = max(k for k in range(1, len(z) + 1) if 1 + k * z[k - 1] > z[:k].sum())
    return np.maximum(x - (z[:k].sum() - 1) / k, 0)


def entmax15(x):
    """alpha = 1.5: p_i = max(x_i / 2 - tau, 0)^2, tau by bisection (Peters et al. 2019, arXiv:1905.05702)."""
    x = (x - x.max()) / 2
    low, high = -1.0, 0.0  # sum(p) >= 1 at -1, sum(p) = 0 at 0
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if (np.maximum(x - tau, 0) ** 2).sum() >= 1 else (low, tau)
    return np.maximum(x - low, 0) ** 2


SCORE = {"softmax": softmax, "sigmoid": sigmoid, "sparsemax": sparsemax, "entmax15": entmax15}


# ---- Pieces


def rows(f, x_SE):
    return np.array([f(x_E) for x_E in x_SE])


def linear(x_SD, gate_DE):
    """Logits and probabilities."""
    return x_SD @ gate_DE, rows(softmax, x_SD @ gate_DE)


def best(values, K, among=None):
    """The K largest (of some), ties to the lower index."""
    return sorted(range(len(values)) if among is None else among, key=lambda e: (-values[e], e))[:K]


def top(values_SE, K):
    return lambda s: best(values_SE[s], K)


def share(values_SE, normalize=False):
    """Weights of a token's experts: their values, or their shares of the sum of these."""
    return lambda s, ids: values_SE[s, ids] / (values_SE[s, ids].sum() if normalize else 1)


def logsumexp(x):
    return x.max() + np.log(np.exp(x - x.max()).sum())


def normal_cdf(z):
    return math.erfc(-z / math.sqrt(2)) / 2


def choose(K, mask_S, chosen, logits_SE, probs_SE, select, weigh, used=None, load_SE=None) -> Choice:
    """Every real token names `select(s)`, takes those that are `used(s, ids)`, weighs the taken `weigh(s, ids)`."""
    S, E = logits_SE.shape
    named, expert, weight = np.full((S, K), E), np.full((S, K), E), np.zeros((S, K))
    for s in np.flatnonzero(mask_S):
        named[s] = expert[s] = select(s) if chosen is None else chosen[s]
        if used is not None and chosen is None:
            expert[s] = np.where(used(s, named[s]), named[s], E)
        taken = expert[s] < E
        if taken.any():
            weight[s, taken] = weigh(s, expert[s, taken])
    return Choice(named, expert, weight, logits_SE, probs_SE, load_SE)


# ---- Routers: each token chooses experts


def switch(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The best expert, weighted by its probability (Switch, arXiv:2101.03961, eq. 1-2)."""
    logits, probs = linear(x_SD, p["gate_DE"])
    return choose(1, mask_S, chosen, logits, probs, top(logits, 1), share(probs))


def topk(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """K largest logits; weights are scores over all experts, or shares of the chosen (Mixtral, DeepSeekMoE)."""
    logits = x_SD @ p["gate_DE"]
    score = rows(SCORE[router.score], logits)
    probs, weigh = score / score.sum(-1, keepdims=True), share(score, router.normalize)
    return choose(
        router.K, mask_S, chosen, logits, probs, top(logits, router.K), weigh, lambda s, ids: score[s, ids] > 1e-12
    )


def top2(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The second is used with probability g2 / threshold; gates share before that (GShard, arXiv:2006.16668)."""
    logits, probs = linear(x_SD, p["gate_DE"])

    def gates(s, ids):
        first, second = ids if len(ids) == 2 else (ids[0], next(e for e in best(logits[s], 2) if e != ids[0]))
        return (probs[s, [first, second]] / (probs[s, first] + probs[s, second]))[: len(ids)]

    draws = noise is not None and router.second == "random"
    used = (lambda s, ids: [True, gates(s, ids)[1] > router.threshold * noise[s]]) if draws else None
    return choose(2, mask_S, chosen, logits, probs, top(logits, 2), gates, used)


def noisy_topk(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """Learned noise (Shazeer 2017, arXiv:1701.06538, eq. 3-5, 8-10) or noise of 1/E (V-MoE, arXiv:2106.05974)."""
    (clean, probs), K = linear(x_SD, p["gate_DE"]), router.K
    S, E = clean.shape
    std = np.logaddexp(0, x_SD @ p["noise_DE"]) if router.learned else np.full((S, E), 1 / E)
    noisy = clean if noise is None else clean + noise * std

    def weigh(s, ids):
        return softmax(noisy[s, ids]) if router.normalize else softmax(noisy[s])[ids]

    choice = choose(K, mask_S, chosen, clean, probs, top(noisy, K), weigh, load_SE=np.zeros((S, E)))
    for s, e in np.ndindex(S, E):
        if noise is None:
            chance = e in choice.expert_SK[s]
        elif router.learned:  # that e is among the K with its own noise drawn again
            others = np.sort(np.delete(noisy[s], e))
            chance = normal_cdf((clean[s, e] - others[-K]) / std[s, e]) if K < E else 1
        else:
            chance = 1 - normal_cdf((np.sort(noisy[s])[-K] - clean[s, e]) / std[s, e])
        choice.load_SE[s, e] = chance
    return choice


def loss_free(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """A bias selects, never weighs; groups compete by their two best (arXiv:2408.15664, arXiv:2412.19437)."""
    logits = x_SD @ p["gate_DE"]
    score = rows(SCORE[router.score], logits)
    size = logits.shape[1] // router.groups

    def select(s):
        biased = score[s] + state["bias_E"]
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-router.best :]) for g in range(router.groups)]
        kept = best(worth, router.limit) if router.groups > 1 else [0]
        return best(biased, router.K, [e for e in range(len(biased)) if e // size in kept])

    def weigh(s, ids):
        return share(score, router.normalize)(s, ids) * router.scale

    return choose(router.K, mask_S, chosen, logits, score / score.sum(-1, keepdims=True), select, weigh)


def bias_update(bias_E, choices_E, rate):
    """Up where an expert has less than the mean, down where it has more (arXiv:2408.15664, alg. 1)."""
    return bias_E + rate * np.sign(choices_E.mean() - choices_E)


def cosine(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """Cosines in a low dimension, over a learned temperature that starts at 0.07 (X-MoE, arXiv:2204.09179)."""
    low_SA, embed_AE = x_SD @ p["project_DA"], p["embed_AE"]
    logits = np.zeros((len(x_SD), embed_AE.shape[1]))
    for s, e in np.ndindex(logits.shape):
        norms = max(np.linalg.norm(low_SA[s]), 1e-6) * max(np.linalg.norm(embed_AE[:, e]), 1e-6)
        logits[s, e] = low_SA[s] @ embed_AE[:, e] / norms * np.exp(p["scale_"]) / 0.07
    probs = rows(softmax, logits)
    return choose(router.K, mask_S, chosen, logits, probs, top(logits, router.K), share(probs, router.normalize))


def top_p(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The fewest experts that together have probability p, at most K; raw weights (arXiv:2403.07652)."""
    logits, probs = linear(x_SD, p["gate_DE"])

    def used(s, ids):
        return [r == 0 or probs[s, ids[:r]].sum() < router.p for r in range(router.K)]

    return choose(router.K, mask_S, chosen, logits, probs, top(logits, router.K), share(probs), used)


def null_experts(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """K of E experts and M nulls; the true ones may share the weight (AdaMoE, arXiv:2406.13233)."""
    both, probs = linear(x_SD, np.concatenate([p["gate_DE"], p["null_DM"]], axis=1))
    E, K = p["gate_DE"].shape[1], router.K
    weigh = share(probs, router.normalize)
    return choose(K, mask_S, chosen, both[:, :E], probs[:, :E], lambda s: np.minimum(best(both[s], K), E), weigh)


def sampled(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """K experts drawn without replacement from softmax(logits / temperature): Gumbel top-K (arXiv:1903.06059)."""
    logits, probs = linear(x_SD, p["gate_DE"])
    drawn = logits if noise is None else logits / router.temperature + noise
    return choose(router.K, mask_S, chosen, logits, probs, top(drawn, router.K), share(probs, router.normalize))


def fixed(K, E, mask_S, chosen, select):
    """The content of a token decides nothing: no logits, equal weights."""
    S = len(mask_S)
    return choose(K, mask_S, chosen, np.zeros((S, E)), np.full((S, E), 1 / E), select, lambda s, ids: 1 / K)


def fmix32(h):
    """The 32-bit finaliser of murmur3."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def hash_(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The token's id decides (Hash layers, arXiv:2106.04426)."""

    def select(s):
        h = fmix32((int(token_S[s]) % 2**32) ^ (router.seed * 0x9E3779B9 % 2**32))
        return [(h % E + k) % E for k in range(router.K)]

    return fixed(router.K, E, mask_S, chosen, select)


def random_(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """K random experts, in evaluation too: the baseline (THOR, arXiv:2110.04260)."""
    return fixed(router.K, noise.shape[1], mask_S, chosen, top(noise, router.K))


def round_robin(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """Real tokens in turn, K experts each: the balanced baseline."""
    turn_S = np.cumsum(mask_S) - 1
    return fixed(router.K, E, mask_S, chosen, lambda s: [(turn_S[s] * router.K + k) % E for k in range(router.K)])


def base(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """Training: the best balanced assignment; evaluation: the best expert (BASE, arXiv:2103.16716)."""
    (logits, probs), real = linear(x_SD, p["gate_DE"]), np.flatnonzero(mask_S)
    expert = {s: best(logits[s], 1) for s in real}
    if noise is not None:
        C = math.ceil(Fraction(len(real), logits.shape[1]))
        seats = linear_sum_assignment(np.repeat(logits[real], C, axis=1), maximize=True)
        expert = {real[i]: [seat // C] for i, seat in zip(*seats, strict=True)}
    return choose(1, mask_S, chosen, logits, probs, expert.get, share(sigmoid(logits)))


def sinkhorn_potential(logits_SE, mask_S, v_E, iterations):
    """v of exp(logits + u_S + v_E) whose rows sum to 1 and columns to n / E, over the n real tokens; centred."""
    logits_nE = logits_SE[np.flatnonzero(mask_S)]
    n, E = logits_nE.shape
    for _ in range(iterations if n else 0):
        u_n = np.array([-logsumexp(logits_nE[s] + v_E) for s in range(n)])
        v_E = np.array([math.log(n / E) - logsumexp(logits_nE[:, e] + u_n) for e in range(E)])
    return v_E - v_E.mean()


def sinkhorn(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The balanced plan selects, the softmax weighs (S-BASE, Clark 2022, arXiv:2202.01169)."""
    (logits, probs), v_E = linear(x_SD, p["gate_DE"]), state["potential_E"]
    if noise is not None:
        v_E = sinkhorn_potential(logits, mask_S, v_E, router.iterations)
    return choose(router.K, mask_S, chosen, logits, probs, top(logits + v_E, router.K), share(probs))


def hierarchical(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """Groups, then experts in them: gates of the chosen (arXiv:1701.06538, B) or of all (Jordan & Jacobs 1994)."""
    group_SM, expert_SE = x_SD @ p["group_DM"], x_SD @ p["gate_DE"]
    (S, M), E = group_SM.shape, expert_SE.shape[1]
    size = E // M
    logits = np.array([[group_SM[s, e // size] + expert_SE[s, e] for e in range(E)] for s in range(S)])

    def select(s):
        groups = [range(m * size, (m + 1) * size) for m in best(group_SM[s], router.outer)]
        return [e for group in groups for e in best(expert_SE[s], router.inner, group)]

    def gates(s, ids):
        """Softmax over the groups of these experts, times softmax over these experts in each group."""
        weight = np.zeros(E)
        groups = sorted({e // size for e in ids})
        for m, outer in zip(groups, softmax(group_SM[s, groups]), strict=True):
            inside = [e for e in ids if e // size == m]
            weight[inside] = outer * softmax(expert_SE[s, inside])
        return weight[ids]

    probs, K = np.array([gates(s, range(E)) for s in range(S)]), router.outer * router.inner
    return choose(K, mask_S, chosen, logits, probs, select, gates if router.normalize else share(probs))


def task_topk(router, p, x_SD, mask_S, noise=None, chosen=None, state=None, token_S=None, task_S=None, E=None):
    """The task decides, alone or with the token (Task-MoE, Kudugunta 2021, arXiv:2110.03742)."""
    logits = p["task_ME"][task_S] + (x_SD @ p["gate_DE"] if router.token else 0)
    probs = rows(softmax, logits)
    return choose(router.K, mask_S, chosen, logits, probs, top(logits, router.K), share(probs, router.normalize))


ROUTE = {
    "Switch": switch, "TopK": topk, "Top2": top2, "NoisyTopK": noisy_topk, "LossFree": loss_free, "CosineTopK": cosine,
    "TopP": top_p, "NullExperts": null_experts, "Sampled": sampled, "Hash": hash_, "Random": random_,
    "RoundRobin": round_robin, "BASELayer": base, "Sinkhorn": sinkhorn, "Hierarchical": hierarchical,
    "TaskTopK": task_topk,
}  # fmt: skip


# ---- Other routings: each expert chooses tokens, or nobody chooses


def take(score_SE, mask_S, C):
    """The C best real tokens of every expert and their scores; token S is nobody. [E, C] each."""
    S, E = score_SE.shape
    token, weight = np.full((E, C), S), np.zeros((E, C))
    for e in range(E):
        for c, s in enumerate(best(score_SE[:, e], C, np.flatnonzero(mask_S))):
            token[e, c], weight[e, c] = s, score_SE[s, e]
    return token, weight


def expert_choice(router, p, x_SD, mask_S):
    """Experts take their best tokens (arXiv:2202.09368, eq. 1-2) -> token_EC, weight_EC, logits_SE, probs_SE."""
    logits, probs = linear(x_SD, p["gate_DE"])
    S, E = logits.shape
    C = math.ceil(Fraction(str(router.capacity_factor)) * S / E)
    return *take(probs, mask_S, min(S, C)), logits, probs


def depths(router, p, x_SD, mask_S):
    """One block takes its best tokens, weighted by the raw r (arXiv:2404.02258) -> as expert_choice, with E = 1."""
    r_SE, probs = linear(x_SD, p["gate_DE"])
    C = math.ceil(Fraction(str(router.fraction)) * len(x_SD))
    return *take(r_SE, mask_S, min(len(x_SD), C)), r_SE, probs


def soft(router, p, x_SD, mask_S):
    """Slots are means of tokens, tokens means of slots (arXiv:2308.00951) -> dispatch, combine, logits, all SEC."""
    phi, real = p["phi_DEC"], np.flatnonzero(mask_S)
    S, (_, E, C) = len(x_SD), phi.shape
    logits, dispatch, combine = np.zeros((S, E, C)), np.zeros((S, E, C)), np.zeros((S, E, C))
    for s, e, c in np.ndindex(S, E, C):
        unit_x = x_SD[s] / max(np.linalg.norm(x_SD[s]), 1e-6)
        unit_phi = phi[:, e, c] / max(np.linalg.norm(phi[:, e, c]), 1e-6)
        logits[s, e, c] = unit_x @ (np.exp(p["scale_"]) * unit_phi)
    for s in real:
        combine[s] = softmax(logits[s].ravel()).reshape(E, C)
    for e, c in np.ndindex(E, C) if len(real) else ():
        dispatch[real, e, c] = softmax(logits[real, e, c])
    return dispatch, combine, logits


# ---- Losses, over all real tokens of a layer


def log(x):
    return np.log(np.maximum(x, 1e-30))


def entropy(p_E):
    return -(p_E * log(p_E)).sum()


def count(expert_TK, E):
    return np.array([(expert_TK == e).sum() for e in range(E)])


def load_balance(expert_TK, probs_TE, E, convention):
    """f . P by convention: what f counts, what it is divided by, and the factor in front."""
    T, K = expert_TK.shape
    choices = count(expert_TK, E)
    first = count(expert_TK[:, :1], E) / max(T, 1)
    mean_E = probs_TE.sum(0) / max(T, 1)
    f_E, factor = {
        "switch": (choices / max(choices.sum(), 1), E),  # 1 if balanced
        "first": (first, E),  # 1: Mesh-TF, V-MoE
        "gshard": (first, 1 / E),  # 1 / E^2: algorithm 1
        "sum": (choices / max(T, 1), E),  # K: HF, MaxText
        "mean": (choices / max(choices.sum(), 1), E / K),  # 1 / K: levanter
    }[convention]
    return factor * sum(f_E[e] * mean_E[e] for e in range(E))


def importance(values_TE):
    """CV^2 of the experts' sums: of weights or probabilities (arXiv:1701.06538, eq. 6-7)."""
    return cv(values_TE.sum(0)) ** 2


def load(load_TE):
    """CV^2 of the experts' sums: of the smooth loads (arXiv:1701.06538, eq. 10-11)."""
    return cv(load_TE.sum(0)) ** 2


def router_z(logits_TE):
    """Mean square of log sum exp (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return sum(logsumexp(x) ** 2 for x in logits_TE) / max(len(logits_TE), 1)


def token_entropy(probs_TE):
    """Mean entropy of a token, nats (LIMoE, arXiv:2206.02770, local)."""
    return sum(entropy(p) for p in probs_TE) / max(len(probs_TE), 1)


def load_entropy(probs_TE, threshold=None):
    """Minus the entropy of the mean, or what it lacks to a threshold (LIMoE, arXiv:2206.02770, global)."""
    H = entropy(probs_TE.sum(0) / max(len(probs_TE), 1))
    return -H if threshold is None else max(0.0, threshold - H)


def uniform_kl(probs_TE, reverse):
    """KL(mean || uniform), or KL(uniform || mean)."""
    E, mean_E = probs_TE.shape[1], probs_TE.sum(0) / max(len(probs_TE), 1)
    difference = log(mean_E) - math.log(1 / E)
    return -difference.mean() if reverse else (mean_E * difference).sum()


def per_task(loss, task_T, *arrays, **options):
    """A loss of each task's tokens alone, averaged over the tasks that have tokens (LIMoE); 0 if none has."""
    losses = [loss(*(a[task_T == m] for a in arrays), **options) for m in np.unique(task_T)]
    return sum(losses) / max(len(losses), 1)


# ---- Capacity


def capacity(S, K, E, factor, convention):
    """Slots of an expert for a group of S tokens, by convention; never more than S."""
    one = Fraction(str(factor)) * S / E
    C = {
        "exact": math.ceil(one * K),
        "switch": max(int(one), 4),  # Mesh-TF: K is not in it
        "flaxformer": max(round(one), 4),  # nor here; half to even
        "flaxformer-large": max(round(one), 2),
        "gshard": -(-math.ceil(one) // 4) * 4,  # nor here
        "vmoe": -(-math.ceil(one * K) // 4) * 4,
    }[convention]
    return min(C, S)


# ---- Metrics


def cv(values_E):
    return values_E.std() / values_E.mean() if values_E.any() else 0.0


def describe(choices_E):
    """Balance of numbers of choices, as of the load over its mean; zeros (and dead experts) if there are none."""
    relative = choices_E / choices_E.mean() if choices_E.any() else 0 * choices_E
    return {
        "load_max_over_mean": relative.max(),
        "load_cv": cv(choices_E),
        "max_violation": max(relative.max() - 1, 0.0),  # MaxVio (arXiv:2408.15664)
        "dead_experts": int((choices_E == 0).sum()),
        "load_entropy": entropy(choices_E / max(choices_E.sum(), 1)),  # nats, log E when balanced
        "load_percentiles": np.percentile(relative, [0, 25, 50, 75, 100], method="linear"),
    }


def active_experts(expert_TK, E):
    """Mean number of experts that a token uses."""
    return (expert_TK < E).sum() / max(len(expert_TK), 1)


def agreement(first_TK, second_TK, E):
    """Fraction of the second layer's choices that the same token also made in the first layer."""
    made = [e in first for first, second in zip(first_TK, second_TK, strict=True) for e in second if e < E]
    return sum(made) / max(len(made), 1)


# ---- Transforms


def soft_cap(logits, cap):
    return cap * np.tanh(logits / cap)


def temperature(schedule, step, start, end, steps):
    """From start to end in `steps` steps, then constant (linear, exponential: EvoMoE, arXiv:2112.14397)."""
    done = min(step / steps, 1)
    return {
        "constant": start,
        "linear": start + (end - start) * done,
        "exponential": start * (end / start) ** done,
        "cosine": end + (start - end) * (1 + math.cos(math.pi * done)) / 2,
    }[schedule]
