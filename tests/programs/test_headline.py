"""The MoE against its dense baseline by steps and by the clock: the arithmetic, and that the README has its numbers."""

import json
import math
import pathlib

import pytest

from configs import dense_nano
from experiments import headline
from experiments.headline import Losses
from moe_jax.config import build
from tests import programs

ROOT = pathlib.Path(__file__).parents[2]
# The baseline loses 0.1 nats whenever its steps double; the MoE is where it would be after 1.5 * sqrt(2) doublings.
MADE = Losses(
    steps=1000,
    ratio=1.5,
    moe={0: 1.85, 1: 1.75},
    dense={n: {0: 2.0 - d / 10, 1: 1.9 - d / 10} for n, d in ((1000, 0), (1500, math.log2(1.5)), (4000, 2))},
)


def test_w_is_the_time_for_the_same_loss():
    """1.5 doublings after 1,000 steps are 2,828 steps, which take 2828 / 1500 of the MoE's time."""
    assert MADE.w() == pytest.approx([1000 * 2**1.5 / 1500] * 2)
    assert MADE.same_time == 1500
    assert MADE.differences(1000) == pytest.approx([0.15, 0.15])


def test_a_loss_that_the_baseline_never_reaches_is_refused():
    out = Losses(1000, 1.5, {0: 1.0}, {1000: {0: 2.0}, 2000: {0: 1.9}})
    with pytest.raises(ValueError, match="all on one side"):
        out.w()


def test_intervals_are_students():
    mean, half = headline.interval(headline.np.array([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


def run(folder: pathlib.Path, steps: int, seed: int, loss: float, end: bool = True) -> None:
    folder.mkdir(parents=True)
    config = dense_nano.get_config()
    config.run.steps, config.optim.schedule, config.seed = steps, "Constant(peak=0.01)", seed
    (folder / "config.json").write_text(build(config).to_json())
    records = [
        {"kind": "eval", "step": steps, "seconds": 1.0, "loss": loss},
        {"kind": "end", "step": steps, "seconds": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[: 1 + end]))


def test_runs_are_collected_and_read_again(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path / "moe" / str(seed), 10, seed, 1.5)
        for steps, loss in ((10, 2.0), (15, 1.75), (40, 1.0)):
            run(tmp_path / "dense" / f"{steps}-{seed}", steps, seed, loss + 0.01 * seed)
    run(tmp_path / "dense" / "unfinished", 99, 0, 0.5, end=False)
    words = [
        f"--moe={tmp_path / 'moe'}",
        f"--dense={tmp_path / 'dense'}",
        "--ratio=1.5",
        f"--json={tmp_path / 'a.json'}",
    ]
    code, text, err = programs.call(headline, *words)
    assert code == 0, err
    assert "| MoE | 10 | 1.5000 | 1.5000 | **1.5000** |" in text
    assert "| dense baseline, equal time | 15 | 1.7500 | 1.7600 | **1.7550** |" in text
    again = programs.call(headline, f"--json={tmp_path / 'a.json'}", f"--out={tmp_path / 'a.svg'}")
    assert again[:2] == (0, text)
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "or --json alone"),
        (["--moe={0}", "--dense={0}", "--ratio=1.2"], "must hold finished runs of one length"),
        (["--moe={0}", "--dense={0}", "--ratio=0"], "is no ratio of times"),
    ],
)
def test_wrong_words_are_one_line(words, said, tmp_path):
    code, out, err = programs.call(headline, *(word.format(tmp_path) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_readme_and_results_have_the_numbers():
    found = headline.load(ROOT / "docs" / "results.json")
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = " ".join(page.read_text().split())
        assert " ".join(headline.table(found).split()) in text, page
        assert headline.sentence(found) in text, page
