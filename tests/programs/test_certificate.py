"""A certificate holds of what it was made of, and of nothing else."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import certify as program
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import build
from moe_jax.inspect import certificate
from moe_jax.inspect.certificate import Check, certify, fingerprints, verify
from moe_jax.step import State
from tests import programs

KEY, OTHER = b"0123456789abcdef", b"0123456789abcdeg"
CONFIG = '{"model": {"D": 8, "moe": {"E": 4}}, "seed": 0}'
CHECKS = [Check("load_max_over_mean", 1.5, 4.0), Check("dead_experts", 0, 0), Check("worst_knock_out", 0.61, 0.5)]


def weights():
    rng = np.random.default_rng(0)
    return {
        "params": {
            "stack_0": {"up_EDF": rng.normal(size=(2, 3, 4)).astype(np.float32)},
            "embed_VD": jnp.array(rng.normal(size=(5, 3)), jnp.bfloat16),
        },
        "router": {"bias_E": np.zeros(2, np.float32), "step_": np.int32(7)},
    }


@pytest.fixture(params=[None, KEY], ids=["plain", "signed"])
def key(request):
    return request.param


def test_it_holds(key):
    """A certificate holds of the same weights on any devices, and the same config in any format; through JSON too."""
    made = json.loads(json.dumps(certify(CHECKS, weights(), CONFIG, key, {"step": 3})))
    assert verify(made, weights(), CONFIG, key) == []
    assert verify(made, jax.tree.map(jnp.asarray, weights()), json.dumps(json.loads(CONFIG), indent=3), key) == []
    assert [c["pass"] for c in made["checks"]] == [True, True, False]
    assert made["passes"] is False
    assert certify(CHECKS[:2], weights(), CONFIG, key)["passes"] is True
    assert set(made["weights"]) == {"params/stack_0/up_EDF", "params/embed_VD", "router/bias_E", "router/step_"}


def bits(array):
    """Every array that differs from this one in one bit."""
    raw = np.asarray(array)
    for byte in range(raw.nbytes):
        for bit in range(8):
            flat = np.frombuffer(raw.tobytes(), np.uint8).copy()
            flat[byte] ^= 1 << bit
            yield np.frombuffer(flat.tobytes(), raw.dtype).reshape(raw.shape)


def test_every_bit_of_every_weight(key):
    """Changes the certificate of that weight, and a line names it; the sign of zero is a bit too."""
    made = certify(CHECKS, weights(), CONFIG, key)
    leaves = jax.tree.leaves(weights())
    names = list(fingerprints(weights()))
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        changed = list(bits(leaf))
        marks = {certificate.array_fingerprint(other)["sha256"] for other in changed}
        assert len(marks) == len(changed) == 8 * np.asarray(leaf).nbytes
        assert made["weights"][name]["sha256"] not in marks
        tree = jax.tree.unflatten(jax.tree.structure(weights()), [*leaves[:i], changed[-1], *leaves[i + 1 :]])
        assert verify(made, tree, CONFIG, key) == [f"weight {name} has other values"]


def test_a_changed_weight_is_named(key):
    """A changed shape or type, a missing or an additional weight are named, a line for each."""
    made = certify(CHECKS, weights(), CONFIG, key)
    for change, lines in (
        (lambda w: w["params"].update(embed_VD=w["params"]["embed_VD"].reshape(3, 5)), ["embed_VD has another shape"]),
        (lambda w: w["router"].update(bias_E=np.zeros(2, np.int32)), ["router/bias_E has another type"]),
        (lambda w: w["router"].pop("step_"), ["weight router/step_ is missing"]),
        (lambda w: w["params"].update(more_=np.ones(1)), ["weight params/more_ is not in the certificate"]),
        (
            lambda w: (w["router"].pop("step_"), w["router"].update(other_=np.ones(1))),
            ["weight router/step_ is missing", "weight router/other_ is not in the certificate"],
        ),
    ):
        tree = weights()
        change(tree)
        found = verify(made, tree, CONFIG, key)
        assert len(found) == len(lines), found
        assert all(line in text for line, text in zip(lines, found, strict=True))


def places(value, path=()):
    """Every value in a certificate, by its path."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, name))
    else:
        yield path, value


def other(value):
    if isinstance(value, bool):
        return not value
    return value + 1e-9 if isinstance(value, int | float) else value[:-1] + ("0" if value[-1] != "0" else "1")


def test_every_value_of_a_certificate(key):
    """Changed by a little, or left out, it no longer holds: numbers, limits, verdicts, names, checksums, the seal."""
    made = certify(CHECKS, weights(), CONFIG, key, {"step": 3, "data": "abc"})
    tried = 0
    for path, value in places(made):
        forged = copy.deepcopy(made)
        at = forged
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = other(value)
        assert verify(forged, weights(), CONFIG, key), path
        del at[path[-1]]
        assert verify(forged, weights(), CONFIG, key), path
        tried += 1
    assert tried > 25


def test_a_forged_certificate_does_not_pass():
    """Whoever has no key can make a digest, but no signature; a lie about a limit is seen even when it is sealed."""
    made, params = certify(CHECKS, weights(), CONFIG, KEY), weights()
    assert verify(made, params, CONFIG, OTHER)[0].startswith("the signature does not match")
    assert verify(made, params, CONFIG) == ["the certificate is signed, and cannot be verified without its key"]
    assert verify(certify(CHECKS, params, CONFIG), params, CONFIG, KEY) == ["the certificate is not signed with a key"]
    body = {name: value for name, value in made.items() if name != "seal"}
    body["checks"][2]["pass"] = True
    lying = body | {"seal": certificate.seal(body, KEY)}
    assert verify(lying, params, CONFIG, KEY) == ["worst_knock_out=0.61 of at most 0.5 is said to pass, and does not"]
    assert verify(made, params, CONFIG.replace("8", "9"), KEY)[-1] == "the config is another one"
    for damaged in ({}, [], {"format": 1}, {**made, "checks": 3}, {**made, "seal": None}, {**made, "weights": []}):
        assert verify(damaged, params, CONFIG, KEY)


def test_what_does_not_pass():
    assert Check("a", 1.0, 1.0).passes
    for value in (None, np.nan, np.inf, 1.0000001):
        assert not Check("a", value, 1.0).passes
    with pytest.raises(ValueError, match="at least one Check"):
        certify([], weights(), CONFIG)
    with pytest.raises(ValueError, match="at least 16"):
        certify(CHECKS, weights(), CONFIG, b"short")
    with pytest.raises(ValueError, match="A certificate holds JSON"):
        certify(CHECKS, weights(), CONFIG, about={"x": np.nan})


# ---------------------------------------------------------------- the program


call = partial(programs.call, program)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small model as it is before training, saved as a run is."""
    folder = tmp_path_factory.mktemp("certified")
    text, workdir = folder / "text", folder / "run"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    moe = {"E": 3, "router": "LossFree(K=2)", "experts": "MLP(F=4)", "dispatch": "Scatter(1.0)"}
    model = {"D": 8, "N": 2, "attention": "MHA(2, 4)", "ffn": "MLP(F=4)", "remat": "none", "moe": moe}
    exp = build({"model": model, "data": {"source": f"Folder(path='{text}')", "L": 16, "B": 8}})
    params = jax.jit(exp.model.init)(
        jax.random.key(0), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), exp.data.shapes(1))
    )
    zero = jnp.zeros((), jnp.int32)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(2, State(zero + 2, params, {}, exp.model.init_router(), zero, zero), {})
    (workdir / "config.json").write_text(exp.to_json())
    (folder / "key").write_bytes(KEY)
    return folder


def test_the_program_measures_writes_and_verifies(run):
    """Measures, writes, verifies; a changed byte of the checkpoint or number of the certificate is one line, code 2."""
    folder = run
    flags = [f"--workdir={folder / 'run'}", f"--data_dir={folder / 'data'}", f"--key={folder / 'key'}"]
    out = folder / "certificate.json"
    made = call(
        *flags, f"--out={out}", "--windows=8", *(f"--limit={name}=3" for name in ("worst_knock_out", "drop_rate"))
    )
    assert made.code == 0, made
    assert "HMAC-SHA256" in made.out
    assert "not measured: active_compute_gap, drop_rate_gap, entropy_gap, loss_gap" in made.out
    said = json.loads(out.read_text())
    assert {c["name"] for c in said["checks"]} == set(certificate.LIMITS) - set(said["about"]["not measured"])
    assert "router/bias_E" in said["weights"]
    holds = call(*flags, f"--verify={out}", "--json=-")
    assert (holds.code, json.loads(holds.out)) == (0, {"holds": True, "wrong": []})
    assert "holds: its signature" in holds.err
    (folder / "other").write_bytes(OTHER)
    assert "signature does not match" in call(*flags[:2], f"--key={folder / 'other'}", f"--verify={out}").error
    said["checks"][0]["limit"] += 1
    out.write_text(json.dumps(said))
    assert "signature does not match" in call(*flags, f"--verify={out}").error
    flags.append(f"--json={folder / 'strict.json'}")
    strict = call(*flags, f"--out={out}", "--windows=8", "--limit=drop_rate=3", "--limit=worst_knock_out=-9")
    assert strict.code == 1
    above = [c["name"] for c in json.loads((folder / "strict.json").read_text())["checks"] if not c["pass"]]
    assert above == ["worst_knock_out"]
    assert "worst_knock_out" in call(*flags, f"--verify={out}").out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "No run was given"),
        (["--workdir=runs/none"], "Say --out=FILE to certify the run, or --verify=FILE"),
        (["--workdir=runs/none", "--out=a.json"], "There is no run in runs/none"),
        (["--workdir=runs/none", "--out=no/such/a.json"], "there is no folder no/such"),
        (["--workdir=runs/none", "--out=a.json", "--limit=lod=3"], "there is no statistic 'lod'"),
        (["--workdir=runs/none", "--out=a.json", "--limit=loss_gap=x"], "'x' is no number"),
        (["--workdir=runs/none", "--out=a.json", "--key=no/key"], "There is no key file no/key"),
        (["--workdir=runs/none", "--verify=no.json"], "cannot be read as a certificate"),
    ],
)
def test_mistakes_are_one_line(flags, words):
    assert words in call(*flags).error
