"""The grouped matmul and its back-ends: every pattern of empty groups, rows that are nobody's, very large experts."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import GLU, MLP, MoE, Scatter, Sort, TopK
from moe_jax.core.groups import Ragged
from moe_jax.core.kernels import ragged_gpu, ragged_tpu, rows_gpu, rows_tpu, triton
from moe_jax.core.kernels.by_expert import _row_blocks, by_expert, size_buckets
from tests import oracle
from tests.cases import close, normal

E, D, F, NOBODY = 8, 4, 6, 5
FULL = np.array([3, 1, 8, 5, 2, 9, 4, 6])
PATTERNS = [FULL * np.array(kept) for kept in itertools.product((0, 1), repeat=E)]
R = int(FULL.sum()) + NOBODY
SHAPES = {"up_EDF": (E, D, F), "gate_EDF": (E, D, F), "down_EFD": (E, F, D), "up_EF": (E, F), "down_ED": (E, D)}
X, G = normal(0, R, D), normal(1, R, D)


def weights(expert):
    return {n: 0.5 * normal(i, *SHAPES[n]) for i, n in enumerate(expert.params)}


def mine(x, sizes):
    """Rows of experts; the others are NaN, which is what they may hold."""
    return np.where((np.arange(R) < sizes.sum())[:, None], x, np.nan).astype(np.float32)


WAYS = {
    "one after another": by_expert,
    "at once": lambda expert, params, x, sizes: expert(params, x, Ragged(sizes)),
    "as the platform likes": lambda expert, params, x, sizes: Ragged(sizes).apply(expert, params, x),
}


@functools.cache
def pulled(way, expert):
    """Output, and gradients by params and rows, of groups of any sizes."""

    def f(params, x, sizes, g):
        real = (jnp.arange(R) < sizes.sum())[:, None]
        y, pull = jax.vjp(lambda p, x: jnp.where(real, WAYS[way](expert, p, x, sizes), 0), params, x)
        return y, pull(g)

    return jax.jit(f)


@pytest.mark.parametrize("expert", [MLP(F=F, bias=True), GLU(F=F)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_pattern_of_empty_experts(way, expert):
    """All 2^8: each row gets its expert's output, each expert the gradient of its rows, and NaN elsewhere stays out."""
    params = weights(expert)
    double = {n: w.astype(np.float64) for n, w in params.items()}
    for sizes in PATTERNS:
        n, owner = sizes.sum(), np.repeat(np.arange(E), sizes)
        x = X if way == "at once" else mine(X, sizes)  # there, what is not read is still multiplied with 0
        y, (dparams, dx) = jax.tree.map(np.asarray, pulled(way, expert)(params, x, sizes, G))
        of = [{name: w[e] for name, w in double.items()} for e in owner]
        close(y[:n], np.reshape([oracle.expert(expert, p, row) for p, row in zip(of, X, strict=False)], (n, D)))
        assert not y[n:].any()
        assert not dx[n:].any()
        assert not any(w[sizes == 0].any() for w in dparams.values())
        close((dparams, dx), pulled("at once", expert)(params, X, sizes, G)[1])


@pytest.mark.parametrize("way", ["at once", "as the platform likes"])
def test_under_vmap(way):
    """Over two axes of rows, group sizes and gradients, one of them of weights too: as each alone."""
    expert, sizes = MLP(F=F), np.stack([PATTERNS[i] for i in (255, 93, 4, 0)]).reshape(2, 2, E)
    params = {n: normal(i, 2, *SHAPES[n]) for i, n in enumerate(expert.params)}
    x, g = normal(2, 2, 2, R, D), normal(3, 2, 2, R, D)
    alone = pulled(way, expert)
    many = jax.jit(jax.vmap(jax.vmap(alone, (None, 0, 0, 0)), (0, 0, 0, 0)))(params, x, sizes, g)
    for at in itertools.product(range(2), repeat=2):
        mine = {n: w[at[0]] for n, w in params.items()}
        close(jax.tree.map(lambda a, at=at: a[at], many), alone(mine, x[at], sizes[at], g[at]))


def test_weight_gradient_of_the_tpu(monkeypatch):
    """Interpreted kernel in tiles of 8 rows: all 2^8 patterns against numpy."""
    monkeypatch.setattr(ragged_tpu, "ROWS", 8)
    outer = jax.jit(functools.partial(ragged_tpu.outer, interpret=True))
    for sizes in PATTERNS:
        x, g = mine(X, sizes), mine(G, sizes)
        close(outer(x, g, sizes), outer_of(x, g, sizes))


def outer_of(x, g, sizes):
    return np.stack([x[b - n : b].T @ g[b - n : b] for b, n in zip(np.cumsum(sizes), sizes, strict=True)])


@pytest.mark.parametrize("widths", [(D, F), (40, 32)], ids=str)
def test_kernels_of_the_gpu(widths):
    """Interpreted: all 2^8 patterns against numpy, of rows in place and of rows that are fetched by their numbers.

    Widths in parts of blocks, and in several of them. tests/components/test_gpu.py runs them as they are compiled.
    """
    I, O = widths
    x, g, w = normal(0, R, I), normal(1, R, O), normal(2, E, I, O)
    token = np.random.default_rng(0).permutation(R).astype(np.int32)
    small = {"tile": ragged_gpu.Tile(16, 16, 64), "interpret": True}

    @jax.jit
    def kernels(x, there, g, sizes):
        rows = ragged_gpu.matmul(x, w, sizes, **small), ragged_gpu.matmul(there, w, sizes, token, **small)
        weights = ragged_gpu.outer(x, g, sizes, **small), ragged_gpu.outer(there, g, sizes, token, **small)
        return rows, ragged_gpu.matmul(g, w, sizes, transposed=True, **small), weights

    for sizes in PATTERNS:
        n, of = sizes.sum(), w[np.repeat(np.arange(E), sizes)]
        real, upper = mine(x, sizes), mine(g, sizes)
        there = np.empty_like(real)
        there[token] = real
        rows, back, weights = kernels(real, there, upper, sizes)
        for y in rows:
            close(y[:n], np.einsum("ri,rio->ro", x[:n], of))
            assert np.isnan(y[n:]).all(), "nobody writes there; the interpreter has NaN where nobody has written"
        close(back[:n], np.einsum("ro,rio->ri", g[:n], of))
        for dw in weights:
            close(dw, outer_of(x, g, sizes))


def abstract_gpu():
    """Abstract GPU that a program is lowered for where there is none."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device))


def lowered_for_a_gpu(dispatch, width=16):
    """Forward and backward of a layer, in bfloat16."""
    layer, x = MoE.of(E=E, router=TopK(K=2), experts=MLP(F=32), dispatch=dispatch), jnp.zeros((2, 8, width), "bfloat16")
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda params, x: layer.apply(params, x)[0].astype(jnp.float32).sum(), (0, 1)))
    with abstract_gpu():
        return step.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dispatch", "kernels"), [(Sort(), 7), (Scatter(1.0), 1)], ids=lambda v: v if isinstance(v, int) else str(v)
)
def test_program_of_a_gpu(dispatch, kernels):
    """Forward and backward of a layer, lowered: six kernels of matmuls, one of rows back, and nothing dense."""
    text = lowered_for_a_gpu(dispatch)
    operands = [call.count("%") for call in re.findall(r"@__gpu\$xla\.gpu\.triton\(([^)]*)\)", text)]
    assert len(operands) == kernels
    assert operands.count(6) == (kernels == 7), "one of them fetches its tokens: visits, their numbers, they, weights"
    assert "ragged_dot" not in text


def test_a_gpu_without_kernels(monkeypatch):
    """As with a jax that has no Triton any more: XLA's own way. Of another width: what was traced before is known."""
    monkeypatch.setattr(triton, "TYPES", ())
    text = lowered_for_a_gpu(Sort(), width=24)
    assert "triton" not in text
    assert "ragged_dot" in text


def test_weighted_rows_back_on_the_gpu():
    """Interpreted: the gradients of rows and weights, and nothing of rows that are nobody's."""
    T, width = 11, 40
    y, g, token = normal(0, R, width), normal(1, T, width), np.random.default_rng(0).integers(0, T + 1, R)
    weight, of = np.where(token < T, normal(2, R), 0), np.concatenate([g, np.zeros((1, width), np.float32)])[token]
    unread = np.where((token < T)[:, None], y, np.nan).astype(np.float32)
    args = unread, g, weight.astype(np.float32), token.astype(np.int32)
    dy, dweight = jax.jit(functools.partial(rows_gpu.weighted_sum_grad, interpret=True))(*args)
    close(dy, weight[:, None] * of)
    close(dweight, (of * y).sum(1))


@pytest.mark.parametrize("sizes", [(40, 0, 0, 3), (0, 0, 0, 43), (11, 11, 11, 10), (1, 41, 1, 0)], ids=str)
def test_very_large_experts_are_visited_in_pieces(sizes):
    """Values and gradients of experts that have more rows than the longest slice."""
    expert, sizes = MLP(F=F), np.array([*sizes, 0, 0, 0, 0])
    assert sizes.max() > size_buckets(R, E, D)[-1] or sizes.max() == 11
    one, other = (pulled(way, expert)(weights(expert), X, sizes, G) for way in ("one after another", "at once"))
    close(one, other)


def test_pieces_are_all_rows_once():
    """However rows are shared out: pieces lie inside of their expert's rows, none is too long, all rows are in one."""
    pieces = jax.jit(_row_blocks, static_argnums=(1, 2))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        most = int(rng.choice([4, 8, 16]))
        sizes = rng.multinomial(rng.integers(0, 65), rng.dirichlet(np.full(E, 0.3)))
        begin, covered = np.cumsum(sizes) - sizes, np.zeros(64, int)
        for e, start, n in zip(*map(np.asarray, pieces(sizes, 64, most)), strict=True):
            assert 0 <= n <= most
            assert not n or begin[e] <= start <= start + n <= begin[e] + sizes[e]
            covered[start : start + n] += 1
        np.testing.assert_array_equal(covered, np.arange(64) < sizes.sum())


def test_the_ladder_has_few_rungs_and_the_balanced_one():
    """The balanced number of rows costs nothing extra, others little, where most are; rungs are few."""
    for rows, experts in ((4096, 8), (8192, 64), (32768, 128), (64, 8), (3, 8), (16384, 512)):
        rungs, small = size_buckets(rows, experts, 2**18), size_buckets(rows, experts, 1)
        balanced = -(-rows // experts)
        assert balanced in rungs
        assert balanced in small
        assert rungs[-1] == small[-1] == min(rows, 2 * balanced)
        assert len(rungs) <= 19
        assert len(small) <= 3
        for n in range(1, rungs[-1] + 1):
            over = min(C for C in rungs if n <= C) - n
            assert over <= max(
                16, balanced / (16 if abs(n / balanced - 0.95) < 0.3 else 8 if n <= 1.5 * balanced else 4) + 8
            )


def test_every_rung_of_a_long_ladder(monkeypatch):
    """As large layers have it: values and gradients, of experts on each rung, and of one that is larger than any."""
    monkeypatch.setattr("moe_jax.core.kernels.by_expert.SMALLEST_BUCKET", 0)
    rungs, kind, params = size_buckets(512, E, D), MLP(F=F), weights(MLP(F=F))
    assert len(rungs) == 13
    x, g = normal(2, 512, D), normal(3, 512, D)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled_back(way, sizes, params, x, g):
        real = (jnp.arange(512) < sizes.sum())[:, None]
        y, pull = jax.vjp(lambda p, x: jnp.where(real, WAYS[way](kind, p, x, sizes), 0), params, x)
        return y, pull(g)

    for few in (
        [*rungs[:6], 30, 3],
        [*rungs[6:10], 0, 1, 0, 0],
        [*rungs[10:], 60, 17, 9, 0, 0],
        [0, 400, 0, 1, 40, 0, 7, 64],
    ):
        sizes = np.array(few)
        assert sizes.sum() <= 512
        close(*(pulled_back(way, sizes, params, x, g) for way in ("one after another", "at once")))


@pytest.fixture(scope="module")
def programs():
    """Forward and backward of a layer as XLA's CPU backend compiles it, with its optimizations."""
    x = jax.ShapeDtypeStruct((2, 64, 8), np.float32)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        found = {}
        for dispatch in (Sort(), Scatter(1.25)):
            layer = MoE.of(E=32, router=TopK(K=2), experts=MLP(F=16), dispatch=dispatch)
            params = jax.eval_shape(layer.init, jax.random.key(0), x)

            def value(params, x, layer=layer):
                y, aux = layer.apply(params, x)
                return (y**2).sum() + aux.loss, aux.stats

            step = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
            found[dispatch] = step.lower(params, x).compile().as_text()
        return found
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_what_would_be_slow_is_not_in_the_program(programs):
    """No branches, which copy what loops carry; no sort of all E scores for K of them; no scattered rows."""
    for text in programs.values():
        assert "while(" in text
        assert " conditional(" not in text
        assert 'custom_call_target="TopK"' in text
        assert not re.search(r"\[2,64,32\]\S* sort\(", text)
        assert not re.search(r"f32\[\d+,8\]\S* scatter\(", text)


@pytest.mark.parametrize("in_place", [False, True])
def test_elementwise_functions_of_used_rows(monkeypatch, in_place):
    """Used rows are numpy's, in bfloat16 rounded once; tiles past them are not written, and NaN there stays there."""
    monkeypatch.setattr(rows_tpu, "ROWS", 16)
    rows, width = 40, 6
    x, y = (normal(i, rows, width).astype(jnp.bfloat16) for i in (0, 1))
    both = lambda x, y: (x * y, jnp.tanh(x) + y)  # noqa: E731
    run = jax.jit(functools.partial(rows_tpu.elementwise, both, results=2, in_place=in_place, interpret=True))
    for used in (0, 1, 16, 17, 40):
        kept = (np.arange(rows) < used)[:, None]
        product, total = (np.asarray(a, np.float32) for a in run(used, *(jnp.where(kept, a, jnp.nan) for a in (x, y))))
        wide = [np.asarray(a, np.float32)[:used] for a in (x, y)]
        expected = wide[0] * wide[1], np.tanh(wide[0]) + wide[1]
        np.testing.assert_allclose(product[:used], expected[0], rtol=2**-8)
        np.testing.assert_allclose(total[:used], expected[1], rtol=2**-7, atol=2**-9)
        assert np.isnan(product[max(16, -(-used // 16) * 16) :]).all(), "nobody writes there"
