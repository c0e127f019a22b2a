"""A file is whole: with its new content, or as it was; sealed JSON is read as it was written, or not at all."""

import hashlib
import json
from pathlib import Path

import pytest

from moe_jax.files import is_disk_full, parse_json, read_sealed, sha256, unfinished_of, write_file, write_sealed


def test_text_and_bytes(tmp_path):
    assert write_file(tmp_path / "a.txt", "Tausend Grüße\n") == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == "Tausend Grüße\n".encode()
    write_file(tmp_path / "a.txt", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\xff"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_who_is_interrupted_leaves_the_older_one(tmp_path, monkeypatch, problem):
    (file := tmp_path / "a.txt").write_text("old")
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> None:
        whole(path, data[: len(data) // 2])
        raise problem

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(type(problem)):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "write_bytes", lambda path, _: seen.append(path) or path.touch())
    write_file(tmp_path / "metrics.1.jsonl", "new")
    assert [unfinished_of(path) for path in seen] == ["metrics.1.jsonl"]
    assert [unfinished_of(Path(name)) for name in ("a.txt", "a.part", "a.7.part.txt", ".7.part")] == [None] * 4


def test_nobody_sees_half_of_it(tmp_path, monkeypatch):
    """A reader finds the old content while the new one is written."""
    (file := tmp_path / "a.txt").write_text("old")
    seen = []
    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (whole(path, data), seen.append(file.read_text())))
    write_file(file, "new")
    assert seen == ["old"]
    assert file.read_text() == "new"


def test_a_link_stays_and_its_file_is_written(tmp_path):
    """As of a log that a user keeps on another disk; the second link leads to the first, the third to nothing yet."""
    (disk := tmp_path / "disk").mkdir()
    (disk / "log").write_text("old")
    for name, target in (("first", "disk/log"), ("second", "first"), ("third", "disk/new")):
        (tmp_path / name).symlink_to(target)
        assert write_file(tmp_path / name, name) == tmp_path / name
        assert (tmp_path / name).is_symlink()
    assert (disk / "log").read_text() == "second"
    assert (disk / "new").read_text() == "third"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "first", "log", "new", "second", "third"]


def test_an_error_is_not_hidden_by_what_cannot_be_removed(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    monkeypatch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Read-only"):
        write_file(tmp_path / "a.txt", "new")


def raised(text: str, cause: BaseException | None = None) -> BaseException:
    try:
        raise ValueError(text) from cause
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (raised("RESOURCE_EXHAUSTED: Error writing local file: [OS error 28: ENOSPC No space left on device]"), True),
        (raised("the save failed", OSError(28, "No space left on device")), True),
        (raised("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
        (OSError(30, "Read-only file system"), False),
        (None, False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, full):
    assert is_disk_full(error) == full


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "nul", b"\xff"])
def test_what_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"the brackets are too deep|^Expect|can't decode"):
        parse_json(text)


# ---------------------------------------------------------------- sealed


CONTENT = {"b": [1, 2.5, None], "a": {"ü": "Grüße", "nan": float("nan")}, "c": (True,)}


def test_sha256_gives_the_standards_digest(tmp_path):
    (file := tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sealed_comes_back(tmp_path):
    file = write_sealed(tmp_path / "a.json", CONTENT)
    found = read_sealed(file)
    assert list(found) == ["b", "a", "c"]
    assert json.dumps(found) == json.dumps(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_seal_is_of_the_rest_with_sorted_keys(tmp_path):
    """The format on disk, which files that are there already have."""
    said = json.loads(write_sealed(tmp_path / "a.json", {"b": 1, "a": [2]}).read_text())
    assert said.pop("sha256") == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()
    laid_out_otherwise = json.dumps({"sha256": hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest(), "a": [2], "b": 1})
    assert read_sealed(write_file(tmp_path / "b.json", laid_out_otherwise)) == said


@pytest.mark.parametrize("key", [*CONTENT, "sha256"])
@pytest.mark.parametrize("how", ["changed", "left out"])
def test_a_change_is_seen(tmp_path, key, how):
    said = json.loads(write_sealed(tmp_path / "a.json", CONTENT).read_text())
    said = {**said, key: "other"} if how == "changed" else {name: said[name] for name in said if name != key}
    with pytest.raises(ValueError, match=r"^\S+a\.json is damaged: it does not match its checksum; [^\n]+$"):
        read_sealed(write_file(tmp_path / "a.json", json.dumps(said)))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe", b'{"a": 1}', b'{"sha256": {}}', b"[" * 100_000]
)
def test_what_is_not_sealed_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="is damaged: it does not match its checksum"):
        read_sealed(write_file(tmp_path / "a.json", content))


def test_no_file_to_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "a.json")


def test_a_key_that_is_taken(tmp_path):
    with pytest.raises(ValueError, match="has a key 'sha256' already; give that another name"):
        write_sealed(tmp_path / "a.json", {"sha256": 1})
    assert list(tmp_path.iterdir()) == []
