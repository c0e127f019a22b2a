"""A file is whole: with its new content, or as it was."""

from pathlib import Path

import pytest

from moe_jax.files import write_file


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


def test_nobody_sees_half_of_it(tmp_path, monkeypatch):
    """What is under the name while the new content is written, is the old one."""
    (file := tmp_path / "a.txt").write_text("old")
    seen = []
    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (whole(path, data), seen.append(file.read_text())))
    write_file(file, "new")
    assert seen == ["old"]
    assert file.read_text() == "new"
