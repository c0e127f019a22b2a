"""Makes the data of an experiment before it is trained: text as tokens, packed, on disk with checksums.

    python -m experiments.prepare --config=configs/glam_nano.py --workers=8
    python -m experiments.prepare --config=configs/glam_pod.py --data_dir=/mnt/data --config.data.documents=1000000

`experiments.train` with the same config.data.source, tokenizer, L, objective, documents, and the same --data_dir finds
it and begins at once. The files are the same, byte for byte, for any number of workers.

Tfds and TfdsPairs are read and tokenised by all workers. Folder, Corpus, Parallel and ToyTranslation are read by one
process and tokenised by all. A SentencePiece tokenizer is trained by one process, on the first 8 MB. Bytes need no
work to tokenise: with them, workers help to read Tfds alone. Of images nothing is made: they are read while training.

--config.data.documents=N takes the first N training documents (or pairs) and N / 20 held-out ones. It is part of the
data's identity: training needs it too.

An interruption leaves what is finished (the tokenizer, the training split), and nothing of the rest. The same command
goes on after it.
"""

import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import cli
from moe_jax.config import Experiment
from moe_jax.data import Preparation, Progress, default_directory

cli.define_config()
DATA_DIR = cli.data_dir()
WORKERS = flags.DEFINE_integer("workers", None, "Processes that tokenise (default: one for each CPU core).")
EVERY = 10.0  # seconds between two lines of progress


def main() -> None:
    exp = cli.experiment()
    workers = (os.cpu_count() or 1) if WORKERS.value is None else WORKERS.value
    if workers < 1:
        raise ValueError(f"--workers={workers} must be at least 1.")
    data_dir = cli.folder("data_dir", DATA_DIR.value) if DATA_DIR.value else default_directory()
    run(exp, data_dir, workers)


def run(exp: Experiment, data_dir: pathlib.Path, workers: int) -> None:
    """Prepares an experiment's data, and says how far it is and what there is at the end."""
    began, told = time.monotonic(), Told()
    say(f"{exp.data.source}: {workers} worker(s), {data_dir}")
    try:
        splits = exp.data.prepare(data_dir, Preparation(workers, told))
    except KeyboardInterrupt:
        far = words(told.last) if told.last is not None else "no document was tokenised"
        say(f"\nInterrupted ({far}); what was finished is kept, a tokenizer or a whole split, and nothing else.")
        sys.exit(130)
    for name, split in zip(("train", "held_out"), splits, strict=True):
        print(f"{name:<9} {size(split)}  fingerprint {split.fingerprint[:16]}")
    made = f"made in {time.monotonic() - began:.0f} s" if told.last is not None else "there was nothing to make"
    print(f"{made}; experiments.train finds it with the same config.data and --data_dir={data_dir}")


class Told:
    """Says how far a split is, every few seconds."""

    def __init__(self, every: float = EVERY, clock: Callable[[], float] = time.monotonic):
        self.every, self.clock = every, clock
        self.last: Progress | None = None
        self.began = self.said = clock()

    def __call__(self, progress: Progress) -> None:
        now = self.clock()
        if self.last is None or self.last.split != progress.split:
            self.began = self.said = now
            self.first = progress  # its work was done before the clock began
        self.last = progress
        if now - self.said >= self.every:
            self.said = now
            say(line(progress, self.first, now - self.began))


def line(progress: Progress, first: Progress, seconds: float) -> str:
    """Documents and tokens so far, the rate since the first part, and the time left where the total is known."""
    documents, tokens = progress.documents - first.documents, progress.tokens - first.tokens
    text = f"{words(progress)}, {documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s"
    if progress.share is None or first.share is None or progress.share <= first.share:
        return text
    left = seconds * max(0.0, 1 - progress.share) / (progress.share - first.share)
    return f"{text}, {progress.share:.0%}, {clock(left)} left"


def words(progress: Progress) -> str:
    return f"{progress.split}: {progress.documents:,} documents, {progress.tokens:,} tokens"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def size(split: Any) -> str:
    """Size of a prepared split."""
    text = f"{len(split):,} examples"
    return text if split.bytes_per_token is None else f"{text}, {split.bytes_per_token:.2f} bytes of text a token"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and cleans up
    many = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a data set may have a thousand files
    resource.setrlimit(resource.RLIMIT_NOFILE, (many, many))
    cli.run(main)
