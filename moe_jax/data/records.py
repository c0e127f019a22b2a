"""Data sets of TensorFlow Datasets: prepared if need be, and read by number."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data.documents import Split
from moe_jax.data.preparation import SIZE

LONGEST = 100  # characters of somebody else's words


def builder(source: Any) -> tfds.core.DatasetBuilder:
    """The prepared data set `name` in `data_dir` of a source, downloaded if need be; ValueError if it cannot be."""
    try:
        found = tfds.builder(source.name, data_dir=source.data_dir, try_gcs=False)
        if not found.is_prepared():
            found.download_and_prepare(file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"{source}: TFDS knows no such data set, and none is prepared in data_dir") from None
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from None
    except ImportError as error:
        raise ValueError(f"{source} {_what_to_install(error)}") from None
    except OSError as error:
        reason = f"({type(error).__name__})"
        raise ValueError(f"{source} could not be downloaded {reason}: prepare it elsewhere, set data_dir") from None
    except Exception as error:  # what TFDS says about files of its own that it cannot parse
        raise _damaged(source, error) from None
    if "train" not in found.info.splits:
        raise ValueError(f"{source} has the splits {sorted(found.info.splits)}: one named train is needed")
    return found


def records(source: Any, found: tfds.core.DatasetBuilder, split: str) -> Any:
    """A split's records; ValueError where they cannot be read by number, or some are missing."""
    try:
        opened = found.as_data_source(split=split)
    except NotImplementedError:
        kind = found.info.file_format
        raise ValueError(f'{source} is prepared as {kind}: prepare it with file_format="array_record"') from None
    declared = found.info.splits[split].num_examples
    if len(opened) != declared:
        raise ValueError(f"{source} holds {len(opened)} of {declared} records in {split}: prepare it again")
    return opened


def read_records(source: Any, opened: Any, numbers: Sequence[int]) -> list[Any]:
    """Some records, by number; ValueError where a file of theirs is damaged, cut off or gone."""
    try:
        found = opened.__getitems__(numbers)  # all at once: ten times as fast as one by one
    except Exception as error:  # readers and decoders of many kinds, each with errors of its own
        raise _damaged(source, error) from None
    there = sum(any(value is not None for value in record.values()) for record in found)  # the end may be cut off
    if there != len(numbers):
        raise _damaged(source, f"{there} of {len(numbers)} records are there")
    return found


@dataclasses.dataclass(frozen=True)
class RecordRange:
    """The records `start` to `stop` of a source, as its `read` makes documents of them; read where it is iterated."""

    source: Any
    split: Split
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        opened, shared = _opened(self.source, self.split)
        found = read_records(self.source, opened, range(self.start, self.stop))
        return self.source.read(found, self.split if shared else None)


def parts(source: Any, split: Split) -> list[RecordRange]:
    """A split of a source in parts of about `SIZE` bytes, or one record."""
    info = source.found().info
    name = "train" if split == "train" or source.held_out not in info.splits else source.held_out
    n, size = info.splits[name].num_examples, info.splits[name].num_bytes
    step = max(1, min(SIZE * n // max(size, 1), 4096))
    return [RecordRange(source, split, start, min(start + step, n)) for start in range(0, n, step)]


@functools.lru_cache(maxsize=2)
def _opened(source: Any, split: Split) -> tuple[Any, bool]:
    """The records that a split is chosen from, and whether the other split is chosen from them too."""
    found = source.found()
    shared = source.held_out not in found.info.splits
    return records(source, found, source.held_out if split == "held_out" and not shared else "train"), shared


def tfds_facts(source: Any, found: tfds.core.DatasetBuilder) -> list[str]:
    """Facts that TFDS has about the data set: version, features, and the size of every shard."""
    splits = (f"{key} {split.num_bytes} {split.shard_lengths}" for key, split in sorted(found.info.splits.items()))
    return [str(source), found.info.full_name, str(found.info.features), *splits]


def _damaged(source: Any, reason: str | Exception) -> ValueError:
    words = str(reason).partition("\n")[0][:LONGEST]
    return ValueError(f"{source}: its files are damaged ({words}): prepare the data set again")


def _what_to_install(error: ImportError) -> str:
    if "tensorflow" in str(error):
        return "needs TensorFlow to be prepared: pip install moe_jax[tensorflow]"
    return f"cannot be prepared here ({str(error).splitlines()[0]}): install what is missing"
