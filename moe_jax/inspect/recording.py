"""Recordings of routing: columns with a row for each token, in a folder of files with checksums.

<folder>/part-00000.npz, ...    the columns of one batch each
<folder>/manifest.json          E, N, K, domains, config, sha256 and tokens of every part; written last
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.files import read_sealed, write_file, write_sealed

MANIFEST = "manifest.json"
VERSION = 2
NOT_NPZ = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)  # of numpy, for what is none


class Recording(NamedTuple):
    """The routing of T real tokens by N MoE layers, in the order of the data, padding left out."""

    expert_TNK: Int[np.ndarray, "T N K"]  # E is the padding id: a choice that was not taken
    weight_TNK: Float[np.ndarray, "T N K"]
    kept_TNK: Bool[np.ndarray, "T N K"]  # reached its expert
    slot_TNK: Int[np.ndarray, "T N K"]  # position in expert, in its routing group; -1 without one
    top_TNP: Float[np.ndarray, "T N P"]  # the P = min(E, K + 2) largest probabilities, largest first
    top_id_TNP: Int[np.ndarray, "T N P"]  # and their experts
    entropy_TN: Float[np.ndarray, "T N"]  # of the router's probabilities, nats
    token_T: Int[np.ndarray, "T"]  # in the vocabulary; -1 unknown, here and below
    position_T: Int[np.ndarray, "T"]  # in its document
    document_T: Int[np.ndarray, "T"]  # a number for each document, or the part of one, in each sequence
    domain_T: Int[np.ndarray, "T"]
    sequence_T: Int[np.ndarray, "T"]  # the row in the data
    loss_T: Float[np.ndarray, "T"]  # nats of the target predicted there; NaN without one
    E: int
    domains: tuple[str, ...] = ()
    probs_TNE: Float[np.ndarray, "T N E"] | None = None  # if all are kept

    @property
    def tokens(self) -> int:
        return self.expert_TNK.shape[0]

    @property
    def layers(self) -> int:
        return self.expert_TNK.shape[1]

    @property
    def K(self) -> int:
        return self.expert_TNK.shape[2]

    @property
    def taken_TNK(self) -> Bool[np.ndarray, "T N K"]:
        """Choices of an expert."""
        return self.expert_TNK < self.E

    @property
    def dropped_TNK(self) -> Bool[np.ndarray, "T N K"]:
        """Choices that did not reach their expert."""
        return self.taken_TNK & ~self.kept_TNK

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Columns by name, those that are present."""
        return {name: a for name, a in self._asdict().items() if isinstance(a, np.ndarray)}

    def where(self, chosen_T: Any) -> "Recording":
        """Selects some tokens: by a mask, a slice or indices."""
        chosen: dict[str, Any] = {name: a[chosen_T] for name, a in self.columns.items()}
        return self._replace(**chosen)


def joined(parts: Iterable[Recording]) -> Recording:
    """Recordings of the same layers, one after another; ValueError without any."""
    several = list(parts)
    if not several:
        raise ValueError("There is no recording to join; give at least one.")
    names = several[0].columns
    columns: dict[str, Any] = {n: np.concatenate([getattr(part, n) for part in several]) for n in names}
    return several[0]._replace(**columns)


def choices(part: Recording, real_BL: Bool[np.ndarray, "B L"]) -> Int[np.ndarray, "N B L K"]:
    """Choices of a batch with these real tokens, in the form that `replay` takes."""
    if real_BL.sum() != part.tokens:
        raise ValueError(
            f"The recording has {part.tokens} tokens, but the batch {real_BL.sum()}; give the part of this batch."
        )
    expert_BLNK = np.full((*real_BL.shape, *part.expert_TNK.shape[1:]), part.E, np.int32)
    expert_BLNK[real_BL] = part.expert_TNK
    return np.moveaxis(expert_BLNK, 2, 0)


# ---------------------------------------------------------------- files


def save_recording(parts: Iterable[Recording], folder: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Writes parts as they arrive, one file each, and finally the manifest, which makes them a recording.

    about: JSON kept with it, the config for instance. ValueError where there is a recording already, or no token
    arrives.
    """
    folder = Path(folder)
    if taken := {"version", *FACTS}.intersection(about or {}):
        raise ValueError(f"about has a key {min(taken)!r}, which a recording has itself; give that another name.")
    if (folder / MANIFEST).exists():
        raise ValueError(f"There is a recording in {folder} already; give another folder, or delete this one.")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("part-*"):  # of one that was interrupted
        left.unlink()
    files, facts = list[dict[str, Any]](), dict[str, Any]()
    for part in parts:
        name = f"part-{len(files):05}.npz"
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **part.columns)  # type: ignore[arg-type]
        write_file(folder / name, buffer.getvalue())
        files.append({"file": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "tokens": part.tokens})
        facts = {"E": part.E, "N": part.layers, "K": part.K, "domains": list(part.domains)}
    if not sum(file["tokens"] for file in files):
        raise ValueError(f"The batches hold no token to record in {folder}; give some data.")
    write_sealed(folder / MANIFEST, {"version": VERSION, **facts, **(about or {}), "parts": files})
    return folder


def manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a recording; ValueError where there is none, it has been changed, or it lacks something."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"There is no recording in {folder}: it has no {MANIFEST}; record again, to the end.")
    found = read_sealed(path)
    if found.get("version") != VERSION:
        version = repr(found.get("version"))[:20]
        raise ValueError(f"{path} has version {version}, but {VERSION} is read here; record again.")
    if wrong := [name for name, is_right in FACTS.items() if not is_right(found.get(name))]:
        raise ValueError(f"{path} has no {wrong[0]!r}, or not as a recording has it; record again, or take a copy.")
    return found


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_parts(value: Any) -> bool:
    """Tells whether this is a list of files with checksums, all of them in the recording's own folder."""
    kinds = {"file": str, "sha256": str, "tokens": int}
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        return False
    if not all(isinstance(part.get(name), kind) for part in value for name, kind in kinds.items()):
        return False
    return all(part["file"] == Path(part["file"]).name for part in value)


FACTS = {"E": _is_number, "N": _is_number, "K": _is_number, "domains": _is_names, "parts": _is_parts}


def _part(path: Path, data: bytes, facts: Mapping[str, Any], tokens: int) -> Recording:
    """The columns in a file; ValueError where there are others, or of other shapes, than the manifest says."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except NOT_NPZ as error:
        raise ValueError(f"{path} holds no columns ({type(error).__name__}); record again, or take a copy.") from None
    P = columns["top_TNP"].shape[-1] if columns.get("top_TNP", np.array(0)).shape else 0
    sizes = {"T": tokens, "P": P, **{letter: facts[letter] for letter in "NKE"}}
    needed = [name for name in Recording._fields if name not in ("E", "domains", "probs_TNE")]
    for name in [*needed, *columns]:
        shape = tuple(sizes[letter] for letter in name.rpartition("_")[2] if letter in sizes)
        if name not in (*needed, "probs_TNE") or name not in columns or columns[name].shape != shape:
            found = f"{columns[name].shape}" if name in columns else "nothing"
            raise ValueError(f"{path} has {found} for the column {name[:40]!r}; record again, or take a copy.")
    return Recording(**columns, E=facts["E"], domains=tuple(facts["domains"]))


def column_files(folder: str | Path) -> Iterator[Recording]:
    """The recording batch by batch, each checked when it is read; ValueError where a byte has been changed."""
    facts = manifest(folder)
    for file in facts["parts"]:
        path = Path(folder) / file["file"]
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            what = "does not match its checksum" if path.is_file() else "is missing"
            raise ValueError(f"{path} {what}; record again, or take a copy.")
        yield _part(path, data, facts, file["tokens"])


def load_recording(folder: str | Path) -> Recording:
    """The whole recording in a folder."""
    return joined(column_files(folder))
