"""The log and the report of a run: strict JSON, nothing lost to a kill, every figure that was promised."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from moe_jax.reporting import metrics
from moe_jax.reporting.metrics import Logger, curve, read, summary_table
from moe_jax.reporting.report import write_report

LAYERS, EXPERTS = [1, 3], 4


def moe(step: int) -> dict:
    load = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    per_layer = {name: np.array([0.01, 0.02]) * step for name in ("drop_rate", "router_entropy", "load_balance")}
    return {
        "layer": LAYERS,
        "load": load,
        "dead_experts": [0, 1],
        "load_max_over_mean": [1.0, 2.8],
        **per_layer,
    }


def train(step: int, sparse: bool = True, **other) -> dict:
    record = {
        "kind": "train",
        "step": step,
        "seconds": step / 10,
        "loss": 5 / (1 + step),
        "bits_per_byte": 7.0,
    }
    record |= {
        "tokens_per_second": 20_000.0,
        "skipped": 0,
        "aux_loss": 0.01,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
    }
    sparse_only = {"drop_rate": 0.02, "load_max_over_mean": 1.9, "moe": moe(step)}
    return record | (sparse_only if sparse else {}) | other


def held_out(step: int, sparse: bool = True, **other) -> dict:
    record = {
        "kind": "eval",
        "step": step,
        "seconds": step / 10,
        "loss": 4 / (1 + step),
        "bits_per_byte": 6.5,
    }
    sparse_only = {
        "loss_capacity": 4.2,
        "bits_per_byte_capacity": 6.75,
        "drop_rate_capacity": 0.125,
        "moe": moe(step),
    }
    return record | {"loss_by_domain": {"prose": 1.25, "code": 0.75}} | (sparse_only if sparse else {}) | other


def run(workdir, sparse: bool = True, steps: int = 30) -> None:
    with Logger(workdir, steps, quiet=True) as logger:
        for step in range(0, steps + 1, 10):
            logger.write(train(step, sparse))
            logger.write(held_out(step, sparse))
        logger.write({"kind": "end", "step": steps, "seconds": steps / 10})


def strict(text: str) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_records_come_back(tmp_path):
    run(tmp_path)
    records = read(tmp_path)
    assert [r["kind"] for r in records] == ["train", "eval"] * 4 + ["end"]
    assert records[2]["moe"]["load"][1] == [0.7, 0.1, 0.1, 0.1]
    assert records == strict((tmp_path / metrics.FILE).read_text())


def test_what_is_not_finite_is_null_and_nan_in_a_curve(tmp_path):
    with Logger(tmp_path, 10, quiet=True) as logger:
        logger.write(train(1, loss=float("nan"), grad_norm=jnp.float32(jnp.inf), loads=np.array([1.0, np.nan])))
        logger.write(train(2, loss=jnp.float32(1.5), skipped=np.int32(1)))
    records = strict((tmp_path / metrics.FILE).read_text())
    assert records[0]["loss"] is None
    assert records[0]["grad_norm"] is None
    assert records[0]["loads"] == [1.0, None]
    steps, losses = curve(records, "loss")
    assert steps.tolist() == [1, 2]
    assert math.isnan(losses[0])
    assert losses[1] == 1.5


def test_every_record_is_on_disk_at_once(tmp_path):
    logger = Logger(tmp_path, 10, quiet=True)
    logger.write(train(1))
    assert len(read(tmp_path)) == 1  # before close
    logger.close()


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_named(tmp_path):
    run(tmp_path)
    path = tmp_path / metrics.FILE
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 9])
    assert read(tmp_path) == strict(whole)
    path.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .* is not a record"):
        read(tmp_path)


def test_no_log_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"there is no metrics\.jsonl in"):
        read(tmp_path)


@pytest.mark.law(9)
def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    run(tmp_path)
    path = tmp_path / metrics.FILE
    path.write_text(path.read_text() + '{"kind": "train", "step": 4')
    with Logger(tmp_path, 40, resume_step=20, quiet=True) as logger:
        logger.write(train(30, loss=0.5))
    records = read(tmp_path)
    assert [(r["kind"], r["step"]) for r in records] == [
        *[(kind, step) for step in (0, 10, 20) for kind in ("train", "eval")],
        ("train", 30),
    ]
    assert records[-1]["loss"] == 0.5


def test_a_finished_run_that_goes_on_has_not_ended(tmp_path):
    run(tmp_path, steps=30)
    Logger(tmp_path, 40, resume_step=30, quiet=True).close()
    assert [r["kind"] for r in read(tmp_path)] == ["train", "eval"] * 4


def test_a_fresh_start_starts_anew(tmp_path):
    run(tmp_path)
    with Logger(tmp_path, 10, quiet=True) as logger:
        logger.write(train(1))
    assert len(read(tmp_path)) == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_what_a_fresh_start_finds_is_kept_once(tmp_path):
    """Records of steps, or what cannot be read; not the start of a run that has made no step."""
    path, start = tmp_path / metrics.FILE, {"kind": "start", "step": 0}
    for content in (json.dumps(start) + "\n", "", '{"kind": "train", "step": 1}\n', "not JSON", '{"kind": "eval", "st'):
        path.write_text(content)
        Logger(tmp_path, 10, quiet=True).close()
        assert path.read_text() == ""
    kept = [(tmp_path / f"metrics.{n}.jsonl").read_text() for n in (1, 2, 3)]
    assert kept == ['{"kind": "train", "step": 1}\n', "not JSON", '{"kind": "eval", "st']
    assert not (tmp_path / "metrics.4.jsonl").exists()


def test_a_log_that_is_a_link_stays_one(tmp_path):
    """Begun anew, and resumed: the file behind it is written."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    link, file = tmp_path / "run" / metrics.FILE, tmp_path / "disk" / "log"
    link.symlink_to(file)
    run(tmp_path / "run")
    whole = file.read_text()
    with Logger(tmp_path / "run", 40, resume_step=20, quiet=True):
        assert file.read_text() == "".join(whole.splitlines(keepends=True)[:6])
    assert link.is_symlink()
    with Logger(tmp_path / "run", 40, quiet=True) as logger:
        logger.write(train(1))
    assert link.is_symlink()
    assert len(file.read_text().splitlines()) == 1


NO_RECORDS = (
    *("null", '["kind", "step"]', "[" * 100_000, '{"kind": 1, "step": 1}', '{"kind": "train", "step": "1"}'),
    *('{"kind": "train", "step": 1, "seconds": "2"}', '{"kind": "train", "step": null}', '{"step": 1}'),
)


@pytest.mark.parametrize("line", NO_RECORDS, ids=range(8))
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    run(tmp_path)
    path = tmp_path / metrics.FILE
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1 of \S+ is not a record: remove that line"):
        read(tmp_path)


def test_spikes_are_said_at_once(tmp_path, capsys):
    with Logger(tmp_path, 100) as logger:
        for step, spikes in ((1, 0), (2, 0), (3, 2), (4, 0), (5, 1)):
            logger.write(train(step, spikes=spikes))
    lines = capsys.readouterr().err.splitlines()
    assert [("loss spikes" in line, line.split()[1]) for line in lines] == [
        (False, "1/100"),
        (True, "3/100"),
        (True, "5/100"),
    ]
    assert ("loss spikes", "3") in metrics.summary_rows(read(tmp_path))


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with Logger(tmp_path / "run", 10) as logger:
        logger.write(train(1))
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_layers_by_name(tmp_path):
    run(tmp_path)
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    tags = [
        "train/loss",
        "eval/loss",
        "eval/loss_by_domain/prose",
        "moe/layer_03/drop_rate",
        "moe/layer_01/load",
    ]
    assert [tag for tag in tags if tag.encode() not in events] == []


def test_curves_of_layers(tmp_path):
    run(tmp_path)
    steps, drop_rate = curve(read(tmp_path), "moe.drop_rate")
    assert steps.tolist() == [0, 10, 20, 30]
    np.testing.assert_allclose(drop_rate[1], [0.1, 0.2])
    assert curve(read(tmp_path), "moe.load", "eval")[1].shape == (4, 2, EXPERTS)
    assert curve(read(tmp_path), "loss_by_domain.code", "eval")[1].tolist() == [0.75] * 4
    assert curve(read(tmp_path), "nothing")[0].size == 0


def test_a_pipe_gets_whole_lines_now_and_then(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with Logger(tmp_path, 8) as logger:
        for step in range(8):
            logger.write(train(step))
        logger.write(held_out(8))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 0/8", "step 3/8", "step 6/8", "held-out at 8/8"]
    assert "0:00:20 left  loss 1.2500  7.0000 bits/byte  dropped 2.0%  load 1.90x mean  20,000 tokens/s" in lines[1]
    assert "with capacity 4.2000  dropped 12.5%" in lines[3]


def test_a_terminal_gets_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with Logger(tmp_path, 10) as logger:
        logger.write(train(1, loss=None))
        logger.write(held_out(2))
    err = capsys.readouterr().err
    assert "step 1/10" in err
    assert "loss nan" in err
    assert "held-out at 2/10" in err


def test_quiet_is_quiet(tmp_path, capsys):
    run(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_the_summary_has_the_numbers_of_the_run(tmp_path, capsys):
    run(tmp_path)
    rich.console.Console(width=120).print(summary_table(read(tmp_path)))
    table = " ".join(capsys.readouterr().out.split())
    for expected in (
        "train loss, nats per token 0.1613",
        "held-out loss, nats per token 0.1290",
        "held-out loss with capacity 4.2000",
        "dropped with capacity, held-out 12.50%",
        "dead experts, all layers 1",
        "tokens per second, median 20,000",
        "wall time 0:00:03",
    ):
        assert expected in table
    run(tmp_path, sparse=False)
    rich.console.Console(width=120).print(summary_table(read(tmp_path)))
    dense = capsys.readouterr().out
    assert "held-out loss" in dense
    assert "expert" not in dense
    assert "capacity" not in dense


# ---- the report


def titles(page: str) -> list[str]:
    return [part.split("<")[0] for part in page.split("<figcaption>")[1:]]


SPARSE_FIGURES = ["Expert load", "Drop rate", "Router entropy", "Load balance"]
CONSTANT = [
    "Load, busiest expert: 1, 2.8 in the layers in all 30 steps",
    "Dead experts: 0, 1 in the layers in all 30 steps",
]
FIGURES = ["Loss", "Loss by wall time", "Held-out loss by domain"]


@pytest.mark.parametrize("sparse", [True, False])
def test_the_report_has_its_figures_and_nothing_from_outside(tmp_path, sparse):
    run(tmp_path / "run", sparse)
    start = time.monotonic()
    path = write_report(tmp_path / "run", "model.router = 'TopK(K=2)'  # <&>")
    assert time.monotonic() - start < 10
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text()
    found = titles(page)
    for title in FIGURES:
        assert any(f.startswith(title) for f in found), title
    for title in SPARSE_FIGURES:
        assert any(f.startswith(title) for f in found) == sparse, title
    for words in CONSTANT:
        assert (words in page) == sparse, words
    assert page.count("<svg") == len(found)
    assert "TopK(K=2)&#x27;  # &lt;&amp;&gt;" in page
    for outside in ("<script", "stylesheet", "@import", 'src="', 'href="http', "url(http"):
        assert outside not in page
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "tensorboard",
    ]


def test_other_runs_are_laid_over_and_named(tmp_path):
    run(tmp_path / "dense", sparse=False)
    run(tmp_path / "sparse")
    page = write_report(tmp_path / "dense", "", [tmp_path / "sparse"]).read_text()
    assert page.count("sparse<") == 4  # table, two loss figures, domains
    assert "sparse" in page[: page.index("<table")]  # verdict
    assert "with capacity" in page
    assert "sparse<" not in write_report(tmp_path / "dense", "").read_text()


def test_a_run_that_went_wrong_still_has_a_report(tmp_path):
    with Logger(tmp_path, 10, quiet=True) as logger:
        logger.write(train(1, loss=float("nan")))
    assert "Training loss: not finite at step 1" in write_report(tmp_path, "").read_text()
    (tmp_path / metrics.FILE).write_text("")
    assert "no records yet" in write_report(tmp_path, "").read_text()


def test_the_log_does_not_wait_for_matplotlib():
    program = "import sys, moe_jax.reporting.metrics, moe_jax.reporting.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
