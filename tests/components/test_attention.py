"""Contracts of attentions: what is registered and has its case in cases_attention.py is held to all of these."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import (
    ATTENTION,
    MHA,
    MLA,
    POSITIONS,
    SCALINGS,
    Linear,
    Llama3,
    Order,
    Relative,
    Rotary,
    Sees,
    Sinusoidal,
    YaRN,
    scores,
)
from moe_jax.attention.layer import Attention, gather_param
from moe_jax.core import dims, shard
from moe_jax.core.shard import RULES
from moe_jax.optim import OptimConfig
from tests.cases import close, mesh_of
from tests.cases_attention import (
    ATTENTIONS,
    PACKED,
    B,
    D,
    H,
    L,
    compiled,
    expected,
    layout,
    numbers,
    run,
    short,
    tokens,
)
from tests.oracle_attention import Tokens, turns_per_position

MESHES = ("d8", "f2t2d2", "e4t2")
every = pytest.mark.parametrize("part", ATTENTIONS, ids=short)
segment, position = layout(PACKED)
REAL = segment > 0


def packed(shared=()) -> Sees:
    """Documents one after another, and padding."""
    return Sees(jnp.array(segment), jnp.array(position), shared=dict(shared))


def spread(part, mesh: str) -> bool:
    """Tells whether heads may lie on the shards of this mesh."""
    try:
        part.check_tensor(2 if "t2" in mesh else 1)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- registered means tried


def test_everything_registered_has_a_case():
    positions = [part.position for part in ATTENTIONS]
    assert {type(part) for part in ATTENTIONS} == set(ATTENTION)
    assert {type(p) for p in positions} == set(POSITIONS)
    assert {type(getattr(p, "scaling", None)) for p in positions} >= set(SCALINGS)


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_option_has_a_case(kind):
    """Every field that has a default has another value somewhere."""
    parts = [part for part in ATTENTIONS if isinstance(part, kind)]
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            assert any(getattr(part, field.name) != field.default for part in parts), field.name


# ---------------------------------------------------------------- what it computes


@every
@pytest.mark.parametrize("order", Order)
def test_equals_the_papers_formula(part, order):
    """In numpy, on documents one after another and padding."""
    x = tokens()
    ours = run(part, x, segment, position, order)
    close(ours[REAL], expected(part, x, Tokens(segment, position, order is Order.BOTH))[REAL], rel=2e-5)


@every
def test_attends_to_a_memory(part):
    """Keys and values of other tokens, of which all of a document's are seen; or one line that says what does."""
    if not part.of_memory:
        with pytest.raises(ValueError, match="use MHA"):
            part.for_memory()
        sees, x = packed(), jnp.array(tokens())
        with pytest.raises(ValueError, match="use MHA"):
            part(numbers(part)[0], x, sees, memory_BMD=x)
        return
    cross, M = part.for_memory(), 5
    memory, (key_segment, key_position) = tokens(2, B, M, D), layout(((5,), (2, 3), (1, 1, 3), (4,)) * 2, L=M)
    key_segment[:, 0] = 1  # every document of the first has a key
    used = (segment[:, :, None] == key_segment[:, None, :]).any(-1) & REAL
    (params, _), sees = numbers(cross), Sees(segment, position, Order.BOTH, key_segment, key_position)
    y = jax.jit(lambda p, x, m, s: cross(p, x, s, memory_BMD=m)[0])(params, tokens(), memory, sees)
    right = expected(cross, tokens(), Tokens(np.where(used, segment, 1), position, True, key_segment), memory)
    close(np.asarray(y)[used], right[used], rel=2e-5)


@pytest.mark.law(4)
@every
def test_later_tokens_change_nothing_before(part):
    """Law 4; where keys after a query are seen they change it."""
    x, other, at = tokens(), tokens(), 7
    other[:, at] = tokens(3, B, D)
    whole = layout(((L,),) * B)
    before, after = run(part, x, *whole), run(part, other, *whole)
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert (abs(before - after)[:, at].max(axis=1) > 1e-4).all()
    before, after = (run(part, a, *whole, Order.BOTH) for a in (x, other))
    assert (abs(before - after).max(axis=2) > 1e-6).all()


@pytest.mark.law(11)
@every
@pytest.mark.parametrize("order", Order)
def test_documents_in_a_row_are_alone(part, order):
    """Each gives what it gives in a row of its own, whatever follows, and whatever padding holds."""
    x, pairs = tokens(), ((5, 7), (3, 6), (6, 6), (2, 9))
    rows, apart = (*pairs, *pairs), tuple((n,) for pair in pairs for n in pair)
    together, alone = run(part, x, *layout(rows), order), 100 * tokens(4)
    for i, (n, m) in enumerate(pairs):
        alone[2 * i, :n], alone[2 * i + 1, :m] = x[i, :n], x[i, n : n + m]
    alone = run(part, alone, *layout(apart), order)
    for i, (n, m) in enumerate(pairs):
        close(together[i, :n], alone[2 * i, :n])
        close(together[i, n : n + m], alone[2 * i + 1, :m])


@pytest.mark.law(7)
@every
def test_padding_is_nowhere(part):
    """Law 7: before tokens and after them, with any content."""
    front = (0, 0, 0, 5, 3, 0, 0, 1)
    placed = layout(PACKED, front)
    real = placed[0] > 0
    x = tokens()
    other = np.where(real[:, :, None], x, 1000 * tokens(5))
    np.testing.assert_array_equal(run(part, x, *placed)[real], run(part, other, *placed)[real])
    assert np.isfinite(run(part, other, *placed)).all()


@every
def test_back_ends_agree(part, monkeypatch):
    """Every back-end that supports these scores computes what `einsum` defines."""
    seen, backends = [], dict(scores.BACKENDS)
    catch = scores.Backend(lambda s: [seen.append(s), scores.einsum(s)][1], lambda s: True)
    monkeypatch.setattr(scores, "BACKENDS", {"catch": catch})
    params, shared = numbers(part)

    def all_ways(params, x):
        part(params, x, packed(shared))
        (s,) = seen
        return {name: backend.run(s) for name, backend in backends.items() if backend.supports(s)}

    found = jax.device_get(jax.jit(all_ways)(params, tokens()))
    s = seen[0]
    assert "einsum" in found
    assert "xla" in found or s.sink_H is not None or s.v_BMJO.shape != s.k_BMJA.shape
    for y in found.values():
        close(y[REAL], found["einsum"][REAL])


# ---------------------------------------------------------------- where it computes it


@cache
def training(part, mesh: str | None):
    """Outputs, and gradients of a sum of them, by the Linen shell."""
    layer, (params, shared), sees = Attention(part), numbers(part), Sees(segment, position)

    @jax.jit
    def step(params, shared, x, target, segment, position):
        def loss(params, shared, x):
            y = layer.apply({"params": params}, x, Sees(segment, position, shared=shared))
            return (y * target).sum(), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, shared, x)

    given = (params, shared, tokens(), tokens(6), *sees[:2])
    if mesh is None:
        return jax.device_get(step(*given))
    with jax.set_mesh(mesh_of(mesh)):
        return jax.device_get(step(*given))


# Every attention on the mesh of three kinds of axes, and on one of the others in turn.
ON_MESHES = [(part, mesh) for i, part in enumerate(ATTENTIONS) for mesh in (MESHES[1], MESHES[2 * (i % 2)])]


@pytest.mark.law(1)
@pytest.mark.parametrize(("part", "mesh"), ON_MESHES, ids=[f"{short(part)}-{mesh}" for part, mesh in ON_MESHES])
def test_mesh_is_invisible(part, mesh):
    """Law 1: outputs and all gradients; or one line that says why heads cannot be spread."""
    if not spread(part, mesh):
        with pytest.raises(ValueError, match="set it to 1"):
            training(part, mesh)
        return
    close(training(part, mesh), training(part, None), rel=2e-5)


@every
def test_gradients_reach_everything(part):
    (_, y), gradients = training(part, None)
    assert np.isfinite(y).all()
    for path, g in jax.tree.leaves_with_path(gradients):
        assert np.abs(g).max() > 0, path
        assert np.isfinite(g).all(), path


@every
def test_entering_is_what_is_summed_over_tensor(part):
    """Arrays of tokens that the backward pass all-reduces over `tensor` are as wide as `entering` says."""
    if not spread(part, "t2"):
        assert part.qk_norm == "all"  # nothing is summed: it is refused there
        return
    (params, shared), layer = numbers(part), Attention(part)

    def loss(params, x):
        return (layer.apply({"params": params}, x, packed(shared)) ** 2).sum()

    with jax.set_mesh(mesh_of("d4t2")):
        traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, tokens())
    summed = [
        v.aval.shape[-1]
        for eqn in equations(traced.jaxpr)
        if eqn.primitive.name.startswith("psum") and eqn.params["axes"] == ("tensor",)
        for v in eqn.invars
        if v.aval.ndim == 3 and v.aval.shape[:2] == (B // 4, L)
    ]
    summed.remove(D)  # what heads add to the output, in the forward pass
    assert sorted(summed) == sorted({**part.sizes, "D": D}[letter] for letter in part.entering)


def equations(jaxpr):
    """All of a jaxpr and those in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):  # jaxprs, open and closed
                yield from equations(inner)


# ---------------------------------------------------------------- with a cache


# Tokens of each of four sequences in every piece, and the places of the piece, the last of which are padding.
PIECES = ((5, (5, 3, 0, 4)), (1, (1, 1, 1, 0)), (4, (2, 0, 4, 4)), (1, (1, 0, 1, 1)), (3, (3, 2, 3, 0)))
ROOM = 12


def pieces():
    """Segments and positions of every piece, and which tokens of the whole rows are in it."""
    done = np.zeros(4, int)
    for width, counts in PIECES:
        at = done[:, None] + np.arange(width)
        real = np.arange(width) < np.array(counts)[:, None]
        yield real, np.where(real, at, 0)
        done += counts


@every
def test_a_cache_changes_nothing(part):
    """Sequences of several lengths in uneven pieces give what they give as a whole."""
    params, shared = numbers(part)
    x, lengths = tokens()[:4], np.sum([counts for _, counts in PIECES], axis=0)
    whole = run(part, x, *layout(tuple((n,) for n in lengths)))
    state, rows = part.init_cache(4, ROOM), np.arange(4)[:, None]
    shapes = jax.tree.map(jnp.shape, state)
    for real, at in pieces():
        piece = np.where(real[:, :, None], x[rows, at], 77)  # padding may hold anything
        y, state = compiled(part)(params, piece, Sees(real.astype(int), at, shared=shared), state)
        close(np.asarray(y)[real], whole[rows, at][real], rel=2e-5)
        assert jax.tree.map(jnp.shape, state) == shapes


@every
def test_a_cache_is_spread(part):
    """Over the shards of heads where it has heads, and the same on all of them where it has none."""
    if not spread(part, "t2"):
        assert part.qk_norm == "all"
        return
    (params, shared), x = numbers(part), jnp.array(tokens()[:4])
    segment, position = (jnp.array(a) for a in layout(((5,), (3,), (0,), (4,)), L=5))
    state = part.init_cache(4, ROOM)
    with jax.set_mesh(mesh_of("f2t2d2")):
        here = shard.from_mesh()
        rules = {letter: here.rules[letter] for letter in "BHJ"}
        cached = {name: dims.spec(dims.dims_of(name), rules) for name in state}
        rows, laid = shard.token_spec(here), (dims.specs(params, here.rules), dims.specs(shared, here.rules))

        def step(params, shared, x, segment, position, state):
            ready = {name: gather_param(here, name, w, x.dtype) for name, w in here.pvary(params).items()}
            return part(ready, x, Sees(segment, position, shared=shared), here, state)

        over = shard.per_shard(step, here, (*laid, rows, rows, rows, cached), (rows, cached))
        y, new = jax.jit(over)(params, shared, x[:, :5], segment, position, state)
    right, right_new = compiled(part)(params, x[:, :5], Sees(segment, position, shared=shared), state)
    close((y, new), (right, right_new), rel=2e-5)


@every
def test_a_cache_has_its_size(part):
    """A ring of a window's size where there is one, for sequences of any length."""
    window = part.window
    room = {a.shape[1] for a in part.init_cache(2, ROOM, jnp.bfloat16).values()}
    assert room == {ROOM if window is None else min(ROOM, window)}
    types = {name: a.dtype for name, a in part.init_cache(2, ROOM, jnp.bfloat16).items()}
    assert set(types.values()) == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    for empty in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="holds nothing"):
            part.init_cache(*empty)


def test_a_latent_cache_is_small():
    """W + U numbers for a token, for all heads (arXiv:2405.04434, table 1)."""
    state = MLA(H, A=6, U=4, O=8, W=12).init_cache(2, 5)
    held = {name: a.shape for name, a in state.items() if name not in ("segment_BM", "position_BM")}
    assert held == {"latent_BMW": (2, 5, 12), "rope_BMU": (2, 5, 4)}


@every
def test_a_cache_too_small_says_so(part):
    """More tokens at once than there are places are refused; of those that come later outputs are not a number."""
    params, shared = numbers(part)
    room = 4 if part.window is None else min(4, part.window - 1)
    x, sees = tokens()[:4], lambda at: Sees(np.ones((4, len(at)), int), np.tile(at, (4, 1)), shared=shared)
    with pytest.raises(ValueError, match=rf"{L} tokens do not fit into a cache of {room} entries.*M={L}"):
        compiled(part)(params, x, sees(np.arange(L)), part.init_cache(4, room))
    y, state = compiled(part)(params, x[:, :room], sees(np.arange(room)), part.init_cache(4, room))
    assert np.isfinite(y).all()
    y, _ = compiled(part)(params, x[:, room : room + 1], sees(np.array([room])), state)
    assert np.isnan(y).all()


def test_both_forms_of_latent_attention_are_tried():
    """Few queries meet latents, many the keys made of them; the test of the cache takes both ways."""
    absorbed = {
        part.absorbs(width, width + part.init_cache(1, ROOM)["segment_BM"].shape[1])
        for part in ATTENTIONS
        if isinstance(part, MLA)
        for width, _ in PIECES
    }
    assert absorbed == {True, False}
    large = MLA(H=128, A=128, U=64, O=128, W=512, Q=1536)
    assert large.absorbs(1, 4096)
    assert not large.absorbs(4096, 4096)


# ---------------------------------------------------------------- what it says of itself


@every
def test_parameters_are_those_it_names(part):
    """Each once, and every letter has a size; matrices have the variance of their inputs, scales are one."""
    sees = packed(numbers(part)[1])
    drawn = jax.jit(Attention(part).init)(jax.random.key(0), tokens(), sees)["params"]
    names = (*part.params, *part.stack_params)
    assert set(drawn) == set(part.params)
    assert len(set(names)) == len(names)
    sizes = {**part.sizes, "D": D}
    for name, w in drawn.items():
        letters = dims.dims_of(name)
        assert w.shape == tuple(sizes[letter] for letter in letters)
        if small(name):
            assert (w == name.startswith("scale")).all(), name
        else:
            inputs = math.prod(w.shape[:-1]) if letters[-1] == "D" else w.shape[0]
            assert 0.7 < w.std() * math.sqrt(inputs) < 1.3, name


def small(name: str) -> bool:
    """Tells whether tokens are not multiplied with this parameter: vectors, those of heads, a table of positions."""
    return len(dims.dims_of(name)) == 1 or dims.dims_of(name) in ("HA", "JA", "PH")


@every
def test_matrices_are_decayed_and_spread(part):
    """Weight decay acts on matrices only; each of these is spread over fsdp, along one dimension."""
    params = numbers(part)[0]
    decayed = OptimConfig().decayed(params)
    assert decayed == {name: not small(name) for name in params}
    for name, laid in dims.specs(params, RULES).items():
        used = [axes for axes in dims.axes(laid, params[name].ndim) if axes == ("fsdp",)]
        assert len(used) == (not small(name)), name


@every
def test_half_precision_stays(part):
    """Outputs have the type of x, caches their own, parameters that are no matrices may be in float32."""
    half, sees = jnp.bfloat16, packed(numbers(part)[1])
    params = {name: w if small(name) else w.astype(half) for name, w in numbers(part)[0].items()}
    x, state = jnp.array(tokens(), half), part.init_cache(B, ROOM)
    assert jax.eval_shape(lambda: part(params, x, sees)[0]).dtype == half
    y, new = jax.eval_shape(lambda: part(params, x, sees, cache=state))
    assert y.dtype == half
    assert jax.tree.map(jnp.dtype, new) == jax.tree.map(jnp.dtype, state)


@pytest.mark.parametrize(
    ("letters", "cut"),
    [
        *(("DHA", "D"), ("HAD", "D"), ("DQ", "D"), ("EDF", "D"), ("ED", "D"), ("QHI", "Q"), ("WHO", "W")),
        *(("D", ""), ("Q", ""), ("W", ""), ("H", ""), ("EF", ""), ("HA", ""), ("", "")),
    ],
)
def test_fsdp_cuts_one_width(letters, cut):
    """The first of D, Q, W of a matrix; nothing of a vector."""
    assert dims.fsdp_dim(letters) == cut
    laid = dims.specs({f"w_{letters}": np.zeros([4] * len(letters))}, {**RULES, "H": ()})
    spread_over = dims.axes(laid[f"w_{letters}"], len(letters))
    assert [letter for letter, axes in zip(letters, spread_over, strict=True) if "fsdp" in axes] == [*cut]


@every
def test_score_flops_are_those_of_the_program(part, monkeypatch):
    """Counts the two products that have heads as a batch, in the definition."""
    monkeypatch.setattr(scores, "BACKENDS", {"einsum": scores.BACKENDS["einsum"]})
    params, shared = numbers(part)
    traced = jax.make_jaxpr(lambda p, x: part(p, x, packed(shared))[0])(params, tokens())
    flops = []
    for eqn in equations(traced.jaxpr):
        if eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            flops.append(2 * math.prod(eqn.outvars[0].aval.shape) * inner)
    assert len(flops) == 2
    assert sum(flops) == B * part.score_flops(L, L)


# ---------------------------------------------------------------- scalings


# As transformers 5.24 computes them, rounded to seven digits.
PUBLISHED = {
    "llama 3.1": (
        Rotary(500000.0, scaling=Llama3(8.0, 1.0, 4.0, 8192)),
        (1.0, 0.1939228, 0.03760603, 0.007292665, 0.000524846, 3.428102e-05, 6.64787e-06, 1.289173e-06),
        (1.0, 1.0),
    ),
    "gpt-oss": (
        Rotary(150000.0, scaling=YaRN(32.0, 4096, truncate=False)),
        (1.0, 0.225418, 0.05081327, 0.006794959, 0.0004564839, 1.818834e-05, 4.099978e-06, 9.24209e-07),
        (1.3465735902799727, 1.0),
    ),
    "deepseek-v2-lite": (
        Rotary(scaling=YaRN(40.0, 4096, mscale=0.707, mscale_all_dim=1.0)),
        (1.0, 0.3162278, 0.1, 0.02391472, 0.005125, 0.0008498622, 2.5e-05, 7.905694e-06),
        (0.9210423553163399, 1.3688879454113936**2),
    ),
    "deepseek-v3": (
        Rotary(scaling=YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
        (1.0, 0.3162278, 0.1, 0.02391472, 0.005125, 0.0008498622, 2.5e-05, 7.905694e-06),
        (1.0, 1.3688879454113936**2),
    ),
    "yarn": (
        Rotary(scaling=YaRN(4.0, 40960)),
        (1.0, 0.3162278, 0.1, 0.03162278, 0.01, 0.002569351, 0.000625, 0.0001383497),
        (1.138629436111989, 1.0),
    ),
    "linear": (
        Rotary(scaling=Linear(4.0)),
        tuple(0.25 * 10000.0 ** (-i / 8) for i in range(8)),
        (1.0, 1.0),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scalings_are_the_published(name):
    """Radians per position of heads of 16, and what cosines and scores are multiplied with."""
    rotary, radians, factors = PUBLISHED[name]
    np.testing.assert_allclose(rotary.frequencies(16), radians, rtol=1e-6)
    np.testing.assert_allclose(turns_per_position(rotary, 16), radians, rtol=1e-6)
    np.testing.assert_allclose((rotary.scaling.magnitude, rotary.scaling.sharpness), factors, rtol=1e-12)
    assert dataclasses.replace(rotary, fraction=0.5).frequencies(32).tolist() == rotary.frequencies(16).tolist()


def test_a_given_attention_factor_is_used():
    assert YaRN(8.0, 64, attention=1.25).magnitude == 1.25


# ---------------------------------------------------------------- what is refused


def test_a_shared_table_is_asked_for():
    with pytest.raises(ValueError, match=r"sees.shared.*use Relative\(\)"):
        jax.eval_shape(Attention(MHA(H=4, A=8, position=Relative(shared=True))).init, jax.random.key(0), tokens())


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: MHA(H=4, A=8, J=3), "J=3 .* do not divide H=4; make H a multiple"),
        (lambda: MHA(H=4, A=7), "7 of a head's 7 numbers; make them even"),
        (lambda: MHA(H=4, A=8, position=Rotary(fraction=0.4)), "3 of a head's 8 numbers"),
        (lambda: MHA(H=4, A=8, qk_norm="rms"), "qk_norm='rms'.* is unknown; use one of 'none', 'head', 'all'"),
        (lambda: MHA(H=4, A=8, gate="token"), "gate='token'.* is unknown; use one of 'none', 'head', 'element'"),
        (lambda: MLA(4, 6, 3, 8, 12), "3 of a head's 3 numbers; make them even"),
        (lambda: MLA(4, 6, 4, 8, 12, position=Relative()), r"MLA\(position=Relative.* use Rotary\(\) or NoPE\(\)"),
        (lambda: MLA(4, 6, 4, 8, 12, position=Sinusoidal()), r"use Rotary\(\) or NoPE\(\)"),
        (lambda: MLA(4, 6, 4, 8, 12, gate="token"), "use one of 'none', 'head', 'element'"),
        (lambda: YaRN(4.0), r"YaRN\(original=0\) needs the length .* give it, as YaRN\(factor=4.0, original=4096\)"),
        (lambda: YaRN(4.0, -1), r"YaRN\(original=-1\) must be a whole number"),
        (lambda: YaRN(4.0, 64, beta_fast=1.0), "0 < beta_slow < beta_fast"),
        (lambda: Llama3(4.0), r"Llama3\(original=0\) needs the length"),
        (lambda: Llama3(4.0, 4.0, 1.0, 64), "0 < low < high"),
    ],
)
def test_nonsense_is_refused_in_one_line(make, line):
    with pytest.raises(ValueError, match=line) as error:
        make()
    assert "\n" not in str(error.value)
