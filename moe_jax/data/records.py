"""Data sets of TensorFlow Datasets: prepared if need be, and read by number."""

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds


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
    if "train" not in found.info.splits:
        raise ValueError(f"{source} has the splits {sorted(found.info.splits)}: one named train is needed")
    return found


def records(source: Any, found: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
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


def facts(source: Any, found: tfds.core.DatasetBuilder) -> list[str]:
    """Facts that TFDS has about the data set: version, features, and the size of every shard."""
    splits = (f"{key} {split.num_bytes} {split.shard_lengths}" for key, split in sorted(found.info.splits.items()))
    return [str(source), found.info.full_name, str(found.info.features), *splits]


def _what_to_install(error: ImportError) -> str:
    if "tensorflow" in str(error):
        return "needs TensorFlow to be prepared: pip install moe_jax[tensorflow]"
    return f"cannot be prepared here ({str(error).splitlines()[0]}): install what is missing"
