"""Exports: a trained model runs without this package, and programs for several platforms at once are made."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from experiments import export as program
from moe_jax import MLP, LossFree, MoE, MoEConfig, Scatter, Sort, TopK
from moe_jax.checkpoint import Checkpoints
from moe_jax.export import export_model, write_export
from moe_jax.files import read_sealed, sha256
from moe_jax.inspect.run import TrainedRun, open_run
from moe_jax.models import Call
from tests import programs
from tests.cases import normal
from tests.laws.test_training_step import EXP, MODEL, batch

MOE = MoEConfig(E=4, router=LossFree(K=2), experts=MLP(F=8), dispatch=Scatter(0.5))
B = 2
call = partial(programs.call, program)
DOCS = Path(__file__).parents[2] / "docs" / "experiments.md"


@pytest.fixture(scope="module")
def run():
    """A run whose router has state, and whose model drops assignments in training."""
    exp = dataclasses.replace(EXP, model=dataclasses.replace(MODEL, moe=MOE), mesh=())
    rows = jax.tree.map(jnp.asarray, batch(B=B))
    params = jax.jit(lambda: exp.model.init(jax.random.key(0), rows))()
    return TrainedRun(exp, 7, params, {"bias_E": jnp.asarray(normal(1, *exp.model.init_router()["bias_E"].shape))})


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """An export of it."""
    folder = tmp_path_factory.mktemp("export") / "out"
    write_export(run, export_model(run, B), folder)
    return folder


def test_an_export_runs_without_this_package(run, folder, tmp_path):
    """With the lines of docs/experiments.md, in a process without flax and moe_jax: logits of evaluation."""
    code = next(c for c in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "deserialize" in c)
    rows = batch(B=B)
    inputs = {name: getattr(rows, name) for name in read_sealed(folder / "manifest.json")["inputs"]}
    np.savez(tmp_path / "inputs.npz", **inputs)
    script = f"import sys\n{code}\nnp.save(sys.argv[3], outputs(sys.argv[1], **np.load(sys.argv[2])))\n"
    script += "assert not {'moe_jax', 'flax'} & set(sys.modules)\n"
    command = [sys.executable, "-c", script, folder, tmp_path / "inputs.npz", tmp_path / "found.npy"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu"})
    right = run.exp.model.dropless().apply(run.params, jax.tree.map(jnp.asarray, rows), Call(router=run.router))[0]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), right, rtol=1e-5, atol=1e-5)


def test_a_manifest_says_what_there_is(run, folder):
    """Shapes and types of weights, inputs and outputs, the config and the files' checksums."""
    manifest = read_sealed(folder / "manifest.json")
    assert {name: about["sha256"] for name, about in manifest["files"].items()} == {
        name: sha256(folder / name) for name in ("program.jax", "program.stablehlo", "weights.safetensors")
    }
    assert manifest["weights"]["params.embed_VD"] == {"shape": [257, 8], "dtype": "float32"}
    assert manifest["weights"]["router.bias_E"] == {"shape": list(run.router["bias_E"].shape), "dtype": "float32"}
    assert set(manifest["inputs"]) >= {"tokens_BL", "segment_BL", "position_BL"}
    assert not {"target_BL", "loss_mask_BL"} & set(manifest["inputs"]), "the outputs do not depend on them"
    assert manifest["outputs"] == [{"shape": [B, 8, 257], "dtype": "float32"}]
    assert (manifest["step"], manifest["platforms"], manifest["config"]) == (7, ["cpu"], json.loads(run.exp.to_json()))


@pytest.mark.parametrize("dispatch", [Scatter(1.25), Sort()], ids=str)
@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("cpu", "cuda")], ids=str)
def test_gradients_for_several_platforms_at_once(dispatch, platforms):
    """Each platform has its own kernels in the program."""
    layer = MoE.of(E=4, router=TopK(K=2), experts=MLP(F=8), dispatch=dispatch)
    x = jnp.ones((2, 8, 16), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda params, x: layer.apply(params, x)[0].sum()))
    jax_export.export(gradient, platforms=platforms, disabled_checks=CUSTOM)(params, x)


CUSTOM = [jax_export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


@pytest.mark.parametrize("shape", ["b, 8, 8", "2, l, 8"])
def test_a_symbolic_size_is_refused(shape):
    """In one sentence, before anything is computed."""
    layer = MoE.of(E=4, router=TopK(K=2), experts=MLP(F=8), dispatch=Scatter(1.25))
    x = jnp.ones((2, 8, 8))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    some = jax.ShapeDtypeStruct(jax_export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(ValueError, match=r"symbolic shape \(.*\), but .* export a program for each size"):
        jax_export.export(jax.jit(lambda p, x: layer.apply(p, x)[0]))(params, some)


def test_a_run_is_opened_with_arrays_of_jax(run, tmp_path):
    """Parameters that a jitted function closes over."""
    (tmp_path / "config.json").write_text(run.exp.to_json())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": run.params, "router": run.router}, {})
    opened = open_run(tmp_path)
    rows = jax.tree.map(jnp.asarray, batch(B=B))
    assert jax.eval_shape(
        lambda rows: opened.exp.model.apply(opened.params, rows, Call(router=opened.router))[0], rows
    ).shape == (B, 8, 257)


def test_the_program(run, tmp_path, monkeypatch):
    """The folder is written and its contents are said; a second export replaces the first."""
    monkeypatch.setattr(program, "open_run", lambda folder, step: run)
    flags = "--workdir=runs/none", f"--out={tmp_path / 'out'}", "--rows=1"
    said = [call(*flags).out for _ in range(2)]
    assert said[0] == said[1]
    assert "weights.safetensors" in said[0]
    assert "step 7 on cpu; inputs:" in said[0]
    assert read_sealed(tmp_path / "out" / "manifest.json")["outputs"][0]["shape"] == [1, 8, 257]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Say --workdir=RUN, the run to export, and --out=FOLDER"),
        (["--workdir=runs/none", "--out={tmp}/other"], "holds other files (notes.txt); give a new folder"),
        (
            ["--workdir=runs/none", "--out={tmp}/out", "--platforms=x"],
            "platforms=x: name one or several of cpu, cuda, tpu",
        ),
    ],
)
def test_mistakes_are_one_line(args, message, run, tmp_path, monkeypatch):
    """With exit code 2, and nothing is written."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    monkeypatch.setattr(program, "open_run", lambda folder, step: run)
    assert message in call(*(arg.format(tmp=tmp_path) for arg in args)).error
    assert not (tmp_path / "out").exists()
