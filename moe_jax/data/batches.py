"""Grain serves batches of windows; the number of a batch is the whole state of the training data."""

from collections.abc import Iterator

import grain
import numpy as np

from moe_jax.data.windows import Batch, Windows, batch

EPOCHS = 2**24  # for ever; without a number, Grain overflows
PADDING = -1  # the number of a window without text
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def batches(
    windows: Windows, B: int, seed: int, start: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... for ever: this process's B / processes rows of each.

    Every epoch is shuffled anew; batch n holds the same windows whatever the number of processes.
    """
    _check(B, process, processes)
    if len(windows) < B:
        raise ValueError(f"a batch of B={B} needs as many windows, the data has {len(windows)}: lower B or L")
    if not 0 <= seed < 2**32 or start < 0:
        raise ValueError(f"seed={seed}, start={start}: seed must be in [0, 2**32) and start at least 0")
    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat(EPOCHS)
    parts = shuffled.batch(B // processes, batch_fn=batch)  # part n * processes + p is process p's of batch n
    return iter(parts[process::processes][start:].to_iter_dataset(READ))


def evaluation_batches(
    windows: Windows, B: int, limit: int | None = None, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """All windows once, or at most `limit` spread over domains, in a fixed order; padding fills the last batch.

    Domains are mixed as in training: what a group of tokens drops depends on what it is made of.
    """
    _check(B, process, processes)
    if limit is not None and limit < 1:
        raise ValueError(f"evaluation on limit={limit} windows: give at least 1, or None for all")
    chosen = np.arange(len(windows)) if limit is None else spread(windows.domain_W, limit)
    chosen = np.random.default_rng(0).permutation(chosen)
    chosen = np.pad(chosen, (0, -len(chosen) % B), constant_values=PADDING)
    process_rows = chosen.reshape(-1, processes, B // processes)[:, process]
    return (batch([_window(windows, int(i)) for i in rows]) for rows in process_rows)


def spread(domain_W: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` window numbers, as many of each domain as can be, from all over its text."""
    chosen: list[np.ndarray] = []
    members = sorted((np.flatnonzero(domain_W == domain) for domain in np.unique(domain_W)), key=len)
    for i, member in enumerate(members):  # small domains first: what they leave goes to the others
        share = min(len(member), (limit - sum(map(len, chosen))) // (len(members) - i))
        chosen.append(member[np.arange(share) * len(member) // max(share, 1)])
    return np.sort(np.concatenate(chosen))


def _window(windows: Windows, i: int) -> dict[str, np.ndarray]:
    if i != PADDING:
        return windows[i]
    nothing = np.zeros(windows.L + 1, np.int32)
    return {"tokens": nothing, "segments": nothing, "domain": np.array(0, np.int32)}


def _check(B: int, process: int, processes: int) -> None:
    if B < 1 or processes < 1 or B % processes:
        raise ValueError(f"a batch of B={B} cannot be shared by {processes} processes: make B a multiple of them")
    if not 0 <= process < processes:
        raise ValueError(f"process={process} of {processes}: number the processes from 0")
