"""The reader of collectives: on programs whose collectives can be counted by hand, and on texts of other backends."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.audit import hlo
from moe_jax.audit.hlo import collectives
from moe_jax.core.traffic import Collective
from moe_jax.costs.communication import merged

AXES = ("slice", "data", "fsdp", "expert", "tensor")
ROWS, BYTES = 16, 512  # of what a device has in most programs: [16, 8] in float32


def mesh_of(*shape: int, order=range(8)) -> Mesh:
    """Axes of these sizes over all devices, in this order."""
    return Mesh(np.array(jax.devices())[[*order]].reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)


MESH = mesh_of(1, 2, 1, 4, 1)
TWO = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))


def compiled(f, mesh: Mesh) -> str:
    """The text of f, which is given [16, 8] on every device and yields arrays that differ between devices."""
    x = jax.ShapeDtypeStruct((ROWS * mesh.size, 8), jnp.float32, sharding=NamedSharding(mesh, P(AXES)))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


def moved(text: str, mesh: Mesh) -> dict:
    """(op, axes, size): bytes of what is between different devices; XLA may combine collectives, so no counts."""
    return {(c.op, c.axes, c.size): c.bytes for c in merged(collectives(text, mesh)) if c.axes}


def counts(text: str, mesh: Mesh = MESH) -> dict:
    """(op, axes): (executions, bytes)."""
    return {(c.op, c.axes): (c.count, c.bytes) for c in merged(collectives(text, mesh))}


# ---------------------------------------------------------------- real programs


@pytest.mark.parametrize("shape", [(1, 2, 1, 4, 1), (2, 1, 2, 1, 2), (2, 2, 2, 1, 1), (1, 1, 1, 8, 1)])
def test_kinds_axes_and_bytes(shape):
    """Every kind over one axis, several and all, with the bytes of its result; axes of size 1 do not count."""
    mesh = mesh_of(*shape)
    n = dict(mesh.shape)

    def f(x):
        ring = [(i, (i + 1) % n["fsdp"]) for i in range(n["fsdp"])]
        return (
            lax.psum(x, "data"),
            lax.psum(2 * x, ("fsdp", "tensor")),
            lax.psum(3 * x[:4], AXES),
            lax.all_gather(x, "expert"),
            lax.psum_scatter(x, "data", tiled=True),
            lax.all_to_all(x, ("slice", "expert"), 0, 0, tiled=True),
            lax.ppermute(x, "fsdp", ring),
        )

    expected: dict = {}
    for op, axes, size in (
        ("all-reduce", ("data",), BYTES),
        ("all-reduce", ("fsdp", "tensor"), BYTES),
        ("all-reduce", AXES, BYTES // 4),
        ("all-gather", ("expert",), BYTES * n["expert"]),
        ("reduce-scatter", ("data",), BYTES // n["data"]),
        ("all-to-all", ("slice", "expert"), BYTES),
        ("collective-permute", ("fsdp",), BYTES),
    ):
        real = tuple(a for a in axes if n[a] > 1)
        key = op, real, math.prod(n[a] for a in real)
        if real:
            expected[key] = expected.get(key, 0) + size
    assert moved(compiled(f, mesh), mesh) == expected


@pytest.mark.parametrize("order", [range(8), (3, 6, 0, 5, 1, 7, 2, 4)])
def test_groups_that_the_partitioner_writes(order):
    """Products over a dimension that is spread over `data`, and over `expert`; devices are in the mesh's order."""
    mesh = mesh_of(1, 2, 1, 4, 1, order=order)

    def spread(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    def f(a, b, c, d):
        return a @ b, c @ d

    given = (
        *(spread((4, 8), None, "data"), spread((8, 16), "data", "expert")),
        *(spread((6, 8), "data", "expert"), spread((8, 32), "expert", None)),
    )
    out = tuple(NamedSharding(mesh, P(*axes)) for axes in ((None, "expert"), ("data", None)))
    text = jax.jit(f, out_shardings=out).lower(*given).compile().as_text()
    assert moved(text, mesh) == {
        ("all-reduce", ("data",), 2): 4 * 4 * 4,
        ("all-reduce", ("expert",), 4): 3 * 32 * 4,
    }


def test_loops_multiply_their_collectives():
    """A scan of 5 with a scan of 3 in it, a fori_loop of 7, and a loop of unknown length that does not communicate."""

    def inner(x, _):
        return lax.psum(x, "expert") / 2, None

    def outer(x, _):
        x, _ = lax.scan(inner, x, None, length=3)
        return lax.all_to_all(x, "data", 0, 0, tiled=True), None

    def f(x):
        x, _ = lax.scan(outer, x, None, length=5)
        x = lax.fori_loop(0, 7, lambda i, x: lax.psum(x, ("data", "expert")) / 8, x)
        return lax.while_loop(lambda x: x.sum() < 1e9, lambda x: 2 * x + 1, x)

    assert counts(compiled(f, MESH)) == {
        ("all-reduce", ("expert",)): (15, 15 * BYTES),
        ("all-to-all", ("data",)): (5, 5 * BYTES),
        ("all-reduce", ("data", "expert")): (7, 7 * BYTES),
    }


@pytest.mark.parametrize("where", ["body", "condition"])
def test_a_loop_of_unknown_length_that_communicates(where):
    def f(x):
        if where == "body":
            return lax.while_loop(lambda x: x.sum() < 1e9, lambda x: 2 * lax.psum(x, "data"), x)
        return lax.while_loop(lambda x: lax.psum(x.sum(), "data") < 1e9, lambda x: 2 * x + 1, x)

    with pytest.raises(ValueError, match=r"the loop while\.\d+ \(while\) communicates.*make it a scan"):
        collectives(compiled(f, MESH), MESH)


def test_a_conditional_counts_its_largest_branch():
    """Counts the branch that moves most of a switch in a loop; the decision is outside."""

    def step(x, i):
        branches = (
            lambda x: x + 1,
            lambda x: lax.psum(x, "data"),
            lambda x: lax.all_gather(x, "expert").sum(0) + lax.psum(x, "expert"),
        )
        return lax.switch(i, branches, x), None

    def f(x):
        chosen = lax.psum(x.sum(), ("data", "expert")).astype(jnp.int32)
        return lax.scan(step, x, chosen + jnp.arange(6))[0]

    assert counts(compiled(f, MESH)) == {
        ("all-reduce", ("data", "expert")): (1, 4),
        ("all-reduce", ("expert",)): (6, 6 * BYTES),
        ("all-gather", ("expert",)): (6, 6 * 4 * BYTES),
    }


def test_custom_derivatives_and_functions_called_twice():
    @jax.custom_vjp
    def g(x):
        return lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 0)])

    def backward(x, dy):
        return (lax.all_to_all(dy * x, "expert", 0, 0, tiled=True),)

    g.defvjp(lambda x: (g(x), x), backward)
    twice = jax.jit(lambda x: g(jnp.cos(g(x))))

    def f(x):
        with jax.named_scope("layer"):
            return jax.grad(lambda x: (twice(x) ** 2).sum())(x)

    found = merged(collectives(compiled(f, MESH), MESH), where=True)
    assert [(c.op, c.axes, c.count, c.bytes) for c in found] == [
        ("all-to-all", ("expert",), 2, 2 * BYTES),
        ("collective-permute", ("data",), 2, 2 * BYTES),
    ]
    assert [c.where.endswith("backward") for c in found] == [True, False]


class Layer(nn.Module):
    """The sine of what an all-to-all yields, so that the backward pass needs it again."""

    @nn.compact
    def __call__(self, x, _):
        scale = self.param("scale", nn.initializers.ones, (1, 8))

        def exchange(x, scale):
            return jnp.sin(lax.all_to_all(x * scale, "expert", 0, 0, tiled=True))

        spec = P(("data", "expert"))
        return jax.shard_map(exchange, in_specs=(spec, P()), out_specs=spec)(x, scale), None


class Model(nn.Module):
    """Three layers, recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_collectives_name_their_module_and_pass():
    """Modules, without what JAX wraps them in; the backward pass, and what it computes again, apart."""
    x = jnp.ones((ROWS * 8, 8))
    with jax.set_mesh(MESH):
        place = NamedSharding(MESH, P(("data", "expert")))
        params = jax.eval_shape(Model().init, jax.random.key(0), x)
        step = jax.jit(jax.grad(lambda p, x: (Model().apply(p, x) ** 2).sum()), in_shardings=(None, place))
        text = step.lower(params, jax.ShapeDtypeStruct(x.shape, x.dtype)).compile().as_text()
    found = [c for c in merged(collectives(text, MESH), where=True) if c.op == "all-to-all"]
    assert found == [
        Collective("all-to-all", ("expert",), 4, 3, 3 * BYTES, "Model/layers"),
        Collective("all-to-all", ("expert",), 4, 3, 3 * BYTES, "Model/layers backward"),
        Collective("all-to-all", ("expert",), 4, 3, 3 * BYTES, "Model/layers recomputed"),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(f)/reduce_sum", "reduce_sum"),
        ("jit(f)/transpose(jvp(LM))/while/body/closed_call/checkpoint/s/moe_1/shard_map/psum", "LM/s/moe_1 backward"),
        ("jit(f)/transpose(jvp(LM))/while/body/checkpoint/rematted_computation/s/psum", "LM/s recomputed"),
        ("jit(f)/jvp(MoE)/shard_map/cond/branch_0_fun/all_to_all", "MoE"),
        ("jit(f)/transpose(jvp(MoE))/shard_map/gsd,de->gse/psum", "MoE backward"),
        ("jit(f)/(jvp()/reduce_sum:jvp(MoE)/shard_map/psum)", "reduce_sum + MoE"),
        (
            "jit(f)/transpose(jvp(LM))/(dot:while/body/a/psum:b/psum:b/add:c/add)",
            "LM backward + LM/a backward + 2 more",
        ),
    ],
)
def test_wrappers_are_left_out_of_names(name, expected):
    (c,) = collectives(entry(f'%a = f32[2] all-reduce(%x), to_apply=%add, metadata={{op_name="{name}"}}'), TWO)
    assert c.where == expected


# ---------------------------------------------------------------- texts


def entry(*lines: str) -> str:
    """A program of these instructions."""
    return "\n".join(
        ("HloModule m, num_partitions=8", "", "ENTRY %main () -> f32[] {", *(f"  {s}" for s in lines), "}")
    )


@pytest.mark.parametrize(
    ("written", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{7,5,3,1,0,2,4,6}}", ("data", "expert"), 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("expert",), 2),
        ("{}", ("data", "expert"), 8),
        ("[2,4]<=[8]", ("expert",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "expert"), 8),
        ("[8,1]<=[8]", (), 1),
        ("mesh['x'=2,'y'=4] {'y'}", ("expert",), 4),
        ("mesh['x'=2,'y'=4,'z'=1] {'x'}", ("data",), 2),
        ("mesh['x'=2,'y'=4,'z'=1] {'z'}", (), 1),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "expert"), 8),
        ("mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("mesh['a'=8] {'a':(2)4}", ("expert",), 4),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("data", "expert"), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("expert",), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
    ],
)
def test_notations_of_groups(written, axes, size):
    line = (
        f"%a = f32[2] all-reduce(%x), channel_id=1, replica_groups={written}, use_global_device_ids=true, to_apply=%f"
    )
    assert collectives(entry(line), TWO) == [Collective("all-reduce", axes, size, 1, 8)]


@pytest.mark.parametrize(
    ("parts", "iota"),
    [
        ("{'a':(1)2}", "[4,2]<=[2,4]T(1,0)"),
        ("{'a':(1)4}", "[2,4]<=[4,2]T(1,0)"),
        ("{'a':(2)2}", "[4,2]<=[2,2,2]T(0,2,1)"),
        ("{'a':(2)4}", "[2,4]<=[8]"),
        ("{'a':(1)2,'a':(4)2}", "[2,4]<=[2,2,2]T(1,0,2)"),
    ],
)
def test_parts_of_axes(parts, iota):
    """Two notations of the same groups."""
    one, other = ({tuple(sorted(g)) for g in hlo.groups(w, 8)} for w in (f"mesh['a'=8] {parts}", iota))
    assert one == other


@pytest.mark.parametrize(
    ("pairs", "axes", "size"),
    [("{{0,1},{1,2},{4,5}}", ("expert",), 4), ("{{0,4},{4,0}}", ("data",), 2), ("{{1,1}}", (), 1), ("{}", (), 1)],
)
def test_a_permutation_has_its_axes(pairs, axes, size):
    line = f"%p = bf16[3] collective-permute(%x), channel_id=1, source_target_pairs={pairs}"
    assert collectives(entry(line), TWO) == [Collective("collective-permute", axes, size, 1, 6)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        *(("f32[3,5]{1,0}", 60), ("bf16[7]{0:T(256)(128)(2,1)S(1)}", 14), ("f16[]", 2), ("f64[2]", 16), ("pred[9]", 9)),
        *(("s8[5]", 5), ("u8[5]", 5), ("s16[5]", 10), ("u32[5]", 20), ("s64[5]", 40), ("c64[2]", 16), ("c128[2]", 32)),
        *(
            ("f8e4m3fn[6]", 6),
            ("f8e5m2[6]", 6),
            ("f8e4m3b11fnuz[6]", 6),
            ("f4e2m1fn[5]", 3),
            ("s4[5]", 3),
            ("u4[8]", 4),
        ),
        *(("f32[0,4]", 0), ("f32[<=3,2]", 24), ("(f32[2]{0}, /*index=5*/bf16[3]{0}, token[])", 14)),
    ],
)
def test_shapes_have_their_bytes(shape, size):
    assert collectives(entry(f"ROOT %r = {shape} all-to-all(%x), replica_groups=[2,4]<=[8]"), TWO)[0].bytes == size


def test_names_of_instructions_say_nothing():
    text = entry(
        "%all-to-all.3 = f32[4] add(%all-reduce.1, %x)",
        "%all_reduce.9 = f32[4] fusion(%all-to-all.3), kind=kLoop, calls=%all-gather.2",
        '%psum = f32[4] reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="all-gather("}',
    )
    text = "%all-gather.2 (p: f32[4]) -> f32[4] {\n  ROOT %all-gather = f32[4] negate(%p)\n}\n" + text
    assert [c.op for c in collectives(text, TWO)] == ["reduce-scatter"]


START_AND_DONE = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%p), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}, execution_thread="parallel"

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %rd = (f32[8]{0}, f32[4]{0}) all-reduce-done(%r)
  %g = ((f32[8]{0}, s8[4]{0}), (f32[16]{0}, s8[8]{0})) all-gather-start(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0)
  %gd = (f32[16]{0}, s8[8]{0}) all-gather-done(%g)
  %p = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %pd = f32[8]{0} collective-permute-done(%p)
  %s = ((f32[8]{0}), f32[8]{0:T(8)S(1)}, u32[]{:S(2)}, u32[]) all-to-all-start(f32[8] %x), replica_groups={{0,1}}
  %su = ((f32[8]{0}), f32[8]{0}, u32[], u32[]) all-to-all-update(%s)
  %sd = f32[8]{0} all-to-all-done(%su)
  %w = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), async_execution_thread="parallel", calls=%wrapped
  %wu = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%w), calls=%wrapped
  ROOT %wd = f32[2]{0} async-done(%wu), calls=%wrapped
}
"""


def test_start_and_done_are_one():
    """Only the results of a start are moved, not the operands it also returns."""
    assert collectives(START_AND_DONE, TWO) == [
        Collective("all-reduce", ("expert",), 4, 1, 48),
        Collective("all-gather", ("data",), 2, 1, 72),
        Collective("collective-permute", ("expert",), 4, 1, 32),
        Collective("all-to-all", ("expert",), 2, 1, 32),
        Collective("reduce-scatter", ("expert",), 4, 1, 8),
    ]


CALLS = """HloModule m, num_partitions=8

%small (p: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

%large (p: f32[4]) -> f32[4] {
  %b = f32[4]{0} call(%p), to_apply=%small
  ROOT %c = f32[16]{0} all-gather(%b), replica_groups=[2,4]<=[8], dimensions={0}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %t = f32[4]{0} conditional(%which, %x, %x), true_computation=%small, false_computation=%large
}

%test (s: (s32[], f32[4])) -> pred[] {
  ROOT %u = pred[] custom-call(%x), custom_call_target="f", called_computations={%small, %small}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %w = (s32[], f32[4]) while(%s), condition=%test, body=%body, backend_config=BACKEND
}
"""


@pytest.mark.parametrize(
    "config", [r'"{\"known_trip_count\":{\"n\":\"3\"}}"', '{"other":"7","known_trip_count":{"n":"3"},"init":{"n":"5"}}']
)
def test_what_is_called(config):
    """Three times the larger branch, and the condition once more than that."""
    assert counts(CALLS.replace("BACKEND", config), TWO) == {
        ("all-reduce", ("data", "expert")): (3 + 4 * 2, 11 * 16),
        ("all-gather", ("expert",)): (3, 3 * 64),
    }


TPU_LOOP = """HloModule m, num_partitions=8

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %by = s32[]{:T(128)} constant(BY)
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %next = s32[]{:T(128)} add(%i, %by), metadata={op_name="jit(f)/while/body/add"}
  %r = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=mesh['data'=2,'expert'=4] {'data'}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[4]{0}) tuple(%next, %r)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %end = s32[]{:T(128)} constant(20)
  %q = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (y: f32[4]) -> f32[4] {
  %zero = s32[]{:T(128)} constant(FIRST)
  %y = f32[4]{0} parameter(0)
  %copy = s32[]{:T(128)} copy(%zero)
  %start = (f32[4]{0:S(1)}, f32[4]{0}, u32[]) copy-start(%y)
  %done = f32[4]{0:S(1)} copy-done(%start)
  %s = (s32[]{:T(128)}, f32[4]{0}) tuple(%copy, %done)
  ROOT %w = (s32[]{:T(128)}, f32[4]{0}) while(%s), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("first", "by", "times"), [(0, 1, 20), (5, 1, 15), (0, 3, 7), (-1, 7, 3), (18, 2, 1)])
def test_a_loop_on_tpu_is_counted_by_its_counter(first, by, times):
    text = TPU_LOOP.replace("FIRST", str(first)).replace("BY", str(by))
    assert counts(text, TWO) == {("all-reduce", ("data",)): (times, 16 * times)}


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("direction=LT", "direction=NE"),
        ("constant(FIRST)", "parameter(1)"),
        ("constant(20)", "fusion(%q), calls=%f"),
        ("constant(BY)", "get-tuple-element(%p), index=1"),
        ("add(%i, %by)", "multiply(%i, %by)"),
        ("get-tuple-element(%q), index=0", "bitcast-convert(%end)"),
    ],
)
def test_a_loop_on_tpu_that_does_not_count(line, other):
    text = TPU_LOOP.replace(line, other).replace("FIRST", "0").replace("BY", "1").replace("%f\n", "%add\n")
    with pytest.raises(ValueError, match="the loop w"):
        collectives(text, TWO)


TPU_FUSIONS = """HloModule m, num_partitions=8

%start (p: f32[4]) -> (f32[4], f32[8], u32[]) {
  %g1 = f32[8] all-gather(%p), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="0"}
  ROOT %c1 = (f32[4], f32[8], u32[]{:S(2)}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p: f32[4]) -> (f32[9], f32[4], f32[8], u32[]) {
  %g2 = f32[8] all-gather(%p), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="0"}
  ROOT %c2 = (f32[9], f32[4], f32[8], u32[]{:S(2)}) custom-call(%g2), custom_call_target="f"
}

%end (p: f32[4]) -> f32[8] {
  ROOT %g3 = f32[8] all-gather(%p), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="0"}
}

%another (p: f32[4]) -> f32[8] {
  ROOT %g4 = f32[8] all-gather(%p), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="1"}
}

%all-reduce-scatter (p: bf16[8,6]) -> bf16[4,6] {
  %r = bf16[8,6] all-reduce(%p), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %d = bf16[4,6] dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={4,6}
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %s = (f32[4], f32[8], u32[]) fusion(%x), kind=kCustom, calls=%start
  %m = (f32[9], f32[4], f32[8], u32[]) fusion(%s), kind=kOutput, calls=%meanwhile
  %e = f32[8] fusion(%m), kind=kCustom, calls=%end
  %f = f32[8] fusion(%m), kind=kCustom, calls=%another
  ROOT %z = bf16[4,6] fusion(%y), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/MLP/dot_general"}
}
"""


def test_fusions_on_tpu():
    """A gather in three pieces is one; an all-reduce of which a device keeps its slice is a reduce-scatter."""
    assert collectives(TPU_FUSIONS, TWO) == [
        *[Collective("all-gather", ("data",), 2, 1, 32)] * 2,
        Collective("reduce-scatter", ("data",), 2, 1, 48, "MLP"),
    ]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("module @jit_f { func.func public @main() { return } }", "no ENTRY.*compiled.as_text"),
        ("HloModule m, num_partitions=4\n\nENTRY %e () -> f32[] {\n}", "is for 4 devices, the mesh has 8"),
        (
            entry("%a = f32[2] all-reduce(%x), replica_groups={{0,8}}, to_apply=%f"),
            r"\{\{0,8\}\}.*the mesh's 8 devices",
        ),
        (entry("%a = f32[2] all-reduce(%x), replica_groups=@new<8>, to_apply=%f"), "@new<8> are written in a way"),
    ],
)
def test_text_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        collectives(text, TWO)


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("op", "size", "wire"),
    [
        ("all-to-all", 4, 75),
        ("ragged-all-to-all", 4, 75),
        ("all-gather", 4, 75),
        ("reduce-scatter", 4, 300),
        ("all-reduce", 4, 150),
        ("all-reduce", 8, 175),
        ("collective-permute", 4, 100),
        ("all-reduce", 1, 0),
        ("collective-permute", 1, 0),
    ],
)
def test_wire_bytes_follow_the_ring(op, size, wire):
    assert Collective(op, ("expert",), size, 2, 100).wire == wire


def test_collectives_of_one_kind_are_merged():
    one, other = Collective("all-gather", ("data",), 2, 3, 30, "a"), Collective("all-gather", ("data",), 2, 1, 4, "b")
    first = Collective("all-gather", (), 1, 1, 4, "b")
    assert merged([one, other, first, one]) == [first._replace(where=""), Collective("all-gather", ("data",), 2, 7, 64)]
    assert merged([other, one, first, one], where=True) == [
        first,
        Collective("all-gather", ("data",), 2, 6, 60, "a"),
        other,
    ]
