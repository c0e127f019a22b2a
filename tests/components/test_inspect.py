"""Statistics of recordings against plain loops; planted effects are found, and chance is not."""

import itertools
import math
import pathlib
from collections import Counter

import numpy as np
import pytest

from moe_jax import GLU, MLP, LMConfig, MoEConfig, Scatter, TopK
from moe_jax import inspect as i
from moe_jax.attention import MHA
from moe_jax.inspect.recording import Recording
from tests.cases import normal

N, E, K, Q, L, Z = 3, 5, 2, 12, 9, 3


def made(expert_TNK, E=E, domain_T=None, token_T=None, sequence_T=None, kept=None, probs_TNE=None) -> Recording:
    """A recording of these choices."""
    expert_TNK = np.asarray(expert_TNK, np.int16)
    T, layers, choices = expert_TNK.shape
    probs = np.full((T, layers, E), 1 / E) if probs_TNE is None else probs_TNE
    top = np.argsort(-probs, axis=-1, kind="stable")[..., : choices + 2]
    column = lambda a: np.arange(T) if a is None else np.asarray(a)  # noqa: E731
    return Recording(
        expert_TNK,
        np.where(expert_TNK < E, 0.5, 0).astype(np.float32),
        (expert_TNK < E) if kept is None else kept,
        np.where(expert_TNK < E, 0, -1),
        np.take_along_axis(probs, top, -1),
        top,
        -(probs * np.log(probs)).sum(-1),
        *(column(token_T), np.arange(T) % L, np.arange(T) // L),
        *(np.zeros(T, int) if domain_T is None else np.asarray(domain_T), column(sequence_T)),
        np.ones(T, np.float32),
        E,
    )


@pytest.fixture(scope="module")
def rec():
    """Skewed routing with choices not taken, drops, three domains of whole sequences, and a few words."""
    rng, T = np.random.default_rng(0), Q * L
    probs = rng.dirichlet([2, 1, 1, 0.5, 0.3], size=(T, N))
    expert = np.argsort(-probs, axis=-1)[..., :K]
    expert[rng.random((T, N)) < 0.2, 1] = E  # a second choice that is not taken
    expert[3] = E  # nothing at all
    expert[7, 1] = 2  # one expert twice
    kept = (expert < E) & (rng.random(expert.shape) < 0.7)
    sequence = np.repeat(np.arange(Q), L)
    return made(expert, E, sequence % Z, rng.integers(0, 6, T), sequence, kept, probs)


def each(rec):
    """(token, layer, expert, kept) of all choices that are taken."""
    for t, n, k in np.ndindex(rec.expert_TNK.shape):
        if rec.expert_TNK[t, n, k] < rec.E:
            yield t, n, int(rec.expert_TNK[t, n, k]), bool(rec.kept_TNK[t, n, k])


def chosen(rec, t, n) -> set[int]:
    return {int(e) for e in rec.expert_TNK[t, n] if e < rec.E}


equal = np.testing.assert_allclose


# ---------------------------------------------------------------- by loops


def test_load_counts_choices_of_experts(rec):
    """Fractions of choices; percentiles over experts; in parts of the data; who is dead."""
    count = Counter((n, e) for _, n, e, _ in each(rec))
    total = Counter(n for _, n, _, _ in each(rec))
    load = np.array([[count[n, e] / total[n] for e in range(E)] for n in range(N)])
    equal(i.expert_choices(rec), [[count[n, e] for e in range(E)] for n in range(N)])
    equal(i.expert_load(rec), load)
    for n in range(N):  # of five experts, each one is a quarter further
        equal(i.load_percentiles(rec, (0, 25, 50, 75, 100))[n], sorted(load[n] * E))
    first = [t for t in range(rec.tokens) if t < rec.tokens // 4]
    count = Counter((n, e) for t, n, e, _ in each(rec) if t in first)
    total = Counter(n for t, n, _, _ in each(rec) if t in first)
    over_time = i.load_over_time(rec, 4)
    assert over_time.shape == (4, N, E)
    equal(over_time[0], [[count[n, e] / total[n] for e in range(E)] for n in range(N)])
    assert not i.dead_experts(rec).any()
    equal(i.dead_experts(rec, 0.5), load * E <= 0.5)
    assert i.dead_experts(rec, 0.5).any()
    with pytest.raises(ValueError, match="bins=0"):
        i.load_over_time(rec, 0)


def test_drops_and_entropies_of_groups_equal_plain_loops(rec):
    """Drop rates and entropies of every position, domain, ...; NaN where nothing is chosen."""
    for name in ("position_T", "domain_T", "sequence_T", "token_T", "document_T"):
        column = getattr(rec, name)
        found, entropy = i.drop_rate_by(rec, column), i.entropy_by(rec, column)
        assert list(found.group_A) == list(entropy.group_A) == sorted(set(column.tolist()))
        for a, n in np.ndindex(found.value_AN.shape):
            mine = [kept for t, m, _, kept in each(rec) if column[t] == found.group_A[a] and m == n]
            equal(found.value_AN[a, n], mine.count(False) / len(mine))
            tokens = [t for t in range(rec.tokens) if column[t] == found.group_A[a]]
            assert found.tokens_A[a] == len(tokens)
            equal(entropy.value_AN[a, n], sum(rec.entropy_TN[t, n] for t in tokens) / len(tokens))
    assert np.isnan(i.drop_rate_by(rec, np.arange(rec.tokens)).value_AN[3]).all()


def test_repeated_drops(rec):
    """Between two recordings and between layers; the same ones always, never, or by chance."""
    rng, T = np.random.default_rng(1), rec.tokens
    other = rec._replace(kept_TNK=rec.kept_TNK & (rng.random(rec.kept_TNK.shape) < 0.6))
    lost = lambda r, t, n: any(e < E and not k for e, k in zip(r.expert_TNK[t, n], r.kept_TNK[t, n], strict=True))  # noqa: E731
    for found, two in ((i.repeated_drops(rec, other), other), (i.repeated_drops(rec), rec)):
        for n, m in np.ndindex(N, N):
            both = sum(lost(rec, t, n) and lost(two, t, m) for t in range(T))
            equal(found.share_NN[n, m], both / sum(lost(rec, t, n) for t in range(T)))
            equal(found.chance_N[m], sum(lost(two, t, m) for t in range(T)) / T)
    expert = np.zeros((10, 1, 1))
    early, late = (made(expert, kept=(np.arange(10)[:, None, None] < 5) == half) for half in (True, False))
    equal(i.repeated_drops(early, early).share_NN, 1)
    equal(i.repeated_drops(early, late).share_NN, 0)
    equal(i.repeated_drops(early, late).chance_N, 0.5)
    assert np.isnan(i.repeated_drops(made(expert)).share_NN)
    changed = rec._replace(token_T=np.where(np.arange(T) == 4, 99, rec.token_T))
    for different in (changed, rec.where(slice(5))):
        with pytest.raises(ValueError, match="not of the same tokens"):
            i.repeated_drops(rec, different)


def test_coactivation_counts_pairs_of_choices(rec):
    """Who is chosen with whom, and by whom in the next layer."""
    alone = Counter((n, e) for t in range(rec.tokens) for n in range(N) for e in chosen(rec, t, n))
    pairs, across = Counter(), Counter()
    for t, n in np.ndindex(rec.tokens, N):
        pairs.update((n, a, b) for a, b in itertools.product(chosen(rec, t, n), repeat=2))
        if n + 1 < N:
            across.update((n, a, b) for a, b in itertools.product(chosen(rec, t, n), chosen(rec, t, n + 1)))
    equal(i.coactivation(rec), [[[pairs[n, a, b] / alone[n, a] for b in range(E)] for a in range(E)] for n in range(N)])
    expected = [[[across[n, a, b] / alone[n, a] for b in range(E)] for a in range(E)] for n in range(N - 1)]
    equal(i.transitions(rec), expected)
    together = np.array(
        [[[min(pairs[n, a, b] / alone[n, c] for c in (a, b)) for b in range(E)] for a in range(E)] for n in range(N)]
    )
    equal(i.chosen_together(rec), together)


def test_saturation_and_margin(rec):
    """Saturation is the part of the final choices made already; the margin is the last choice less the next one."""
    rng = np.random.default_rng(2)
    swapped = np.where(rng.random(rec.expert_TNK.shape[:2])[..., None] < 0.5, rec.expert_TNK, 0)
    now = rec._replace(expert_TNK=swapped)
    for n in range(N):
        shares = [
            len(chosen(now, t, n) & chosen(rec, t, n)) / len(chosen(rec, t, n))
            for t in range(rec.tokens)
            if chosen(rec, t, n)
        ]
        equal(i.router_saturation(now, rec)[n], np.mean(shares))
    equal(i.router_saturation(rec, rec), 1)
    probs = np.array([[[0.5, 0.3, 0.15, 0.05]], [[0.1, 0.2, 0.3, 0.4]]])
    equal(i.router_margin(made(np.zeros((2, 1, 2)), E=4, probs_TNE=probs)), [[0.15], [0.1]])
    with pytest.raises(ValueError, match="none is next"):
        i.router_margin(made(np.zeros((2, 1, 2)), E=2))


def test_specialisation_is_a_ratio_of_shares(rec):
    """Specialisation is the part of a group's tokens that choose an expert, over the part of all."""
    for found, column in (
        (i.domain_specialisation(rec), rec.domain_T),
        (i.vocabulary_specialisation(rec), rec.token_T),
    ):
        groups = sorted(set(column.tolist()))
        assert list(found.class_A) == groups
        for n, e, a in np.ndindex(N, E, len(groups)):
            chose = [t for t in range(rec.tokens) if e in chosen(rec, t, n)]
            tokens = (column == groups[a]).sum()
            share = sum(column[t] == groups[a] for t in chose) / tokens
            assert found.tokens_A[a] == tokens
            equal(found.share_NEA[n, e, a], share)
            equal(found.lift_NEA[n, e, a], share / (len(chose) / rec.tokens))
    rare = rec._replace(token_T=np.where(np.arange(rec.tokens) < 3, 77, rec.token_T))
    assert 77 in i.vocabulary_specialisation(rare, least=3).class_A
    assert 77 not in i.vocabulary_specialisation(rare, least=4).class_A
    unknown = rec._replace(domain_T=np.where(rec.domain_T == 1, -1, rec.domain_T))
    assert list(i.domain_specialisation(unknown).class_A) == [0, 2]


def test_mutual_information_equals_the_entropies(rec):
    """Mutual information by H(e) + H(a) - H(e, a), tokens of unknown domains left out."""
    entropy = lambda counts: -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)  # noqa: E731
    unknown = rec._replace(domain_T=np.where(rec.sequence_T == 4, -1, rec.domain_T))
    found = i.domain_information(unknown, permutations=3)
    for n in range(N):
        known = [(t, int(a)) for t, a in enumerate(unknown.domain_T) if a >= 0]
        mine = [(e, a) for t, a in known for e in chosen(rec, t, n)]
        sides = [Counter(e for e, _ in mine), Counter(a for _, a in mine), Counter(mine)]
        one, two, both = (entropy(list(c.values())) for c in sides)
        equal(found.nats_N[n], one + two - both, rtol=1e-9)
    assert set(np.round(4 * found.p_N, 9)) <= {1, 2, 3, 4}


def test_paths_equal_counted_tuples(rec):
    """Paths by counting tuples; agreement and conditional entropy by counting pairs."""
    first, T = [tuple(int(e) for e in rec.expert_TNK[t, :, 0]) for t in range(rec.tokens)], rec.tokens
    entropy = lambda c: -sum(v / sum(c.values()) * math.log(v / sum(c.values())) for v in c.values())  # noqa: E731
    routes, found = Counter(first), i.path_statistics(rec, top=4)
    assert found.distinct == len(routes)
    assert [count for _, count in found.top] == [c for _, c in routes.most_common(4)]
    assert all(routes[path] == count for path, count in found.top)
    equal(found.effective, math.exp(entropy(routes)))
    assert sum(count for _, count in i.path_statistics(rec, top=T).top) == T
    depends = i.layer_dependence(rec)
    for n in range(N - 1):
        pairs = Counter((path[n], path[n + 1]) for path in first if E not in path[n : n + 2])
        total = sum(pairs.values())
        this, following = Counter(), Counter()
        for (a, b), c in pairs.items():
            this[a] += c
            following[b] += c
        equal(depends.agreement_M[n], sum(c for (a, b), c in pairs.items() if a == b) / total)
        equal(depends.chance_M[n], sum(this[e] * following[e] for e in range(E)) / total**2)
        after = {e: Counter({b: c for (a, b), c in pairs.items() if a == e}) for e in this}
        equal(depends.conditional_M[n], sum(this[e] / total * entropy(after[e]) for e in this))
        equal(depends.entropy_M[n], entropy(following))
    fixed = made(np.repeat(np.arange(20) % E, N).reshape(20, N, 1))
    equal(i.layer_dependence(fixed).conditional_M, 0, atol=1e-12)
    equal(i.layer_dependence(fixed).agreement_M, 1)
    assert i.path_statistics(fixed).distinct == E
    alone = rec._replace(expert_TNK=rec.expert_TNK[:, :1])
    assert i.layer_dependence(alone).agreement_M.shape == (0,)
    assert i.transitions(alone).shape == (0, E, E)


# ---------------------------------------------------------------- experts


def layers_of(experts) -> tuple[LMConfig, dict, dict]:
    """A scanned model whose second MoE layer has experts that are copies: by weights, and with hidden units moved."""
    moe = MoEConfig(E=E, router=TopK(K=2), experts=experts, shared=MLP(F=2), dispatch=Scatter(1.0))
    model, sizes = LMConfig(V=7, D=4, N=4, attention=MHA(1, 4), moe=moe, moe_layers="every 2"), {"E": E, "D": 4, "F": 6}
    own = {n: normal(j, 2, *(sizes[c] for c in n.rpartition("_")[2])) for j, n in enumerate(experts.params)}
    order = np.random.default_rng(3).permutation(6)
    for name, w in own.items():
        w[1, 3] = w[1, 1]
        axis = name.rpartition("_")[2].find("F")
        w[1, 4] = w[1, 0] if axis < 1 else np.take(w[1, 0], order, axis=axis - 1)
    others = {"router_gate_DE": normal(7, 2, 4, E), "shared_up_DF": normal(8, 2, 4, 2)}
    return model, {"stack_0": {"moe_1": {**own, **others}}}, {n: w[1] for n, w in own.items()}


def written_by(kind, w, x):
    """Output of one expert."""
    if isinstance(kind, MLP):
        return np.maximum(x @ w["up_EDF"] + w["up_EF"], 0) @ w["down_EFD"] + w["down_ED"]
    gate = x @ w["gate_EDF"]
    return (gate / (1 + np.exp(-gate)) * (x @ w["up_EDF"])) @ w["down_EFD"]


@pytest.mark.parametrize("kind", [MLP(F=6, activation="relu", bias=True), GLU(F=6)])
def test_similar_experts_are_found(kind):
    """Cosines by hand; a copy is found by weights, one with its hidden units in another order by outputs alone."""
    (model, params, experts), x = layers_of(kind), normal(9, 7, 4)
    flat = [np.concatenate([experts[n][e].ravel() for n in sorted(experts)]).astype(float) for e in range(E)]
    cosine = lambda a, b: a @ b / math.sqrt((a @ a) * (b @ b))  # noqa: E731
    weights = i.weight_similarity(model, params, 1)
    equal(weights, [[cosine(a, b) for b in flat] for a in flat], atol=1e-12)
    y = [written_by(kind, {n: w[e].astype(float) for n, w in experts.items()}, x) for e in range(E)]
    expected = [[np.mean([cosine(a, b) for a, b in zip(one, two, strict=True)]) for two in y] for one in y]
    written = i.output_similarity(model, params, 1, x)
    equal(written, expected, atol=1e-5)
    assert i.duplicates(weights) == [(1, 3)]
    assert i.duplicates(written) == [(0, 4), (1, 3)]
    assert i.duplicates(i.weight_similarity(model, params, 0)) == []


def test_duplicates_are_linked():
    """Through others, in whatever order; experts of zeros are like nobody."""
    likeness = np.eye(6)
    for a, b in ((0, 3), (3, 5), (1, 2)):
        likeness[a, b] = likeness[b, a] = 1
    assert i.duplicates(likeness) == [(0, 3, 5), (1, 2)]
    assert i.duplicates(np.eye(3)) == []
    model, params, _ = layers_of(GLU(F=6))
    own = params["stack_0"]["moe_1"]
    for name in model.moe.experts.params:
        own[name][1, 1:4:2] = 0
    equal(i.output_similarity(model, params, 1, normal(9, 5, 4))[1], 0)
    assert i.duplicates(i.weight_similarity(model, params, 1)) == []


# ---------------------------------------------------------------- what is planted is found


def test_planted_experts_are_found():
    """A dead expert, two that are one, and one that sees a single domain and word."""
    rng, T = np.random.default_rng(4), 600
    domain, word = np.arange(T) // 200, rng.integers(0, 20, T)
    expert = np.stack([rng.choice(4, 2, replace=False) for _ in range(T * 2)]).reshape(T, 2, 2)  # of 0 to 3
    expert[domain == 1, 1, 0] = 7
    expert[domain == 1, 1, 1] = np.where(word[domain == 1] == 5, 6, expert[domain == 1, 1, 1])
    expert[::5, 0] = (4, 5)  # always both
    rec = made(expert, 9, domain, word, np.arange(T) // 10)
    dead = i.dead_experts(rec)
    assert [tuple(map(int, found)) for found in np.argwhere(dead)] == [(0, 6), (0, 7), (0, 8), (1, 4), (1, 5), (1, 8)]
    assert [i.duplicates(together) for together in i.chosen_together(rec)] == [[(4, 5)], []]
    found = i.domain_specialisation(rec)
    equal(found.share_NEA[1, 7], [0, 1, 0])
    equal(found.lift_NEA[1, 7], [0, 3, 0])
    assert np.argwhere(found.lift_NEA[1] > 2.5).tolist() == [[6, 1], [7, 1]]
    words = i.vocabulary_specialisation(rec)
    assert int(words.class_A[words.lift_NEA[1, 6].argmax()]) == 5
    assert (np.delete(words.share_NEA[1, 6], 5) == 0).all()
    depends = i.domain_information(rec)
    assert depends.p_N[1] == 1 / 200
    assert depends.nats_N[1] > 10 * depends.chance_N[1]
    assert depends.p_N[0] > 0.05


def simulated(seed: int, planted: float = 0.0) -> Recording:
    """Sequences with tastes of their own, of two domains, which say nothing of them but for what is planted."""
    rng, sequences, length, experts = np.random.default_rng(seed), 16, 12, 4
    taste = rng.dirichlet(np.full(experts, 0.7), size=sequences)
    domain = np.arange(sequences) % 2
    taste = (1 - planted) * taste + planted * np.eye(experts)[domain]
    expert = np.stack([rng.choice(experts, length, p=p) for p in taste]).reshape(-1, 1, 1)
    sequence = np.repeat(np.arange(sequences), length)
    return made(expert, experts, domain[sequence], None, sequence)


def test_chance_is_not_specialisation():
    """At most 9 % of 200 recordings without dependence are rejected at 5 % (99 % of such tests are below that), though
    token by token, as if sequences were not alike, most would be; planted dependence is nearly always found.
    """
    ps = np.array([i.domain_information(simulated(s), 99, seed=s).p_N[0] for s in range(200)])
    assert (ps <= 0.05).mean() <= 0.09
    assert 0.4 < ps.mean() < 0.6
    two = made(np.arange(10).reshape(10, 1, 1) // 5, domain_T=np.arange(10) // 5, sequence_T=np.arange(10) // 5)
    assert i.domain_information(two).p_N == 1  # either order says as much
    naive = [simulated(s)._replace(sequence_T=np.arange(192)) for s in range(30)]
    assert np.mean([i.domain_information(rec, 39).p_N[0] <= 0.05 for rec in naive]) > 0.5
    assert np.mean([i.domain_information(simulated(s, 0.5), 99, seed=s).p_N[0] <= 0.05 for s in range(30)]) > 0.9


def test_what_cannot_be_tested_is_refused(rec):
    with pytest.raises(ValueError, match="fewer than two known domains"):
        i.domain_information(rec._replace(domain_T=np.zeros(rec.tokens, int)))
    with pytest.raises(ValueError, match="several domains each"):
        i.domain_information(rec._replace(domain_T=rec.position_T))
    with pytest.raises(ValueError, match="permutations=0"):
        i.domain_information(rec, 0)


def test_the_page_names_all_there_is():
    """docs/inspection.md has every public name of the package."""
    text = pathlib.Path("docs/inspection.md").read_text()
    assert [name for name in i.__all__ if f"`{name}" not in text and f".{name}`" not in text] == []
