"""Recordings of routing: they change nothing, say what happened, are kept whole, and can be made again."""

import dataclasses
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    GLU,
    MLP,
    Einsum,
    EncoderDecoderConfig,
    ExpertChoice,
    Gather,
    Ids,
    LMConfig,
    MoE,
    MoEConfig,
    RaggedAllToAll,
    Scatter,
    Sort,
    Top2,
    TopK,
    ViTConfig,
)
from moe_jax.attention import MHA, NoPE, Relative
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import DataConfig, Experiment
from moe_jax.data import Batch, Folder, Images, NextToken, Pairs, cross_entropy
from moe_jax.files import sha256, write_sealed
from moe_jax.inspect import recorder, recording
from moe_jax.models import Call
from moe_jax.moe import RECORDED, check_record
from tests.cases import close, context, normal

V, D, E, K, B, L = 31, 8, 4, 2, 8, 8
MOE = MoEConfig(E=E, router=Top2(), experts=GLU(F=6), dispatch=Scatter(1.0))
MODEL = LMConfig(V=V, D=D, N=2, attention=MHA(2, 4), moe=MOE, moe_layers="all", remat="full")
SORT = dataclasses.replace(MOE, dispatch=Sort(), exchange=RaggedAllToAll(buffer=1.0))
PAIRS = EncoderDecoderConfig(
    V=V,
    D=D,
    N=1,
    attention=MHA(2, 4, position=Relative(shared=True)),
    moe_layers="all",
    moe=dataclasses.replace(MOE, router=TopK(K=K)),
)
IMAGES = ViTConfig(
    V=5, D=D, N=1, attention=MHA(2, 4, position=NoPE(), bias=True), moe_layers="all", moe=MOE, patch=2, image=(4, 4, 1)
)
MESH = "d2e4"
ALL = tuple(RECORDED)


def text(seed: int = 0) -> Batch:
    """Two documents in a row; the last row is half padding, the one before it nothing else."""
    rng, place_L = np.random.default_rng(seed), np.arange(L)
    row = rng.integers(1, V, (B, L + 1)).astype(np.int32)
    segment = np.tile(np.where(place_L < 3, 1, 2), (B, 1)).astype(np.int32)
    segment[-2], segment[-1, 5:] = 0, 0
    position = np.tile(np.where(place_L < 3, place_L, place_L - 3), (B, 1)).astype(np.int32)
    domain = (np.arange(B) % 3).astype(np.int32)
    return Batch(row[:, :-1], row[:, 1:], segment, position, (segment > 0) & (place_L != 2), domain)


def pairs() -> Pairs:
    """Sources are longer than targets."""
    rng, real_BL = np.random.default_rng(1), np.arange(4) < rng_ends(4)
    source = rng.integers(1, V, (B, L)).astype(np.int32)
    target = rng.integers(1, V, (B, 4)).astype(np.int32)
    segments = ((np.arange(L) < rng_ends(L)).astype(np.int32), real_BL.astype(np.int32))
    return Pairs(source, segments[0], target, target[:, ::-1].copy(), segments[1], real_BL, np.zeros(B, np.int32))


def rng_ends(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(2, n + 1, (B, 1))


def images() -> Images:
    """The last one is padding."""
    real = (np.arange(B) < B - 1)[:, None]
    target = np.arange(B, dtype=np.int32)[:, None] % 5
    return Images(normal(3, B, 4, 4, 1), target, real, np.zeros(B, np.int32))


def parameters(model, batch):
    """Larger than at the start, so that some experts are popular."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.tree.map(jnp.asarray, batch))
    return jax.tree.map_with_path(lambda path, a: 0.5 * normal(len(str(path)), *a.shape), shapes)


def program(model, batch, mesh=None, options=None):
    """(params, key, replay) -> outputs, reports, and gradients where there is a key (training), recorded or not."""

    def loss(record, params, batch, key, replay):
        logits_BLV, aux = model.apply(params, batch, Call(key, replay=replay, record=record))
        nats_BL = jnp.where(batch.loss_mask_BL, cross_entropy(logits_BLV, batch.target_BL), 0)
        return nats_BL.sum() + aux.loss.mean(), (logits_BLV, aux)

    def run(record, params, batch, key, replay=None):
        if key is None:
            return loss(record, params, batch, key, replay), {}
        return jax.value_and_grad(partial(loss, record), has_aux=True)(params, batch, key, replay)

    compiled = jax.jit(run, static_argnums=0, compiler_options=options)

    def call(record, params, *given):
        with context(mesh):
            return jax.device_get(compiled(record, params, batch, *given))

    return call


KEY = jax.random.key(5)


@partial(jax.jit, static_argnames="record")
def APPLY(params, batch, record=(), replay=None):
    return MODEL.apply(params, batch, Call(replay=replay, record=record))


# As XLA compiles by default; tests use its older emitters, which compile faster, and round by what else is computed.
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib") < "0.11" else {}
TRIED = {
    "lm": (MODEL, text(), None, KEY),
    "lm-mesh": (MODEL, text(), MESH, None),
    "ragged-mesh": (dataclasses.replace(MODEL, moe=SORT, N=1, causal=False), text(), MESH, None),
    "pairs": (PAIRS, pairs(), None, None),
    "images": (IMAGES, images(), None, None),
}
same = partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.mark.parametrize("name", TRIED)
def test_recording_changes_nothing_and_can_be_made_again(name):
    """Bit for bit: outputs, losses and statistics of a replay that is recorded, and of a recording, noise drawn or not.

    Gradients of a whole model to rounding: which operations XLA fuses, and so how it rounds, goes by the program.
    """
    model, batch, mesh, key = TRIED[name]
    params, run = parameters(model, batch), program(model, batch, mesh, EMITTERS if name == "images" else None)
    plain, grads = run((), params, key)
    chosen = plain[1][1].expert_BLK
    replayed, again = run(ALL, params, key, chosen)
    recorded = run(ALL, params, key)[0] if mesh else replayed
    for loss, (logits, aux) in (replayed, recorded):
        same(plain, (loss, (logits, aux._replace(recorded=None))))
        says_what_happened(aux)
    close(again, grads)
    (_, (other, _)), _ = run(ALL, params, key, (chosen + 1) % E)
    assert not np.array_equal(other, plain[1][0])


def test_a_layer_is_trained_the_same():
    """On eight devices, gradients too, bit for bit: recorded, and with its choices made again; the router learns."""
    x, layer = jnp.array(normal(0, B, L, D)), MoE(MOE)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = jax.tree.map_with_path(lambda path, a: normal(len(str(path)), *a.shape), shapes)

    def loss(params, record, replay):
        y, aux = layer.apply(params, x, None, KEY, None, Ids(expert_BLK=replay), record)
        return (y**2).sum() + aux.loss, (y, aux)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1, compiler_options=EMITTERS)
    with context(MESH):
        plain, ((total, (y, aux)), grads) = run(params, (), None), run(params, ALL, None)
        replayed, other = run(params, (), aux.expert_BLK), run(params, (), (aux.expert_BLK + 1) % E)
    same(plain, ((total, (y, aux._replace(recorded=None))), grads))
    same(plain, replayed)
    assert np.abs(replayed[1]["params"]["router_gate_DE"]).max() > 0
    assert not np.array_equal(other[0][1][0], y)
    says_what_happened(jax.tree.map(lambda a: np.asarray(a)[None], aux))


def says_what_happened(aux):
    """The recording agrees with what is counted, and with itself."""
    expert, (weight, kept, slot, probs, logits, inputs, visits, gains), stats = aux.expert_BLK, aux.recorded, aux.stats
    taken = expert < E
    for n in range(len(expert)):
        np.testing.assert_array_equal(np.bincount(expert[n].ravel(), minlength=E + 1)[:E], stats.choices_E[n])
    np.testing.assert_array_equal(kept.sum((1, 2, 3)), stats.kept)
    assert not kept[~taken].any()
    assert (slot[taken] >= 0).all()
    assert (slot[~taken] == -1).all()
    assert not weight[~taken].any()
    np.testing.assert_allclose(
        (weight[..., None] * (expert[..., None] == np.arange(E))).sum((1, 2, 3)), stats.combine_E, 1e-5
    )
    real = (probs.sum(-1) > 0) & taken.any(-1)
    np.testing.assert_allclose(probs.sum(-1)[real], 1, rtol=1e-5)
    np.testing.assert_allclose((probs * real[..., None]).sum((1, 2)), stats.probs_E, rtol=1e-4)
    np.testing.assert_allclose(jax.nn.softmax(logits)[real], probs[real], rtol=1e-5)
    np.testing.assert_array_equal(visits.sum((1, 2)), stats.choices_E)
    np.testing.assert_allclose(gains.sum((1, 2)), stats.combine_E, rtol=1e-5)
    assert inputs[real].any(-1).all()


@pytest.mark.law(8)
def test_drops_are_those_of_a_queue():
    """Token after token, choice after choice, until an expert has its slots; experts are counted for each sequence."""
    params, batch = parameters(MODEL, text()), text()
    aux = jax.device_get(APPLY(params, batch, record=("kept", "slot"))[1])
    C, dropped = int(np.ceil(1.0 * K * L / E)), 0
    for n, b in np.ndindex(aux.expert_BLK.shape[:2]):
        taken = [0] * E
        for at, k in np.ndindex(L, K):
            e = aux.expert_BLK[n, b, at, k]
            assert aux.recorded.kept_BLK[n, b, at, k] == (e < E and taken[e] < C)
            assert aux.recorded.slot_BLK[n, b, at, k] == (taken[e] if e < E else -1)
            if e < E:
                taken[e] += 1
        dropped += sum(max(0, t - C) for t in taken)
    assert dropped > 5


def test_a_layer_records_and_refuses():
    """`MoE` alone, on one device; experts that choose make no choices of tokens."""
    x = jnp.array(normal(0, 2, L, D))
    layer = MoE(MOE)
    params, run = jax.jit(layer.init)(jax.random.key(0), x), jax.jit(layer.apply, static_argnames="record")
    (y, plain), (z, aux) = run(params, x), run(params, x, record=ALL)
    assert plain.recorded is None
    np.testing.assert_array_equal(y, z)
    assert [a.shape[2:] for a in aux.recorded] == [(K,)] * 3 + [(E,)] * 2 + [(D,)] + [(E,)] * 2
    mask = jnp.arange(L)[None] < jnp.array([[L], [L // 2]])
    _, (_, _, _, its) = run(params, x, mask, record=("logits", "input"))
    assert {name for name, a in its._asdict().items() if a is not None} == {"logits_BLE", "input_BLD"}
    np.testing.assert_array_equal(its.input_BLD, x * mask[..., None])
    np.testing.assert_allclose(its.logits_BLE, its.input_BLD @ params["params"]["router_gate_DE"], rtol=1e-4, atol=1e-6)


def test_what_is_not_recorded():
    """Experts that choose make no choices of tokens, but visits; a name is one of those that there are."""
    x = jnp.array(normal(0, 2, L, D))
    soft = MoE(MoEConfig(E=E, router=ExpertChoice(), experts=MLP(F=4), dispatch=Gather()))
    for name in ("weight", "kept", "slot"):
        with pytest.raises(ValueError, match="makes no choices of tokens"):
            jax.eval_shape(partial(soft.init, record=(name,)), jax.random.key(0), x)
    params = jax.jit(soft.init)(jax.random.key(0), x)
    _, aux = jax.jit(partial(soft.apply, record=("assignments", "combine")))(params, x)
    np.testing.assert_array_equal(aux.recorded.assignments_BLE.sum((0, 1)), aux.stats.choices_E)
    np.testing.assert_allclose(aux.recorded.combine_BLE.sum((0, 1)), aux.stats.combine_E, rtol=1e-5)
    words = r'no tuple of names to record; write record=\("weight", "kept"\)'
    for record in (True, "weight", ["weight"], None):
        with pytest.raises(ValueError, match=words):
            check_record(record)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(partial(MoE(MOE).init, record=("weights",)), jax.random.key(0), x)


@pytest.mark.parametrize(("router", "names"), [(TopK(K=K), ("probs",)), (ExpertChoice(), ("assignments", "input"))])
def test_details_of_two_stacks(router, names):
    """Records hold the details asked for and no others; nothing beyond the end of the shorter sequence."""
    moe = MoEConfig(E=E, router=router, experts=MLP(F=4), dispatch=Einsum(None), losses=())
    model, batch = dataclasses.replace(PAIRS, moe=moe, causal=False), pairs()
    params = parameters(model, batch)
    _, aux = jax.eval_shape(partial(model.apply, call=Call(record=names)), params, batch)
    found = {name: a.shape for name, a in aux.recorded._asdict().items() if a is not None}
    assert found == {RECORDED[name]: (2, B, L, {"input": D}.get(name, E)) for name in names}
    recorded = jax.jit(partial(model.apply, call=Call(record=names)))(params, batch)[1].recorded
    for name in names:
        of_decoder_BL = np.abs(getattr(recorded, RECORDED[name])[1]).sum(-1)
        assert not of_decoder_BL[:, 4:].any()
        assert of_decoder_BL[:, :4].any()


# ---------------------------------------------------------------- to files, on a mesh

EXP = Experiment(MODEL, DataConfig(L=L, B=B, source=Folder("moe_jax")), mesh=(("data", 2), ("expert", 4)))
BATCHES = [text(0), text(1)]


@pytest.fixture(scope="module")
def params():
    return parameters(MODEL, text())


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "one"
    return recorder.record(EXP, params, BATCHES, path, domains=("a", "b", "c"), keep_probs=True)


def test_a_recording_is_what_the_model_does(folder, params):
    """A row for each real token in order, from eight devices as from one, batch by batch."""
    rec = recording.load_recording(folder)
    seen, row, documents = [], 0, set()
    for batch in BATCHES:
        logits, aux = jax.device_get(APPLY(params, batch, record=ALL))
        probs = np.asarray(aux.recorded.probs_BLE, np.float64)
        for b, at in np.ndindex(B, L):
            if batch.segment_BL[b, at] == 0:
                continue
            documents.add((row + b, batch.segment_BL[b, at]))
            shifted = logits[b, at].astype(np.float64) - logits[b, at].max()
            nats = np.log(np.exp(shifted).sum()) - shifted[batch.target_BL[b, at]]
            p = probs[:, b, at]
            best = [sorted(range(E), key=lambda e: -p[n, e])[: K + 2] for n in range(2)]
            seen.append(
                {
                    "expert_TNK": aux.expert_BLK[:, b, at],
                    "weight_TNK": aux.recorded.weight_BLK[:, b, at],
                    "kept_TNK": aux.recorded.kept_BLK[:, b, at],
                    "slot_TNK": aux.recorded.slot_BLK[:, b, at],
                    "probs_TNE": p,
                    "top_id_TNP": best,
                    "top_TNP": [[p[n, e] for e in best[n]] for n in range(2)],
                    "entropy_TN": [-sum(q * np.log(q) for q in p[n]) for n in range(2)],
                    "token_T": batch.tokens_BL[b, at],
                    "position_T": batch.position_BL[b, at],
                    "document_T": len(documents) - 1,
                    "domain_T": batch.domain_B[b],
                    "sequence_T": row + b,
                    "loss_T": nats if batch.loss_mask_BL[b, at] else np.nan,
                }
            )
        row += B
    assert (rec.tokens, rec.layers, rec.K, rec.E, rec.domains) == (len(seen), 2, K, E, ("a", "b", "c"))
    assert set(rec.columns) == set(seen[0])
    for name, column in rec.columns.items():
        expected = np.array([one[name] for one in seen])
        if np.issubdtype(column.dtype, np.floating):
            np.testing.assert_allclose(column, expected, rtol=2e-4, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(column, expected, err_msg=name)
    assert rec.expert_TNK.dtype == np.int16


def test_a_recording_of_a_folder_is_replayed(folder, params):
    """Each part is a batch; its choices, made again, give the logits that are given without, bit for bit."""
    for part, batch in zip(recording.column_files(folder), BATCHES, strict=True):
        expert_NBLK = recording.choices(part, batch.segment_BL > 0)
        (one, aux), (two, _) = APPLY(params, batch), APPLY(params, batch, replay=expert_NBLK)
        np.testing.assert_array_equal(expert_NBLK, aux.expert_BLK)
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, APPLY(params, batch, record=ALL)[0])
    with pytest.raises(ValueError, match="give the part of this batch"):
        recording.choices(part, np.ones((B, L), bool))


@pytest.mark.parametrize(
    ("model", "batch", "stack"),
    [(PAIRS, pairs(), "encoder"), (PAIRS, pairs(), "decoder"), (IMAGES, images(), "decoder")],
)
def test_other_models_are_recorded(model, batch, stack):
    """A stack of an encoder and a decoder, with the loss where it predicts; patches, the class by the first."""
    params = parameters(model, batch)
    look = jax.jit(partial(recorder.routed, model, NextToken(), stack, False))
    tokens = recorder.tokens_of(model, batch, stack)
    seen = jax.device_get(look(params, {}, None, batch))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(seen)), "no NaN on the device (JAX_DEBUG_NANS)"
    rec = recorder.columns(*seen, tokens, batch.domain_B, E, ())
    logits, aux = jax.device_get(jax.jit(model.apply)(params, batch))
    if isinstance(batch, Images):
        real, expert, targets, token = np.repeat(batch.loss_mask_BL, 5, axis=1), aux.expert_BLK, B - 1, -1
    else:
        i = ["encoder", "decoder"].index(stack)
        real = (batch.segment_BL, batch.source_segment_BM)[1 - i] > 0
        expert = aux.expert_BLK[i : i + 1, :, : real.shape[1]]
        targets, token = (0, batch.source_BM[real]) if not i else (real.sum(), batch.tokens_BL[real])
    np.testing.assert_array_equal(rec.expert_TNK, np.moveaxis(expert[:, real], 0, 1))
    np.testing.assert_array_equal(rec.token_T, token)
    np.testing.assert_array_equal(rec.position_T, np.concatenate([np.arange(n) for n in real.sum(1)]))
    assert np.isfinite(rec.loss_T).sum() == targets
    if targets:
        nats = np.asarray(cross_entropy(jnp.array(logits), batch.target_BL))[batch.loss_mask_BL]
        np.testing.assert_allclose(rec.loss_T[np.isfinite(rec.loss_T)], nats, rtol=1e-4)


def small(tokens: int = 5, first: int = 0) -> recording.Recording:
    n = np.arange(first, first + tokens)
    two = np.zeros((tokens, 1, 2), np.float32)
    return recording.Recording(
        *(
            np.zeros((tokens, 1, 2), np.int16),
            two,
            two > 0,
            two.astype(np.int32),
            two,
            two.astype(np.int16),
            two[..., 0],
        ),
        *(n, n, n, n, n, two[:, 0, 0]),
        E=4,
        domains=("x",),
    )


def test_parts_are_written_as_they_come(tmp_path):
    """Nothing is held: a part is on disk before the next is asked for, and there is no recording before the last."""
    folder, seen = tmp_path / "a", []

    def come():
        for i in range(3):
            seen.append(sorted(p.name for p in folder.glob("*")))
            yield small(first=5 * i)

    recording.save_recording(come(), folder, {"note": 1})
    assert seen == [[f"part-0000{j}.npz" for j in range(i)] for i in range(3)]
    assert recording.manifest(folder)["note"] == 1
    np.testing.assert_array_equal(recording.load_recording(folder).token_T, np.arange(15))
    with pytest.raises(ValueError, match="already"):
        recording.save_recording([small()], folder)
    with pytest.raises(ValueError, match="no token"):
        recording.save_recording([], tmp_path / "b")


def test_an_interrupted_recording_is_none(tmp_path):
    """An interrupted recording is refused, and the next one leaves nothing of it."""

    def breaks():
        yield from (small(), small(), small())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording.save_recording(breaks(), tmp_path)
    with pytest.raises(ValueError, match="no manifest"):
        recording.load_recording(tmp_path)
    recording.save_recording([small(7)], tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*")) == ["manifest.json", "part-00000.npz"]
    assert recording.load_recording(tmp_path).tokens == 7


@pytest.mark.parametrize("name", ["part-00001.npz", "manifest.json"])
def test_a_changed_byte_is_seen(tmp_path, name):
    """Any byte of any file, and a missing file, by name, in one sentence."""
    recording.save_recording([small(), small()], tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    for at in np.linspace(0, len(data) - 1, 40).astype(int):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=name):
            recording.load_recording(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=name):
        recording.load_recording(tmp_path)


def written_anew(folder: Path, changes: dict, columns: dict | None = None) -> None:
    """Changes a recording's manifest, and its only part, with right checksums everywhere; None leaves a key out."""
    facts = recording.manifest(folder)
    if columns is not None:
        part = {**recording.load_recording(folder).columns, **columns}
        with open(folder / "part-00000.npz", "wb") as file:
            np.savez(file, **{name: a for name, a in part.items() if a is not None})
        facts["parts"][0]["sha256"] = sha256(folder / "part-00000.npz")
    write_sealed(folder / "manifest.json", {k: v for k, v in {**facts, **changes}.items() if v is not None})


PART = {"file": "part-00000.npz", "sha256": "0" * 64, "tokens": 5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *[({key: None}, f"has no {key!r}, or not as") for key in ("E", "N", "K", "domains", "parts")],
        ({"version": None}, "has version None, but 2 is read here"),
        ({"E": "8"}, "has no 'E', or not as"),
        ({"K": 0}, "has no 'K', or not as"),
        ({"domains": "prose"}, "has no 'domains', or not as"),
        ({"parts": []}, "has no 'parts', or not as"),
        ({"parts": [{**PART, "tokens": "5"}]}, "has no 'parts', or not as"),
        ({"parts": [{"file": "part-00000.npz", "tokens": 5}]}, "has no 'parts', or not as"),
        ({"parts": [{**PART, "file": "../part-00000.npz"}]}, "has no 'parts', or not as"),
        ({"parts": [{**PART, "file": "/etc/passwd"}]}, "has no 'parts', or not as"),
        ({"N": 2}, r"part-00000.npz has \(5, 1, 2\) for the column 'expert_TNK'"),
    ],
)
def test_a_manifest_with_a_right_checksum_that_lacks_something(tmp_path, changes, said):
    recording.save_recording([small()], tmp_path)
    written_anew(tmp_path, changes)
    with pytest.raises(ValueError, match=said):
        recording.load_recording(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"token_T": None}, "has nothing for the column 'token_T'"),
        ({"more_T": np.zeros(5)}, r"has \(5,\) for the column 'more_T'"),
        ({"domains": np.array("x")}, r"has \(\) for the column 'domains'"),
        ({"loss_T": np.zeros(4)}, r"has \(4,\) for the column 'loss_T'"),
        ({"token_T": np.array([None] * 5)}, r"holds no columns \(ValueError\)"),
    ],
)
def test_a_part_with_a_right_checksum_that_has_other_columns(tmp_path, columns, said):
    recording.save_recording([small()], tmp_path)
    written_anew(tmp_path, {}, columns)
    with pytest.raises(ValueError, match=f"part-00000.npz {said}"):
        recording.load_recording(tmp_path)


def test_a_part_with_a_right_checksum_that_is_no_file_of_numpy(tmp_path):
    recording.save_recording([small()], tmp_path)
    for data in (b"", b"PK", b"text", (tmp_path / "part-00000.npz").read_bytes()[:-30]):
        (tmp_path / "part-00000.npz").write_bytes(data)
        facts = recording.manifest(tmp_path)
        facts["parts"][0]["sha256"] = sha256(tmp_path / "part-00000.npz")
        write_sealed(tmp_path / "manifest.json", facts)
        with pytest.raises(ValueError, match=r"part-00000\.npz holds no columns"):
            recording.load_recording(tmp_path)


def test_what_is_kept_with_a_recording_cannot_replace_its_own_facts(tmp_path):
    with pytest.raises(ValueError, match="about has a key 'E', which a recording has itself"):
        recording.save_recording([small()], tmp_path, {"E": 5})
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recorded_from_its_checkpoint(tmp_path):
    """By the config and the arrays in its workdir; twice the same tokens; what is wrong is said."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    model = dataclasses.replace(MODEL, V=257)
    exp = dataclasses.replace(EXP, model=model, data=DataConfig(Folder(str(texts)), L=L, B=B))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(exp.to_json())
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": parameters(model, text()), "step": np.int32(3)}, {"seconds": 0.0})
    call = partial(recorder.record_run, run, data_dir=tmp_path / "data", windows=20)
    folder = call(tmp_path / "rec", dropless=True)
    rec, facts = recording.load_recording(folder), recording.manifest(folder)
    assert (facts["step"], facts["dropless"]) == (3, True)
    assert Experiment.from_json(facts["config"]) == exp
    assert len(np.unique(rec.sequence_T)) == 20
    assert rec.kept_TNK.all()
    other = recording.load_recording(call(tmp_path / "more", mesh={"data": 8}))
    np.testing.assert_array_equal(rec.token_T, other.token_T)
    np.testing.assert_array_equal(rec.expert_TNK[:, 0], other.expert_TNK[:, 0])
    assert not other.kept_TNK.all()
    with pytest.raises(ValueError, match=r"no config\.json"):
        recorder.record_run(tmp_path, tmp_path / "none")


def test_what_cannot_be_recorded_is_refused(params):
    dense = dataclasses.replace(MODEL, moe_layers="none")
    with pytest.raises(ValueError, match="no MoE layer"):
        next(recorder.recordings(dataclasses.replace(EXP, model=dense), params, []))
    with pytest.raises(ValueError, match="stack='middle'"):
        next(recorder.recordings(EXP, params, [], stack="middle"))
