"""Text that the tests of training share."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of sixty short documents of numbers."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    return folder
