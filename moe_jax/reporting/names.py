"""Names of runs, for tables and legends."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from moe_jax.names import printable


def run_names(workdirs: Sequence[str | Path]) -> dict[str, Path]:
    """Names each run by the end of its path, as many folders of it as tell all runs apart: {name: path}, in order.

    A folder that is given twice is one run.
    """
    paths = list(dict.fromkeys(Path(workdir).resolve() for workdir in workdirs))
    for folders in count(1):
        names = [printable(str(Path(*path.parts[-folders:]))) for path in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise AssertionError  # whole paths differ
