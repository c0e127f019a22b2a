"""Checkpoints of a run: orbax writes the arrays, a manifest beside them tells which steps are valid.

    <directory>/20/state/...        the arrays, as orbax stores them (one logical array, whatever the mesh)
    <directory>/20/manifest.json    sha256 and size of every file, shape and dtype of every leaf, meta, loss

A step is valid when its manifest says so. The manifest is written before orbax renames the finished
directory into place, so that a kill at any moment leaves either no step or a complete one; and only after
the arrays have been opened again, since orbax loses some kinds of paths in silence.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_jax.files import sha256
from moe_jax.manifest import MANIFEST, STATE, present_steps, read_step, step_problem, write_manifest
from moe_jax.room import room_told

TRASH = "deleted-"
SEPARATOR = "\\"  # orbax takes a path with one for another path
PATTERN = "*?["  # and what it writes to a path with one of these for a pattern
log = logging.getLogger(__name__)


class NotFinite(ValueError):
    """A state that is not saved, for it holds infinities or NaN."""


class Checkpoints:
    """The checkpoints in one directory; every process calls every method, process 0 decides what is valid."""

    def __init__(self, directory: str | Path, keep_last: int = 2, keep_best: int = 1):
        if "://" in str(directory):
            raise ValueError(f"checkpoints need a mounted file system, not the URL {directory}: mount the bucket")
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last={keep_last} and keep_best={keep_best} would delete every checkpoint: "
                "keep_last must be at least 1 and keep_best at least 0"
            )
        check_path(directory, SEPARATOR)
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_best = keep_last, keep_best
        self._manager: ocp.CheckpointManager | None = None  # made by the first save: readers leave no trace
        self._saving: dict | None = None  # the manifest of the save under way, still without its files
        self._bytes = 0  # of its arrays
        self._rejected: set[int] = set()  # steps whose bytes did not match

    def save(self, step: int, state: Any, meta: dict, loss: float | None = None) -> None:
        """Starts saving a snapshot of `state` and the JSON `meta`; `loss` (lower is better) ranks keep-best.

        Raises ValueError where a valid step of this number exists, `meta` is not JSON, or at a path that `check_path`
        refuses; NotFinite where a leaf is not finite; DiskFull.
        """
        check_path(self.directory)
        leaves = _leaves(state)
        check_finite(leaves, step)
        self.wait()
        self._make_room(step)
        ranked = None if loss is None or not math.isfinite(loss) else float(loss)
        described = {name: _describe(leaf) for name, leaf in leaves.items()}
        self._saving = {"step": step, "loss": ranked, "meta": _plain(meta), "leaves": described}
        self._bytes = sum(getattr(leaf, "nbytes", 0) for leaf in leaves.values())
        arrays = ocp.args.StandardSave(_nest(leaves))
        with self._undone_if_it_fails():
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.save(step, args=ocp.args.Composite(state=arrays), force=True)

    def wait(self) -> None:
        """Blocks until the save under way is on disk, raises its error if any, then deletes old steps."""
        if self._finish():
            if jax.process_index() == 0:
                self._collect_garbage()
            _meet("old checkpoints deleted")

    def _finish(self) -> bool:
        """Blocks until the save under way is on disk; False where there is none."""
        if self._manager is None or self._saving is None:
            return False
        with self._undone_if_it_fails():
            self._manager.wait_until_finished()
        self._rejected.discard(self._saving["step"])
        self._saving = None
        return True

    @contextlib.contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Removes what a failed save has written; DiskFull where that is why. Interrupted, the save goes on."""
        assert self._saving is not None
        step = self._saving["step"]
        with room_told(self.directory, step, self._bytes):
            try:
                yield
            except Exception:
                self._saving = None
                if jax.process_index() == 0:
                    for unfinished in self._unfinished(step):
                        shutil.rmtree(unfinished, ignore_errors=True)
                raise

    def discard_after(self, step: int) -> int | None:
        """Deletes all steps after this one, valid or not; returns the newest valid one that is left, if any."""
        self._finish()
        if jax.process_index() == 0:
            for later in self._present():
                if later > step:
                    self._delete(later)
        _meet("later checkpoints deleted")
        if self._manager is not None:
            self._manager.reload()
        newest = _from_process_0(lambda: max(self.steps(), default=-1))
        return None if newest < 0 else newest

    def steps(self) -> list[int]:
        """Complete steps, oldest first: manifest and file sizes are right (restore hashes the bytes)."""
        return [step for step in self._present() if self._is_valid(step)]

    def empty(self) -> bool:
        """Tells whether nothing was ever committed here: a fresh start loses nothing."""
        return not _from_process_0(lambda: int(bool(self._present())))

    def best(self) -> int | None:
        """The valid step with the lowest loss (of equals the newest), None where no step has a loss."""
        ranked = self._ranked(self.steps())
        return ranked[0] if ranked else None

    def restore(self, abstract_state: Any = None, step: int | None = None) -> tuple[Any, dict, int]:
        """The state, meta and number of a step, by default of the newest valid one.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings on any mesh; without it the
        state comes as nested dicts of numpy arrays. ValueError where no step is valid or a leaf differs.
        """
        self.wait()
        step = self._choose(step)
        manifest = self._manifest(step)
        if abstract_state is None:
            wanted = {name: np.empty(shape, dtype) for name, (shape, dtype) in manifest["leaves"].items()}
            restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
        else:
            wanted = _leaves(abstract_state)
            _check_leaves(self.directory / str(step), manifest["leaves"], wanted)
            restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items()}
        state = self._read(step, wanted, restore_args)
        if abstract_state is not None:
            found = _leaves(state)
            treedef = jax.tree.structure(abstract_state)
            state = jax.tree.unflatten(treedef, [found[name] for name in wanted])
        return state, manifest["meta"], step

    def leaves(self, step: int | None = None) -> tuple[dict[str, list], int, str]:
        """The name, [shape, dtype] of each leaf of a step, by default the newest valid one; its number and checksum."""
        step = self._choose(step)
        return self._manifest(step)["leaves"], step, sha256(self.directory / str(step) / MANIFEST)

    def newest_meta(self) -> tuple[dict, int] | None:
        """Meta and number of the newest step whose manifest and file sizes are right; None without one."""
        for step in reversed(self._present()):
            if self._is_valid(step):
                with contextlib.suppress(ValueError):  # process 0 deletes it at this moment
                    return self._manifest(step)["meta"], step
        return None

    def restore_leaves(self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int) -> dict[str, jax.Array]:
        """Some leaves of a step by their names, of the shardings and dtypes that are wanted; the shapes must agree."""
        step = self._choose(step)
        return _leaves(self._read(step, wanted, {name: _restore_args(leaf) for name, leaf in wanted.items()}))

    def _read(self, step: int, wanted: Mapping[str, Any], restore_args: Mapping[str, ocp.RestoreArgs]) -> Any:
        """These leaves of a step, in nested dicts."""
        request = ocp.args.PyTreeRestore(_nest(wanted), restore_args=_nest(restore_args), partial_restore=True)
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(self.directory / str(step) / STATE, args=request)

    def close(self) -> None:
        """Finishes the save under way and releases orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # ---- which steps are there

    def _present(self) -> list[int]:
        """Committed steps, valid or not, oldest first."""
        return present_steps(self.directory)

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return read_step(self.directory / str(step))
        except ValueError as problem:
            raise ValueError(f"checkpoint {self.directory / str(step)} is damaged ({problem})") from None

    def _is_valid(self, step: int) -> bool:
        return step not in self._rejected and step_problem(self.directory / str(step), hashes=False) is None

    def _ranked(self, steps: list[int]) -> list[int]:
        """Sorts the steps that have a loss, best first."""
        losses = {step: self._manifest(step)["loss"] for step in steps}
        return sorted((s for s in steps if losses[s] is not None), key=lambda s: (losses[s], -s))

    def _choose(self, step: int | None) -> int:
        """The step to restore, verified by process 0 and the same on every process."""
        failure = "process 0 found no valid checkpoint: read its message"

        def choose() -> int:
            nonlocal failure
            chosen, failure = self._newest_valid(step)
            return chosen

        chosen = _from_process_0(choose)
        if chosen < 0:
            raise ValueError(failure)
        return chosen

    def _newest_valid(self, asked: int | None) -> tuple[int, str]:
        """(step, "") or (-1, what is wrong); older steps are tried only where none was asked for."""
        present = self._present()
        if not present:
            return -1, f"there is no checkpoint in {self.directory}: train first, or give another directory"
        if asked is not None and asked not in present:
            return -1, f"there is no step {asked} in {self.directory}: ask for one of {present}"
        problem = None
        for step in [asked] if asked is not None else reversed(present):
            problem = step_problem(self.directory / str(step))
            if problem is None:
                return step, ""
            self._rejected.add(step)
            if asked is None:
                log.warning("skipping checkpoint %s: %s", self.directory / str(step), problem)
        if asked is not None:
            return (
                -1,
                f"checkpoint {self.directory / str(asked)} is damaged ({problem}): ask for another step",
            )
        return -1, (
            f"no checkpoint in {self.directory} is valid (the oldest: {problem}): "
            "restore the directory from a copy, or delete it to start anew"
        )

    # ---- how steps come and go

    def _make_manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, set to delete nothing but incomplete saves."""
        if jax.process_index() == 0:
            for remains in self.directory.glob(f"{TRASH}*"):
                shutil.rmtree(remains, ignore_errors=True)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_of_orbax)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("state",))

    def _write_manifest(self) -> None:
        """Completes the step under way; orbax calls it on process 0, before it commits the directory."""
        assert self._saving is not None
        unfinished = self._unfinished(self._saving["step"])
        directory = unfinished[-1] if unfinished else self.directory / str(self._saving["step"])  # on object stores
        _check_written(directory / STATE, self._saving["leaves"])
        write_manifest(directory, self._saving)

    def _unfinished(self, step: int) -> list[Path]:
        """Folders of saves of a step that are not committed."""
        start = f"{step}.orbax-checkpoint-tmp"
        there = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(path for path in there if path.name.startswith(start))

    def _make_room(self, step: int) -> None:
        """Refuses a step that is validly there; removes an invalid one of the same number."""
        path = self.directory / str(step)
        if not _from_process_0(lambda: int(path.exists() or path.is_symlink())):
            return
        if _from_process_0(lambda: int(step_problem(path) is None)):
            raise ValueError(
                f"step {step} is already saved in {self.directory}: resume from the newest step, "
                "or give another directory"
            )
        if jax.process_index() == 0:
            self._delete(step)
        _meet("damaged checkpoint deleted")
        if self._manager is not None:
            self._manager.reload()

    def _collect_garbage(self) -> None:
        """Keeps the last and the best steps, and damaged ones newer than every valid one."""
        valid = self.steps()
        kept = {*valid[-self.keep_last :], *self._ranked(valid)[: self.keep_best]}
        for step in self._present():
            if valid and step < valid[-1] and step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Renames first: a kill halfway through leaves nothing that could be taken for a step."""
        remains = self.directory / f"{TRASH}{step}"
        _remove(remains)
        (self.directory / str(step)).rename(remains)
        _remove(remains)


def check_path(directory: str | Path, forbidden: str = SEPARATOR + PATTERN) -> None:
    """ValueError for a path at which orbax would write nothing, or elsewhere, without a word.

    forbidden: characters; to read, those of a pattern do no harm.
    """
    place = str(Path(directory).absolute())
    wrong = sorted(set(forbidden).intersection(place))
    if wrong:
        raise ValueError(
            f"checkpoints cannot be kept in {place[-100:]!r}: orbax reads {' '.join(wrong)} in a path as a "
            "pattern or a separator; choose a path without, runs/lr_0.1 for instance"
        )
    try:
        place.encode()
    except UnicodeEncodeError:
        raise ValueError(f"checkpoints need a path in UTF-8, and {place[-100:]!r} is none") from None


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks that orbax, and asyncio of its tasks, log of an error that is raised here."""
    place = record.getMessage() if record.name == "asyncio" else record.pathname
    return record.levelno < logging.ERROR or "orbax" not in place


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _plain(meta: dict) -> dict:
    """`meta` as JSON gives it back (tuples become lists); ValueError for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta of a checkpoint must be JSON ({error}): give plain numbers, strings, lists") from None


# ---- a state: any pytree, stored under the names of its leaves


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name ("opt_state/0/mu/embed"), in the order of the pytree; ValueError where two have the same name."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise ValueError("two leaves of the state have the same name: leave / out of the names of its parts")
    return leaves


def check_finite(leaves: Mapping[str, Any], step: int) -> None:
    """NotFinite where a leaf has infinities or NaN; every process counts them in all shards."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
            groups.setdefault(devices, {})[name] = leaf
    counts: dict[str, int] = {}
    for group in groups.values():
        counts |= jax.device_get(_count_not_finite(group))
    bad = [name for name in leaves if counts.get(name)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise NotFinite(
            f"step {step} is not saved: {bad[0]}{more} has {int(counts[bad[0]]):,} of {np.size(leaves[bad[0]]):,} "
            "values that are not finite"
        )


@jax.jit
def _count_not_finite(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (~jnp.isfinite(leaf)).sum(dtype=jnp.float32) for name, leaf in leaves.items()}


def _check_written(folder: Path, described: Mapping[str, list]) -> None:
    """Opens every array in a folder that orbax has written; OSError where one is not as it was given."""
    try:
        found = _leaves(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    except ValueError as error:
        raise OSError(f"what was written to {folder} cannot be opened ({str(error)[:100]}): write elsewhere") from error
    for name, wanted in described.items():
        if name not in found or _describe(found[name]) != wanted:
            shown = _show(_describe(found[name])) if name in found else "nothing"
            raise OSError(f"what was written to {folder} has {shown} for {name}, not {_show(wanted)}: write elsewhere")


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, as orbax stores them: {"a/b": x} becomes {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        folder = tree
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[last] = leaf
    return tree


def _describe(leaf: Any) -> list:
    """[shape, dtype] of an array or a ShapeDtypeStruct."""
    return [list(np.shape(leaf)), str(leaf.dtype)]


def _check_leaves(path: Path, stored: dict[str, list], wanted: dict[str, Any]) -> None:
    """Raises ValueError for the first leaf that differs (orbax would cast or ignore it in silence)."""
    for name in [*wanted, *stored]:
        found = stored.get(name)
        needed = _describe(wanted[name]) if name in wanted else None
        if found != needed:
            raise ValueError(
                f"checkpoint {path} holds {name} as {_show(found)} and the model needs {_show(needed)}: "
                "restore it with the config it was trained with"
            )


def _show(description: list | None) -> str:
    if description is None:
        return "nothing"
    shape, dtype = description
    return f"{dtype}[{','.join(map(str, shape))}]"


def _restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
    """Restore arguments of a leaf: its sharding, or the first device."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)


def _from_process_0(ask: Callable[[], int]) -> int:
    """Returns process 0's answer on every process."""
    answer = ask() if jax.process_index() == 0 else 0
    if jax.process_count() == 1:
        return answer
    return int(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def _meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
