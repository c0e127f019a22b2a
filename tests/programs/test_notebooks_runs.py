"""The notebooks about finished runs and about a config of one's own: on runs of a few steps, and on a small config."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError

from experiments.train import run
from moe_jax.attention import MHA
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.data import Folder
from moe_jax.experts import GLU, MLP
from moe_jax.models import LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import Constant
from moe_jax.routers import Top2
from tests.programs.test_notebooks import executed

SYMBOLS = {"letters": list("abc d"), "numbers": list("012 9"), "words": ["moe ", "jax ", "is ", "\n"]}
E = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of a few steps in RUN and its dense baseline in BASELINE, on three domains of generated text in data."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for domain, symbols in SYMBOLS.items():
        (folder / "text" / domain).mkdir(parents=True)
        for i in range(6):
            (folder / "text" / domain / f"{i}.txt").write_text("".join(rng.choice(symbols, 400)))
    moe = MoEConfig(E=E, router=Top2(), experts=MLP(F=8), S=32)
    model = LMConfig(V=257, D=8, N=2, attention=MHA(2, 4), ffn=GLU(F=8), moe=moe, remat="none")
    exp = Experiment(
        model=model,
        data=DataConfig(source=Folder(str(folder / "text")), L=16, B=16),
        optim=OptimConfig(schedule=Constant(0.01)),
        run=RunConfig(steps=6, log_every=1, eval_every=3, eval_sequences=32, save_every=6),
        mesh=(("data", 2), ("expert", 4)),
    )
    for name, each in {"RUN": exp, "BASELINE": dataclasses.replace(exp, model=model.dense_baseline())}.items():
        run(each, folder / name, folder / "data")
    return folder


@pytest.fixture
def finished(runs, monkeypatch) -> Path:
    """Finished runs, as the notebooks get them."""
    for name in ("RUN", "BASELINE"):
        monkeypatch.setenv(f"MOE_JAX_{name}", str(runs / name))
    monkeypatch.setenv("MOE_JAX_DATA", str(runs / "data"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return runs


@pytest.mark.matrix
def test_training_results(finished):
    """Both runs are summed up side by side, and the restored model goes on with a prompt."""
    printed = executed("04_training_results.ipynb", pictures=7)
    (row,) = [line for line in printed.splitlines() if line.startswith("held-out bits per byte  ")]
    assert all(0 < float(bits) < 9 for bits in row.split()[-2:])
    for name, folder in {"MoE": "RUN", "dense baseline": "BASELINE"}.items():
        records = [json.loads(line) for line in (finished / folder / "metrics.jsonl").read_text().splitlines()]
        loss = [record["loss"] for record in records if record["kind"] == "eval"][-1]
        assert f"{name} {loss:.4f} nats" in printed  # the sentences are those of this run
    assert "restored step 6" in printed
    assert printed.count("def __init__(self") == 2


@pytest.mark.matrix
def test_the_specialisation_notebook_shows_the_run(finished):
    """The recording has the run's layers; the expert of the card is one of theirs, and its knock-out is on it."""
    printed = executed("05_specialisation.ipynb", pictures=12)
    assert "step 6: " in printed
    assert f"tokens, 1 MoE layer(s) of {E} experts, 2 for each token" in printed
    favourites = [line for line in printed.splitlines() if line.startswith("layer 1, expert ")]
    assert len(favourites) == E
    (domain,) = re.findall(r"Domain and expert share ([\d.]+) nats", printed)
    assert f"the domain {domain}" in printed  # computed by two functions
    (busiest,) = re.findall(r"has ([\d.]+) times the mean load, and the least", printed)
    assert 1 <= float(busiest) <= E
    (card,) = [line for line in printed.splitlines() if "of layer 1: " in line]
    assert int(card.split()[1]) < E
    (without,) = [line for line in printed.splitlines() if line.startswith("  without")]
    assert all(domain in without for domain in SYMBOLS)


@pytest.mark.parametrize("name", ["04_training_results", "05_specialisation"])
def test_without_a_run_they_say_how_to_make_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_RUN", str(tmp_path))
    with pytest.raises(
        CellExecutionError, match=r"There is no run in .* python -m experiments.train --config=configs/glam_nano"
    ):
        executed(f"{name}.ipynb")


CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.mesh = {"expert": 2}
    config.model = {"D": 8, "N": 1, "attention": "MHA(2, 4)", "ffn": "GLU(F=8)", "moe_layers": "every 1"}
    config.model.remat = "none"
    config.model.moe = {"E": 4, "router": "Top2()", "experts": "MLP(F=8)", "dispatch": "Scatter(1.0)", "S": 32}
    config.data = {"L": 16, "B": 16}
    return config
"""


@pytest.mark.matrix
def test_audit_your_config(tmp_path, monkeypatch):
    """The small config keeps its laws; of the layers that break one, each is found, and what it breaks is named."""
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setenv("MOE_JAX_CONFIG", str(tmp_path / "small.py"))
    printed = executed("06_audit_your_config.ipynb", pictures=5)
    broken = {line.partition(":")[0] for line in printed.splitlines() if " changed in " in line or ": not " in line}
    assert broken == {
        "as configured, batch-independent",
        "first choices first, causal",
        "first choices first, batch-independent",
        "experts select, causal",
        "experts select, batch-independent",
        "weight always 1, trainable",
        "weight always 1, batch-independent",
    }
    assert "lets later tokens take earlier ones' slots" in printed
    assert "never trains its router" in printed
    (first,) = [line for line in printed.splitlines() if line.startswith("first step:")]
    assert first.split()[-3] == first.split()[-1]
