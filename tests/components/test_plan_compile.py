"""Reading the TPU compiler: its refusals, its schedules; with libtpu (`make tpu`), its programs."""

import dataclasses
import importlib.util

import jax
import pytest

from moe_jax import GLU, MLP, AllToAll, LMConfig, LoadBalance, MoEConfig, RaggedAllToAll, Scatter, Sort, Top2
from moe_jax.attention import MHA
from moe_jax.audit.communication import compare_collectives
from moe_jax.config import DataConfig, Experiment, OptimConfig
from moe_jax.costs.chips import chip
from moe_jax.costs.communication import step
from moe_jax.costs.memory import memory
from moe_jax.optim import Adafactor, Constant
from moe_jax.plan import compile as compiler
from moe_jax.plan.kernels import Fills, kernels, odd_fills
from moe_jax.plan.overlap import Overlap, overlaps
from moe_jax.plan.schedule import Schedule
from tests.programs.test_parallelism_page import GLAM

# Lines of programs for v5e:2x4 (libtpu 0.0.52), without metadata and most of their configuration.
PROGRAM = """HloModule jit_train_step, is_scheduled=true, num_partitions=8

%fused_computation.538 (param_0.1: s32[4,256]) -> s32[4,256] {
  %param_0.1 = s32[4,256]{1,0:T(4,128)} parameter(0)
  ROOT %bitcast.1 = s32[4,256]{1,0:T(4,128)} bitcast(%param_0.1)
}

%fused_computation.26 (param_0.2: bf16[1,128,4,64], param_1.2: bf16[1024,768]) -> bf16[1,256,4,64] {
  %param_0.2 = bf16[1,128,4,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.115 = bf16[1,256,4,64]{1,3,2,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=26, replica_groups=mesh['slice'=1,'data'=1,'fsdp'=2,'expert'=4,'tensor'=1] {'fsdp'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="6"}
}

%fused_computation.77 (param_0.3: bf16[1024,768], param_1.3: bf16[768,3072]) -> bf16[1024,3072] {
  %param_0.3 = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.3 = bf16[768,3072]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.74 = bf16[1024,3072]{1,0:T(8,128)(2,1)} convolution(%param_0.3, %param_1.3), dim_labels=bf_io->bf
}

%body (wide.arg: (s32[], bf16[4,2,160,256], s32[4,256], bf16[1,128,4,64], bf16[1024,768], bf16[768,3072])) -> (s32[], bf16[4,2,160,256], s32[4,256], bf16[1,128,4,64], bf16[1024,768], bf16[768,3072]) {
  %wide.arg = (s32[]{:T(128)}, bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)}, s32[4,256]{1,0:T(4,128)}, bf16[1,128,4,64]{1,3,2,0}, bf16[1024,768]{1,0}, bf16[768,3072]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%wide.arg), index=0
  %bitcast.636 = bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.arg), index=1
  %copy-done.223 = s32[4,256]{1,0:T(4,128)} get-tuple-element(%wide.arg), index=2
  %weight = bf16[1,128,4,64]{1,3,2,0} get-tuple-element(%wide.arg), index=3
  %x = bf16[1024,768]{1,0} get-tuple-element(%wide.arg), index=4
  %up = bf16[768,3072]{1,0} get-tuple-element(%wide.arg), index=5
  %add_bitcast_fusion.1 = s32[4,256]{1,0:T(4,128)S(1)} fusion(%copy-done.223), kind=kLoop, calls=%fused_computation.538, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"1903","iteration_bounds":["1"]}}
  %all-to-all-start.2 = ((bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)S(1)}), bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%bitcast.636), channel_id=1, replica_groups=mesh['slice'=1,'data'=1,'fsdp'=2,'expert'=4,'tensor'=1] {'expert'}, dimensions={0}
  %dot = bf16[1024,3072]{1,0:T(8,128)(2,1)} fusion(%x, %up), kind=kOutput, calls=%fused_computation.77, backend_config={"window_config":{"estimated_cycles":"30000","iteration_bounds":["1"]}}
  %all-to-all-done.2 = bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)S(1)} all-to-all-done(%all-to-all-start.2)
  %gathered = bf16[1,256,4,64]{1,3,2,0} fusion(%weight, %x), kind=kOutput, calls=%fused_computation.26, backend_config={"window_config":{"estimated_cycles":"2000","iteration_bounds":["1"]}}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)}, s32[4,256]{1,0:T(4,128)}, bf16[1,128,4,64]{1,3,2,0}, bf16[1024,768]{1,0}, bf16[768,3072]{1,0}) tuple(%next, %all-to-all-done.2, %add_bitcast_fusion.1, %weight, %x, %up)
}

%condition (arg: (s32[], bf16[4,2,160,256], s32[4,256], bf16[1,128,4,64], bf16[1024,768], bf16[768,3072])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)}, s32[4,256]{1,0:T(4,128)}, bf16[1,128,4,64]{1,3,2,0}, bf16[1024,768]{1,0}, bf16[768,3072]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (rows: bf16[4,2,160,256], ids: s32[4,256], weight: bf16[1,128,4,64], x: bf16[1024,768], up: bf16[768,3072]) -> bf16[8,40,768] {
  %rows = bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %ids = s32[4,256]{1,0:T(4,128)} parameter(1)
  %weight.1 = bf16[1,128,4,64]{1,3,2,0} parameter(2)
  %x.1 = bf16[1024,768]{1,0} parameter(3)
  %up.1 = bf16[768,3072]{1,0} parameter(4)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)}, s32[4,256]{1,0:T(4,128)}, bf16[1,128,4,64]{1,3,2,0}, bf16[1024,768]{1,0}, bf16[768,3072]{1,0}) tuple(%zero, %rows, %ids, %weight.1, %x.1, %up.1)
  %loop = (s32[]{:T(128)}, bf16[4,2,160,256]{3,2,1,0:T(8,128)(2,1)}, s32[4,256]{1,0:T(4,128)}, bf16[1,128,4,64]{1,3,2,0}, bf16[1024,768]{1,0}, bf16[768,3072]{1,0}) while(%begin), condition=%condition, body=%body
  %copy.927 = bf16[8,8,40,768]{3,2,1,0:T(8,128)(2,1)S(1)} custom-call(%loop), custom_call_target="AllocateBuffer"
  %psum_invariant.259 = f32[393]{0:T(512)S(1)} all-reduce(%copy.927), channel_id=1, replica_groups=mesh['slice'=1,'data'=1,'fsdp'=2,'expert'=4,'tensor'=1] {'expert'}, use_global_device_ids=true, to_apply=%region_33.37
  ROOT %all_to_all.352 = bf16[8,8,40,768]{3,2,0,1:T(8,128)(2,1)S(1)} all-to-all(%copy.927), channel_id=1, replica_groups=mesh['slice'=1,'data'=1,'fsdp'=2,'expert'=4,'tensor'=1] {'expert'}, dimensions={1}, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501

# How the compiler refuses: the first of v4:8x8x16 (libtpu 0.0.52), the second is XLA's older wording.
TOO_MUCH = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (69.25G) exceeds available HBM (30.75G). HLO module: jit_train_step.\nSee https://openxla.org"
)
OLDER = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.25G of 30.75G hbm. Exceeded by 4.50G."


def test_overlapped_collectives_are_told_from_synchronous_ones():
    found = overlaps(Schedule.of(PROGRAM), clock=1e6)
    assert found == [
        Overlap("all-gather", "fused", 6, 6 * 256 * 4 * 64 * 2, pytest.approx(6 * 2000 / 1e6)),
        Overlap("all-reduce", "synchronous", 1, 393 * 4, 0.0),
        Overlap("all-to-all", "asynchronous", 6, 6 * 4 * 2 * 160 * 256 * 2, pytest.approx(6 * 30000 / 1e6)),
        Overlap("all-to-all", "synchronous", 1, 8 * 8 * 40 * 768 * 2, 0.0),
    ]
    assert [o.seconds for o in overlaps(Schedule.of(PROGRAM), clock=None)] == [None] * 4


def test_loops_are_counted_as_often_as_they_run():
    schedule = Schedule.of(PROGRAM)
    assert schedule.times == {"main": 1, "body": 6, "condition": 7}
    assert schedule.cycles == 6 * (1903 + 30000 + 2000) + 7
    assert schedule.flops == 6 * 2 * 1024 * 768 * 3072


NESTED = """HloModule nested, is_scheduled=true

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %start = ((f32[4]{0}), f32[8]{0}, u32[]{:S(2)}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
  %add.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"5"}
  %add.2 = f32[4]{0} fusion(%p), kind=kCustom, calls=%nothing, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %done = f32[4]{0} all-gather-done(%start)
}

%nothing (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}

%yes (r: f32[4]) -> pred[] {
  ROOT %r = pred[] constant(true)
}

%outer (s: f32[4]) -> f32[4] {
  %s = f32[4]{0} parameter(0)
  ROOT %w = f32[4]{0} while(%s), condition=%yes, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (t: f32[4]) -> f32[4] {
  %t = f32[4]{0} parameter(0)
  ROOT %v = f32[4]{0} while(%t), condition=%yes, body=%outer, backend_config={"known_trip_count":{"n":"7"}}
}
"""


def test_loops_in_loops():
    """A result is not an operand, and every level counts."""
    assert overlaps(Schedule.of(NESTED), 1.0) == [Overlap("all-gather", "asynchronous", 21, 21 * 32, 21 * 5)]


# A matrix multiplication as TPU programs write it, its operands, and its multiply-adds.
MATMULS = {
    "plain": ("f32[1024,768]", "bf16[1024,64]", "bf16[768,64]", "dim_labels=bf_oi->bf", 1024 * 768 * 64),
    "transposed": ("bf16[768,3072]", "bf16[1024,768]", "bf16[1024,3072]", "dim_labels=fb_io->bf", 1024 * 768 * 3072),
    "a batch of experts": (
        *("bf16[8,320,3072]", "bf16[8,320,768]", "bf16[8,768,3072]"),
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
        8 * 320 * 768 * 3072,
    ),
    "a batch of heads": (
        *("f32[12,1024,1024]", "bf16[1024,12,64]", "bf16[1024,12,64]"),
        "window={size=12 stride=11 lhs_dilate=12}, dim_labels=b0f_o0i->0bf",
        12 * 1024 * 1024 * 64,
    ),
    "heads that are summed": (
        *("bf16[1024,768,1]", "bf16[1024,12,64]", "bf16[768,12,64]"),
        "window={size=12}, dim_labels=b0f_o0i->bf0",
        1024 * 768 * 12 * 64,
    ),
    "heads of the output": (
        *("bf16[1024,12,64]", "bf16[1024,768,1]", "bf16[12,64,768]"),
        "window={size=12 pad=11_11 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
        1024 * 768 * 12 * 64,
    ),
}


@pytest.mark.parametrize("name", MATMULS)
def test_matrix_multiplications(name):
    result, left, right, how, products = MATMULS[name]
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {result} {{\n  %a = {left}{{0}} parameter(0)\n"
        f"  %b = {right}{{0}} parameter(1)\n  ROOT %c = {result}{{0}} convolution(%a, %b), {how}\n}}\n"
    )
    assert Schedule.of(text).flops == 2 * products


# Lines of Mixtral's step for v5p:4x4x4 (libtpu 0.0.50.1): kernels of a layer whose buffers hold four times its rows.
KERNELS = """HloModule kernels, is_scheduled=true

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %sizes = s32[1]{0:T(128)} constant({16})
  %w = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %g = bf16[64,512]{1,0:T(8,128)(2,1)} broadcast(%i), dimensions={}, backend_config={"estimated_cycles":"6000"}
  %small = bf16[64,512]{1,0:T(8,128)(2,1)} broadcast(%i), dimensions={}, backend_config={"estimated_cycles":"20"}
  %up = bf16[64,512]{1,0:T(8,128)(2,1)} custom-call(%sizes, %x, %w), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/jvp(LM)/while/body/stack_0/moe_0/ragged_dot_general"}, backend_config={"custom_call_config":{"body":"TUw="}}
  %back = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%sizes, %g, %w), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/jvp(LM)/while/body/stack_0/moe_0/ragged_dot_general"}
  %dw = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} custom-call(%sizes, %x, %g), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/transpose(jvp(LM))/while/body/stack_0/moe_0/outer"}
  %act = (bf16[64,512]{1,0:T(8,128)(2,1)}) custom-call(%sizes, %up, %g), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/jvp(LM)/while/body/stack_0/attention_0/act"}
  ROOT %out = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i, %back)
}

%yes (q: (s32[], bf16[64,128])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[64,128]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (t: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %t = (s32[]{:T(128)}, bf16[64,128]{1,0}) parameter(0)
  ROOT %v = (s32[]{:T(128)}, bf16[64,128]{1,0}) while(%t), condition=%yes, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_kernels_without_an_estimate_are_named_and_priced():
    """FLOPs of grouped matmuls and of their gradients, on used rows; bytes of others; the rates are the chip's."""
    v5p = chip("v5p")._replace(flops=1e9 / 0.86, hbm_rate=1e9)
    found = {(k.name, k.where): k for k in kernels(Schedule.of(KERNELS), v5p, used=0.25)}
    flops, rows, matrices = 2 * 16 * 128 * 512, 2 * 16 * (128 + 512), 2 * 128 * 512
    layer = "LM/stack_0/moe_0"
    for name, where in (
        ("grouped matmul [64, 128] x [1, 128, 512]", layer),
        ("grouped matmul [64, 512] x [1, 128, 512]", layer),
        ("gradient of matrices [64, 128] x [64, 512]", f"{layer} backward"),
    ):
        kernel = found.pop((name, where))
        assert (kernel.count, kernel.flops, kernel.bytes) == (3, 3 * flops, 3 * (rows + matrices))
        assert kernel.seconds == pytest.approx(3 * flops / 1e9)
    ((name, _), other) = found.popitem()
    assert (name, other.flops, other.bytes) == ("kernel for [64, 512]", 0, 3 * 3 * 2 * 64 * 512)
    assert other.seconds == pytest.approx(other.bytes / 1e9)
    assert not found


def test_fills_of_an_odd_price_are_flagged():
    """One of two is estimated to take more than four times its bytes at the memory's bandwidth."""
    v5p, size = chip("v5p")._replace(hbm_rate=1e9), 3 * 2 * 64 * 512
    fills = odd_fills(Schedule.of(KERNELS), v5p, clock=1e7)
    assert fills == Fills(3, size, pytest.approx(3 * 6000 / 1e7), pytest.approx(size / 1e9))
    found = compiler.refused(RuntimeError(TOO_MUCH), "v4:8x8x16", 4.0, 5.0)
    assert (found.scheduled, found.without_fills) == (None, None)
    made = found._replace(
        optimal_seconds=10.0, fills=Fills(3, size, 4.0, 1.0), kernels=kernels(Schedule.of(KERNELS), v5p)
    )
    priced = sum(k.seconds for k in made.kernels)
    assert (made.scheduled, made.without_fills) == (10.0 + priced, 7.0 + priced)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5p:4x4x4", {"wrap": (True, True, True)}),
        ("v4:4x4x8", {"chip_config_name": "megacore", "wrap": (True, True, True)}),
        ("v4:2x2x4", {"chip_config_name": "megacore"}),
        ("tpu7x:2x2x1", {}),
        ("v6e:16x16", {}),
        ("v5litepod:4x4", {}),
    ],
)
def test_slices_are_compiled_for_with_the_links_that_they_have(name, options):
    assert compiler.slice_options(name) == options


@pytest.mark.parametrize(("text", "peak"), [(TOO_MUCH, 69.25), (OLDER, 35.25)])
def test_a_refusal_says_by_how_much(text, peak):
    found = compiler.refused(RuntimeError(text), "v4:8x8x16", 4.0, 5.0)
    assert (found.fits, found.collectives, found.flops) == (False, [], None)
    assert (found.peak, found.limit, found.over) == tuple(int(n * 2**30) for n in (peak, 30.75, peak - 30.75))
    assert (found.lower_seconds, found.compile_seconds) == (4.0, 5.0)


def test_another_refusal_is_one_sentence():
    error = RuntimeError("INTERNAL: Mosaic failed to compile\nstack trace of its authors")
    with pytest.raises(ValueError, match=r"^The TPU compiler refuses this step for v4:8x8x16: INTERNAL: Mosaic .*e$"):
        compiler.refused(error, "v4:8x8x16", 0.0, 0.0)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install .[tpu]" in compiler.available()
    with pytest.raises(ValueError, match=r"^v4:2x2x4 cannot be compiled for: .* pip install \.\[tpu\]\.$"):
        compiler.devices("v4:2x2x4")


# ---------------------------------------------------------------- with libtpu


@pytest.fixture
def optimized():
    """Compiled as training is; conftest.py asks for less."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


SMALL = Experiment(
    LMConfig(
        V=512,
        D=256,
        N=4,
        attention=MHA(4, 64),
        ffn=GLU(F=512, activation="gelu"),
        moe=MoEConfig(E=8, router=Top2(), experts=MLP(F=256), dispatch=Scatter(1.25), losses=(LoadBalance(0.01),)),
        remat="save_collectives",
        dtype="bfloat16",
    ),
    DataConfig(L=256, B=32),
    OptimConfig(Adafactor(), Constant(0.01)),
    mesh=(("fsdp", 2), ("expert", 4)),
)
GLAM = dataclasses.replace(  # as its table of communication has it, on a mesh where it fits
    GLAM,
    model=dataclasses.replace(GLAM.model, remat="full"),
    mesh=(("fsdp", 16), ("expert", 16), ("tensor", 4)),
)


@pytest.mark.tpu
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("exp", "topology"), [(SMALL, "v5e:2x4"), (GLAM, "v4:8x8x16")], ids=["small", "GLaM 64B"])
def test_the_compiled_step_fits_and_sends_what_is_predicted(exp, topology):
    found = compiler.compile_step(exp, topology)
    assert (found.fits, found.over) == (True, 0)
    assert found.peak <= found.limit
    assert found.arguments >= memory(exp, dict(exp.mesh)).parameters
    rows = compare_collectives(step(exp, dict(exp.mesh), "tpu"), found.collectives)
    exact = ("all-to-all", "all-gather") if exp is SMALL else ("all-to-all", "all-gather", "reduce-scatter")
    assert {r.compiled.op: r.detail for r in rows if r.compiled.op in exact} == dict.fromkeys(exact, "")
    if exp is GLAM:  # small gradients are not scattered; here only sums of squares are made otherwise than predicted
        assert max(abs(r.compiled.bytes - r.predicted.bytes) for r in rows) < 128
    assert sum(o.count for o in found.overlaps) == sum(c.count for c in found.collectives)
    assert min(found.flops, found.optimal_seconds) > 0


def with_layer(**fields) -> Experiment:
    """SMALL with another MoE layer."""
    moe = dataclasses.replace(SMALL.model.moe, **fields)
    return dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, moe=moe))


@pytest.mark.tpu
@pytest.mark.usefixtures("optimized")
def test_one_chunk_travels_while_another_is_computed():
    """Two chunks hide more of the exchange behind computation than one; none where nothing is asynchronous."""
    hidden = {}
    for chunks, asynchronous in ((1, True), (2, True), (2, False)):
        options = {"xla_tpu_enable_async_all_to_all": asynchronous}
        found = compiler.compile_step(with_layer(exchange=AllToAll(chunks=chunks)), "v5e:2x4", options)
        exchanges = [o for o in found.overlaps if o.op == "all-to-all"]
        assert sum(o.count for o in exchanges) == 8 * chunks  # two layers of four
        hidden[chunks, asynchronous] = sum(o.seconds for o in exchanges)
    assert hidden[2, False] == 0
    assert hidden[2, True] > 1.3 * hidden[1, True] > 0


@pytest.mark.tpu
@pytest.mark.usefixtures("optimized")
def test_dropless_is_grouped_matmuls_on_a_tpu():
    """All of a dropless layer's products are kernels over groups; XLA's own gradient of weights is E times the work."""
    found = compiler.compile_step(with_layer(dispatch=Sort(), exchange=RaggedAllToAll()), "v5e:2x4")
    dense = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, moe=None, moe_layers="none"))
    assert found.flops <= compiler.compile_step(dense, "v5e:2x4").flops


@pytest.mark.tpu
def test_an_unknown_slice_is_one_sentence():
    with pytest.raises(ValueError, match=r"^libtpu knows no slice 'v5litepod:4x4': "):
        compiler.devices("v5litepod:4x4")
