"""A run of milliseconds: a sparse language model of a few hundred parameters on a text of a few kilobytes.

It has everything that a run keeps: a trained tokenizer, held-out evaluations, several checkpoints.
"""

import pathlib

from ml_collections import ConfigDict

from tests.texts import DOMAINS, document

STEPS = 12


def get_config() -> ConfigDict:
    moe = {"E": 2, "router": "Switch()", "experts": "MLP(F=2)", "dispatch": "Einsum(capacity_factor=1.0)", "losses": ()}
    model = {"D": 2, "N": 1, "attention": "MHA(H=1, A=2)", "ffn": "MLP(F=2)", "moe_layers": "all", "remat": "none"}
    config = ConfigDict({"seed": 0, "mesh": {"data": 1}, "model": {**model, "moe": moe}})
    config.data = {"source": "Folder(path='text')", "tokenizer": "SentencePiece(V=300)", "L": 8, "B": 8}
    config.optim = {"schedule": "Constant(peak=0.05)"}
    config.run = {"steps": STEPS, "log_every": 1, "eval_every": 4, "eval_sequences": 16, "save_every": 3}
    return config


def write_text(folder: pathlib.Path) -> pathlib.Path:
    """The folder `text`, where this experiment finds its text when it is run from here."""
    text = folder / "text"
    text.mkdir(parents=True)
    for i in range(40):
        (text / f"{i}.txt").write_text(document(DOMAINS[i % 2], i)[:400], encoding="utf-8")
    return text
