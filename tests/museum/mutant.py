"""A deliberate bug: one edit of one file."""

import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Mutant(NamedTuple):
    """An edit of a file that holds `old` exactly once."""

    name: str
    file: str
    old: str
    new: str

    @property
    def path(self) -> pathlib.Path:
        return ROOT / self.file

    def text(self) -> str:
        """The file with the edit; ValueError where what it replaces is not there exactly once."""
        text = self.path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} is {text.count(self.old)} times in {self.file}; "
                "it must be there once, so write the mutation anew."
            )
        return text.replace(self.old, self.new)
