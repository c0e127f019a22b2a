"""Grain serves batches of examples; the number of a batch is the whole state of the training data."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import grain
import numpy as np

EPOCHS = 2**24  # for ever; without a number, Grain overflows
PADDING = -1  # the number of an example of nothing
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
Example = dict[str, np.ndarray]


@runtime_checkable
class Examples(Protocol):
    """A split: examples by number, and batches of them. `padding` is an example of nothing.

    With `finish(example, rng)`, examples are random: others in every epoch, the same ones in every evaluation.
    """

    domains: tuple[str, ...]
    domain_W: np.ndarray  # of each example
    fingerprint: str
    bytes_per_token: float | None  # of text per target; None of what is no text

    if TYPE_CHECKING:  # at run time an isinstance would compute it

        @property
        def padding(self) -> Example: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...

    def batch(self, examples: Sequence[Example]) -> Any: ...


def batches(
    windows: Examples, B: int, seed: int, start: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Any]:
    """Batches `start`, `start + 1`, ... for ever: this process's B / processes rows of each.

    Every epoch is shuffled anew; batch n holds the same examples whatever the number of processes.
    """
    _check(B, process, processes)
    if len(windows) < B:
        raise ValueError(f"a batch of B={B} needs as many windows, the data has {len(windows)}: lower B or L")
    if not 0 <= seed < 2**32 or start < 0:
        raise ValueError(f"seed={seed}, start={start}: seed must be in [0, 2**32) and start at least 0")
    stream = grain.MapDataset.source(windows).seed(seed).shuffle().repeat(EPOCHS)
    if hasattr(windows, "finish"):
        stream = stream.random_map(windows.finish)  # by the seed and the place in the stream
    parts = stream.batch(B // processes, batch_fn=windows.batch)  # part n * processes + p is process p's of batch n
    return iter(parts[process::processes][start:].to_iter_dataset(READ))


def evaluation_batches(
    windows: Examples, B: int, limit: int | None = None, process: int = 0, processes: int = 1
) -> Iterator[Any]:
    """All examples once, or at most `limit` spread over domains, in a fixed order; padding fills the last batch.

    Domains are mixed as in training: what a group of tokens drops depends on what it is made of.
    """
    _check(B, process, processes)
    if limit is not None and limit < 1:
        raise ValueError(f"evaluation on limit={limit} windows: give at least 1, or None for all")
    chosen = np.arange(len(windows)) if limit is None else spread(windows.domain_W, limit)
    chosen = np.random.default_rng(0).permutation(chosen)
    chosen = np.pad(chosen, (0, -len(chosen) % B), constant_values=PADDING)
    process_rows = chosen.reshape(-1, processes, B // processes)[:, process]
    return (windows.batch([_example(windows, int(i)) for i in rows]) for rows in process_rows)


def spread(domain_W: np.ndarray, limit: int) -> np.ndarray:
    """Chooses at most `limit` examples, evenly by domain, from all over its text."""
    chosen: list[np.ndarray] = []
    members = sorted((np.flatnonzero(domain_W == domain) for domain in np.unique(domain_W)), key=len)
    for i, member in enumerate(members):  # small domains first: what they leave goes to the others
        share = min(len(member), (limit - sum(map(len, chosen))) // (len(members) - i))
        chosen.append(member[np.arange(share) * len(member) // max(share, 1)])
    return np.sort(np.concatenate(chosen))


def _example(windows: Examples, i: int) -> Example:
    """Example i, the same one at every call."""
    if i == PADDING:
        return windows.padding
    return windows.finish(windows[i], np.random.default_rng(i)) if hasattr(windows, "finish") else windows[i]


def _check(B: int, process: int, processes: int) -> None:
    if B < 1 or processes < 1 or B % processes:
        raise ValueError(f"a batch of B={B} cannot be shared by {processes} processes: make B a multiple of them")
    if not 0 <= process < processes:
        raise ValueError(f"process={process} of {processes}: number the processes from 0")
