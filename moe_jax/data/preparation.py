"""Text as tokens, encoded by one process or by several: the same documents in the same order."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from moe_jax.data.documents import HELD_OUT, Split, read_once

SIZE = 2**20  # bytes of text that a process encodes at once
Encode = Callable[[Any], tuple[Any, ...]]  # a document or a pair, to arrays of tokens and facts


@runtime_checkable
class Part(Protocol):
    """Consecutive documents or pairs, or records of which some are: as many as its length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Progress(NamedTuple):
    """Documents (or pairs) and tokens so far of a split; `share` of the work that is done, None if unknown."""

    split: Split
    documents: int
    tokens: int
    share: float | None


@dataclasses.dataclass(frozen=True)
class Limited:
    """The first `n` training documents (or pairs) of a source, and the first `n` / 20 of those held out."""

    source: Any
    n: int

    @property
    def domains(self) -> tuple[str, ...]:
        return self.source.domains

    def documents(self, split: Split, directory: pathlib.Path) -> Iterator[Any]:
        """At most `limit(split)` documents."""
        return itertools.islice(self.source.documents(split, directory), self.limit(split))

    def pairs(self, split: Split, directory: pathlib.Path) -> Iterator[Any]:
        """At most `limit(split)` pairs."""
        return itertools.islice(self.source.pairs(split, directory), self.limit(split))

    def fingerprint(self, directory: pathlib.Path) -> str:
        """The source's own fingerprint, and the limit."""
        return f"{self.source.fingerprint(directory)}, the first {self.n}"

    def snapshot(self) -> "Limited":
        """The source read once, and the limit."""
        return Limited(read_once(self.source), self.n)

    def limit(self, split: Split) -> int:
        """The largest number of documents in a split."""
        return self.n if split == "train" else max(1, round(HELD_OUT * self.n))


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Preparation of text: the number of processes (1: this one), and `report`, which is called for each part.

    A source with `parts(split)` is read by all processes; any other is read by this one, and encoded by all.
    """

    workers: int = 1
    report: Callable[[Progress], None] = lambda progress: None

    @contextlib.contextmanager
    def encoder(self, encode: Encode) -> Iterator[Callable[..., Iterator[tuple[Any, ...]]]]:
        """A function (source, kind, split, directory) to what `encode` makes of each document, in order.

        kind: the source's method, `documents` or `pairs`.
        """
        with ordered(functools.partial(_encode, encode), self.workers) as mapped:
            yield functools.partial(self._encoded, mapped)

    def _encoded(
        self, mapped: Callable, source: Any, kind: str, split: Split, directory: pathlib.Path
    ) -> Iterator[tuple[Any, ...]]:
        inner, limit = (source.source, source.limit(split)) if isinstance(source, Limited) else (source, None)
        parts: Iterable[Part]
        total = None
        if hasattr(inner, "parts"):
            parts = inner.parts(split)
            total = sum(map(len, parts))
        else:
            parts = chunks(getattr(source, kind)(split, directory))
        read = documents = tokens = 0
        for size, more, columns in mapped(parts):
            items = _unpack(columns)[: None if limit is None else limit - documents]
            read, documents, tokens = read + size, documents + len(items), tokens + more
            shares = [done / of for done, of in ((documents, limit), (read, total)) if of]
            self.report(Progress(split, documents, tokens, max(shares, default=None)))
            yield from items
            if documents == limit:
                return


SERIAL = Preparation()


def chunks(documents: Iterable[Any], size: int = SIZE) -> Iterator[list[Any]]:
    """Lists of consecutive documents (or pairs), of about `size` bytes of text."""
    chunk, held = [], 0
    for document in documents:
        chunk.append(document)
        held += sum(len(text) for text in document if isinstance(text, bytes))
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def ordered(function: Callable[[Any], Any], workers: int) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """`map` of one picklable function in `workers` processes, results in order; no more than needed is read ahead.

    The processes never touch a device of JAX. ValueError if one of them is killed.
    """
    if workers == 1:
        yield functools.partial(map, function)
        return
    with tempfile.TemporaryDirectory() as folder:
        # A file, as a parent waits for ever that hands more than a pipe holds to a process which dies as it starts.
        pickled = pathlib.Path(folder, "function")
        pickled.write_bytes(pickle.dumps(function))
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _begin, (pickled,))
        try:
            yield functools.partial(_mapped, pool, 2 * workers)
        except BrokenProcessPool:
            raise ValueError(
                f"One of {workers} workers has died, of too little memory perhaps; use fewer workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _mapped(pool: concurrent.futures.Executor, ahead: int, jobs: Iterable[Any]) -> Iterator[Any]:
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for job in jobs:
        waiting.append(_submit(pool, job))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _submit(pool: concurrent.futures.Executor, job: Any) -> concurrent.futures.Future:
    """Submits a job. It may start a process, which inherits the blocked signal: Ctrl-C is the parent's alone."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_function: Callable[[Any], Any]  # of a worker process


def _begin(pickled: pathlib.Path) -> None:
    global _function
    _function = pickle.loads(pickled.read_bytes())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Any) -> Any:
    return _function(job)


def _encode(encode: Encode, part: Part) -> tuple[int, int, list[Any]]:
    """The records of a part, its tokens, and its documents as `encode` makes them, packed."""
    columns = [_pack(column) for column in zip(*map(encode, part), strict=True)]
    return len(part), sum(len(values) for values, ends in columns if ends), columns


def _pack(column: tuple[Any, ...]) -> tuple[Any, list[int]]:
    """Arrays as one, with where each ends, since many small ones take long to send; other values as they are."""
    if isinstance(column[0], np.ndarray):
        return np.concatenate(column), np.cumsum([len(array) for array in column]).tolist()
    return column, []


def _unpack(columns: list[Any]) -> list[tuple[Any, ...]]:
    """The documents that `_encode` has packed."""
    parts = ([values[a:b] for a, b in itertools.pairwise([0, *ends])] if ends else values for values, ends in columns)
    return list(zip(*parts, strict=True))
