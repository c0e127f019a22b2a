"""Shows what the routers and experts of a run do, as one HTML page and as JSON; or a run in progress.

    python -m experiments.inspect --workdir=runs/glam_nano
    python -m experiments.inspect --workdir=runs/glam_nano --step=600 --report=runs/inspect_600.html --out=runs/figures
    python -m experiments.inspect --workdir=runs/glam_nano --compare=runs/glam_nano@600 --compare=runs/switch_nano
    python -m experiments.inspect --workdir=runs/glam_nano --live

Records the routing of held-out data by a checkpoint, on the run's mesh and with its limit of slots, takes out every
expert in turn, and writes WORKDIR/inspect/report.html, report.json and, with --out, every figure as a file. A run that
is compared is recorded on the same data; where layers and experts are the same, so are choices counted. --live shows a
run that is still going on, in the terminal and as a page (live.html) that loads itself again, until it ends.
"""

import pathlib
import sys
from contextlib import suppress
from typing import Any

from absl import flags
from rich.console import Console
from rich.live import Live

from experiments import cli
from moe_jax.costs.headline import headline
from moe_jax.files import write_file
from moe_jax.inspect import live, report
from moe_jax.inspect.analysis import analyse, compare_recordings, effects_of, layer_names, weights_of
from moe_jax.inspect.card import card, card_text
from moe_jax.inspect.knockout import Effects, knock_out
from moe_jax.inspect.look import trace_layers
from moe_jax.inspect.recorder import STACKS, check_recordable, layers_of, recordings
from moe_jax.inspect.recording import Recording, joined
from moe_jax.inspect.run import TrainedRun, examples, experiment, open_run
from moe_jax.reporting.metrics import to_json
from moe_jax.reporting.report import write_report
from moe_jax.workdir import CONFIG

WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
COMPARE = cli.compare()
DEVICES = cli.devices()
STEP = cli.step()
WINDOWS = cli.windows()
REPORT = cli.report()
JSON = cli.as_json()
OUT = cli.out("A folder for the figures, each as a file.")
KNOCK_OUT = flags.DEFINE_bool("knock_out", True, "Take out every expert in turn: a pass over the text for each.")
STACK = flags.DEFINE_enum("stack", "decoder", STACKS, "Of a model with two, the one to look into.")
KIND = flags.DEFINE_enum("figure_kind", "svg", ["svg", "png", "pdf"], "Format of the figures in --out.")
LIVE = flags.DEFINE_bool("live", False, "Show a run in progress, until it ends.")
DIGITS = 5  # of numbers in the JSON
CARDS = 8  # experts that get a card
CARD_WINDOWS = 64
SECONDS = 1.0  # between looks at a run in progress


def main() -> None:
    if not WORKDIR.value:
        raise ValueError("No run was given; say --workdir=runs/glam_nano, for instance.")
    workdir = cli.folder("workdir", WORKDIR.value)
    if LIVE.value:
        watch(workdir)
        return
    if WINDOWS.value < 1:
        raise ValueError(f"--windows={WINDOWS.value} must be at least 1.")
    page, table = cli.file("report", REPORT.value), cli.file("json", JSON.value)
    drawn, own = cli.folder("out", OUT.value) if OUT.value else None, workdir / "inspect"
    cli.simulate(experiment(workdir))
    run, others = open_run(workdir, STEP.value), [(name, opened(name)) for name in COMPARE.value]
    for place in [*([own] if page is None or table is None else []), *([drawn] if drawn else [])]:
        cli.check_writable(place, "give --report=FILE, --json=FILE and --out=FOLDER elsewhere")
    found, cards = inspected(run, others)
    name = f"{workdir.resolve().name}, step {run.step:,}"
    cli.write_json(table or own / "report.json", to_json(found, DIGITS))
    html = report.inspection_page(name, found, run.exp.to_json(), cards)
    say(f"written: {write_file(page or own / 'report.html', html)}")
    if drawn is not None:
        for title, plot in report.named_figures(found).items():
            plot.save(drawn / f"{title}.{KIND.value}")
        say(f"figures: {drawn}")


def opened(name: str) -> TrainedRun:
    """RUN or RUN@STEP."""
    return open_run(*cli.checkpoint("compare", name))


# ---------------------------------------------------------------- a checkpoint


def inspected(run: TrainedRun, others: list[tuple[str, TrainedRun]]) -> tuple[dict[str, Any], list[str]]:
    """All that is found of a run beside others, and the cards of a few experts."""
    exp = run.exp
    check_recordable(exp, STACK.value)
    split, batches = examples(run, DATA_DIR.value, WINDOWS.value)
    decode = None if not hasattr(split, "tokenizer") else lambda token: words(split.tokenizer, token)
    say("recording")
    rec = recorded(run, batches, split.domains)
    found = described(run, rec, decode)
    found |= {"step": run.step, "data": split.fingerprint, "compare": []}
    cards: list[str] = []
    if KNOCK_OUT.value:
        own = layers_of(exp.model, STACK.value)
        every = [(n, e) for n in own for e in range(exp.model.moe.E)]
        say(f"taking out {len(every)} experts, one by one")
        effects = knock_out(exp.model, run.params, batches, run.router, len(split.domains), every)
        found["knock_out"] = effects_of(
            effects._replace(expert_P=tuple((n - own.start, e) for n, e in effects.expert_P))
        )
        if exp.model.batch_kind == "tokens":
            cards = cards_of(run, batches, effects, split.domains, decode)
    for name, other in others:
        say(f"recording {name}")
        found["compare"].append(beside(name, other, rec, run, batches, split.domains))
    return found, cards


def recorded(run: TrainedRun, batches: list[Any], domains: tuple[str, ...]) -> Recording:
    """Records what a run's routers do with these batches, with its capacity."""
    return joined(recordings(run.exp, run.params, batches, run.router, domains, stack=STACK.value))


def described(run: TrainedRun, rec: Recording, decode: Any) -> dict[str, Any]:
    found = analyse(rec, layer_names(run.exp.model, STACK.value), decode)
    if run.exp.model.STACKS == 1:
        found["weights"] = weights_of(run.exp.model, run.params)
    return found


def beside(
    name: str, other: TrainedRun, rec: Recording, run: TrainedRun, batches: list[Any], domains: tuple[str, ...]
) -> dict[str, Any]:
    """Another run on the same data; ValueError where it takes other data."""
    if not same_tokens(other, run):
        raise ValueError(
            f"--compare={name}: it reads other tokens, or sequences of another length; compare runs that agree."
        )
    if not other.exp.model.n_moe_layers:
        raise ValueError(f"--compare={name}: it has no MoE layer; compare with a run that has some.")
    its = recorded(other, batches, domains)
    found = {"name": name, "step": other.step, **analyse(its, layer_names(other.exp.model, STACK.value))}
    with suppress(ValueError):  # other layers, or other experts
        found["same"] = compare_recordings(rec, its)
    return found


def same_tokens(one: TrainedRun, other: TrainedRun) -> bool:
    """Tells whether two runs read the same tokens in sequences of one length; a tokenizer is trained on its text."""
    configs = [(run.exp.data.tokenizer, run.exp.data.L, run.exp.data.objective) for run in (one, other)]
    digests = [{name: digest for name, digest in run.data.items() if "tokenizer" in name} for run in (one, other)]
    return configs[0] == configs[1] and (not all(digests) or digests[0] == digests[1])


def cards_of(run: TrainedRun, batches: list[Any], effects: Effects, domains: tuple[str, ...], decode: Any) -> list[str]:
    """Cards of the experts that are missed most, on a part of the text."""
    rows, few = 0, []
    for batch in batches:
        if rows < CARD_WINDOWS:
            few.append(batch)
            rows += len(batch.domain_B)
    seen = trace_layers(run.exp.model, run.params, few, run.router)
    order = sorted(range(len(effects.expert_P)), key=lambda p: -effects.rise_P[p])[:CARDS]
    made = (card(run.exp.model, run.params, seen, *effects.expert_P[p], effects) for p in order)
    names = layer_names(run.exp.model)
    return [card_text(one, domains, decode, names[one.layer]) for one in made]


def words(tokenizer: Any, token: int) -> str:
    """A token as it is read; control characters by their escapes."""
    written = tokenizer.decode([token]).decode(errors="backslashreplace")
    return written.encode("unicode_escape").decode() if not written.isprintable() else written or f"<{token}>"


# ---------------------------------------------------------------- a run in progress


def watch(workdir: pathlib.Path) -> None:
    """Shows a run until it ends, or somebody has seen enough."""
    exp = experiment(workdir) if (workdir / CONFIG).is_file() else None
    cli.check_writable(workdir, "copy the run to a place where live.html can be written")
    config, total = (exp.to_json(), exp.run.steps) if exp else ("", None)
    about = headline(exp) if exp else {}
    say(f"also as a page: {workdir / 'live.html'}")
    with Live(console=Console(stderr=True), auto_refresh=False) as shown, suppress(KeyboardInterrupt):
        for now in live.follow(workdir, SECONDS):
            write_report(workdir, config, file="live.html", reload=5, about=about, steps=total)
            shown.update(live.view(now, total), refresh=True)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
