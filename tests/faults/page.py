"""docs/reliability.md: what was injected, how often, and what held, beside what other codebases promise."""

from collections.abc import Mapping, Sequence

from tests.faults.server import ROOT
from tests.faults.trials import KINDS, SAVING, UNREAD, Trial

PAGE = ROOT / "docs" / "reliability.md"
INTRO = """# Reliability

What happens to a run when its process, its disk or its workdir fails?

    make faults

injects faults into whole runs of a small sparse model: a config, a trained tokenizer, steps, evaluations, saves and a
log, by `experiments.train`. A run has some hundred moments: each change of a file of its workdir by Python, each record
of its log; a delay of up to 30 ms leads between them, into steps and into the arrays that Orbax writes. Trial i is
always at the same moment. After each, the same command is run again, and compared with a run that nothing has happened
to. `make test` runs a few trials of each kind. `python -m tests.faults --only=kill` shows them one by one.

This page is written by `python -m tests.faults --out=docs/reliability.md`.
"""
CODEBASES = ("", "moe_jax", "Orbax", "Megatron-LM", "torchtitan, by PyTorch's DCP")
PROMISES = (
    (
        *("a save is atomic", "a manifest, then Orbax's rename", "[rename, or a commit file][o1]"),
        *("a tracker file names the last iteration", "[`.metadata` is written last, and moved into place][t1]"),
    ),
    (*("steps go on during a save", "yes", "[yes][o2]", "[yes, where asked for][m1]", "[yes, where asked for][t2]"),),
    (
        *("bytes are checked when they are read", "SHA-256 of every file, always"),
        *("CRC-32C of the index, not of the arrays (tried here, on [OCDBT][o3])", "[SHA-256, where asked for][m2]"),
        "no; [proposed][t3]",
    ),
    ("what was written is opened before it counts", "yes", "-", "-", "-"),
    ("an older step where the newest is damaged", "yes, and it is said", "-", "-", "-"),
    ("what is not finite", "no save, by leaf", "-", "the loss ends the run, unless told otherwise", "-"),
    (
        *("SIGTERM", "saves, on all processes", "[saves, by JAX's notice of a pre-emption][o4]"),
        *("saves, by `--exit-signal-handler`", "-"),
    ),
    ("another config, other data", "refused", "-", "-", "-"),
    ("a log that was changed", "said", "-", "-", "-"),
    ("two runs in one workdir", "the second is refused", "-", "-", "-"),
)
FIELD = """## Beside other codebases

By their documentation and sources in November 2026; "-" where we found nothing said.

{table}

[o1]: https://orbax.readthedocs.io/en/latest/api_reference/checkpoint.path.atomicity.html
[o2]: https://orbax.readthedocs.io/en/stable/guides/checkpoint/async_checkpointing.html
[o3]: https://google.github.io/tensorstore/kvstore/ocdbt/index.html
[o4]: https://orbax.readthedocs.io/en/latest/guides/checkpoint/preemption_checkpointing.html
[m1]: https://docs.nvidia.com/nemo/megatron-bridge/latest/training/checkpointing.html
[m2]: https://github.com/NVIDIA/Megatron-LM/pull/4556
[t1]: https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/filesystem.py
[t2]: https://github.com/pytorch/torchtitan/blob/main/torchtitan/components/checkpoint.py
[t3]: https://github.com/pytorch/torchtitan/issues/4011

Megatron-LM's flags, its tracker file (`latest_checkpointed_iteration.txt`) and its check of losses are in
[arguments.py](https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/arguments.py) and
[checkpointing.py](https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/checkpointing.py) beside it.
""".format(table="\n".join(f"| {' | '.join(row)} |" for row in (CODEBASES, ("---",) * 5, *PROMISES)))
LIMITS = """## What it does not say

* A machine that loses power may lose what was written and not synced: nothing here cuts the power.
* A full disk is an error of what Python opens and makes. On real ones (tmpfs of 130 and 200 kB, by hand) the program
  ended in the same line, with exit code 75, and went on where there was room, with a record of every step; TensorStore
  and TensorBoard's writer, which work in threads of their own, may print tracebacks before it.
* The record that ends a log, with the time and the energy of the run, is written after the last checkpoint and has no
  checksum. `report.html` and `tensorboard/` have none: nothing reads them, and they are made from the log.
* Kills of one of several processes are in `tests/programs/test_launch.py`, restores on other meshes in
  `tests/laws/test_09_elastic_resume.py`, 2,000 command lines in `tests/faults/test_command_lines.py`.
"""


def page(found: Mapping[str, Sequence[Trial]]) -> str:
    """The page in Markdown. found: all trials of all kinds."""
    rows = ["| injected | trials | held | what holds | what came |", "|---|---:|---:|---|---|"]
    for kind, several in found.items():
        held = sum(not trial.wrong for trial in several)
        rows.append(f"{start_of_row(kind)} {held} | {KINDS[kind].holds} | {came(kind, several)} |")
    return "\n".join((INTRO, "\n".join(rows), "", LIMITS, FIELD))


def start_of_row(kind: str) -> str:
    """The cells of a row that do not depend on what came."""
    return f"| {KINDS[kind].injected} | {KINDS[kind].count} |"


def came(kind: str, several: Sequence[Trial]) -> str:
    """Figures of what came of the trials of a kind."""

    def many(words: str) -> int:
        return sum(words in trial.came for trial in several)

    if kind == "kill":
        return f"{many(SAVING)} during a save, {many('step 0 is whole')} before the first one was whole"
    if kind == "terminate":
        return f"{many('which is saved')} saved their step, {many('leaving at once')} left at once"
    if kind == "flip":
        return f"{len(several) - many(UNREAD)} noticed, {many(UNREAD)} in what nothing reads"
    if kind == "folder":
        return f"{many('works')} work, {many('error: ')} are refused"
    return f"{many('error: ')} errors of one line"
