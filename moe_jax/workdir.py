"""The config of a run in its workdir, as its newest checkpoint and its log confirm it: a file alone is not believed."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.continuation import MAY_CHANGE, changes
from moe_jax.files import json_digest, parse_json
from moe_jax.reporting.metrics import last, log_difference, read

CONFIG = "config.json"
SHOWN = 3  # differences in a message
log = logging.getLogger(__name__)


def read_config(workdir: str | Path) -> dict[str, Any]:
    """Plain values of a run's config.json, as they are there; ValueError where there is none, or it is damaged."""
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise ValueError(f"There is no run in {workdir}: it has no {CONFIG}; give the workdir of a trained run.")
    with suppress(ValueError):
        if isinstance(values := parse_json(path.read_bytes()), dict):
            return values
    raise ValueError(
        f"{path} is damaged, so that this run cannot be told from another; restore it (--print_config shows what is "
        "in it), or begin anew with --overwrite."
    )


def checked_config(workdir: str | Path) -> dict[str, Any]:
    """Plain values of a run's config.json; ValueError where it is damaged, or not of the run in the checkpoints."""
    values = read_config(workdir)
    if (saved := _checkpoint_config(workdir)) is not None:
        kept, step = saved
        check_same_run(values, kept, f"{Path(workdir) / CONFIG} is not the config of the checkpoint of step {step}")
    return values


def confirmed_config(workdir: str | Path) -> dict[str, Any]:
    """Plain values of a run's config, of which nothing rests on config.json alone.

    In what a continuation may change, those of the newest checkpoint hold where the log has not begun with those of
    config.json the last time. ValueError of `checked_config`, and where there is no checkpoint and the log says
    otherwise.
    """
    values, saved, begun = checked_config(workdir), _checkpoint_config(workdir), _begun_with(workdir)
    if begun in (None, json_digest(values)):
        return values
    if saved is None:
        raise ValueError(
            f"{Path(workdir) / CONFIG} is not the config that the run began with, by its log; restore it from a copy."
        )
    kept, step = saved
    if values != kept:
        log.warning("%s/%s is not confirmed by the log: that of the checkpoint of step %s holds", workdir, CONFIG, step)
    return kept


def check_same_run(values: dict[str, Any], kept: dict[str, Any], problem: str) -> None:
    """ValueError with this problem where a config differs from another one in what makes another run."""
    differ = [str(change) for change in changes(kept, values) if not change.within(MAY_CHANGE)]
    if differ:
        more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise ValueError(f"{problem} ({'; '.join(differ[:SHOWN])}{more}); restore it from a copy.")


def confirmed_experiment(workdir: str | Path) -> Experiment:
    """The experiment that was run in a workdir; ValueError of `confirmed_config`."""
    return Experiment.from_json(json.dumps(confirmed_config(workdir)))


def log_changes(workdir: str | Path) -> str | None:
    """Says how a run's log differs from what its newest checkpoint has kept of it; None where it does not."""
    meta, _ = Checkpoints(Path(workdir) / "checkpoints").newest_meta() or ({}, 0)
    return log_difference(workdir, meta.get("log"))


def _checkpoint_config(workdir: str | Path) -> tuple[dict[str, Any], int] | None:
    """Plain values of the config that the newest checkpoint was saved with, and its step; None where none has it."""
    meta, step = Checkpoints(Path(workdir) / "checkpoints").newest_meta() or ({}, 0)
    return (json.loads(meta["experiment"]), step) if "experiment" in meta else None


def _begun_with(workdir: str | Path) -> str | None:
    """Digest of the config with which the run began the last time, by its log; None where it does not say."""
    with suppress(ValueError, OSError):
        return last(read(workdir), "start").get("config")
    return None
