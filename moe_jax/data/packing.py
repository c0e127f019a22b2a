"""Packs the tokens of a domain's documents into windows of L + 1 tokens, neighbours sharing one token."""

import pathlib

import numpy as np
from jaxtyping import Int32, Integer

FLUSH = 2**22  # tokens held in memory before they are cut


class Packer:
    """One domain's documents, end to end; the number of a document marks its tokens, -1 is padding."""

    def __init__(self, L: int, bod: int):
        self.L, self.bod = L, bod
        self.tokens: list[np.ndarray] = []
        self.numbers: list[np.ndarray] = []
        self.held = self.documents = 0

    def add(self, tokens_N: Int32[np.ndarray, "N"]) -> None:
        """Appends a document behind a begin-of-document token."""
        document = np.concatenate([np.array([self.bod], np.int32), tokens_N])
        self.tokens.append(document)
        self.numbers.append(np.full(len(document), self.documents, np.int32))
        self.held += len(document)
        self.documents += 1

    def cut(self, last: bool = False) -> tuple[Int32[np.ndarray, "W M"], Int32[np.ndarray, "W M"]]:
        """Takes out all whole windows, with `last` the padded rest too: tokens, segments (0 = padding)."""
        tokens_N, number_N = np.concatenate(self.tokens), np.concatenate(self.numbers)
        if last:
            missing = -(len(tokens_N) - 1) % self.L
            tokens_N = np.pad(tokens_N, (0, missing))
            number_N = np.pad(number_N, (0, missing), constant_values=-1)
        kept = (len(tokens_N) - 1) // self.L * self.L  # the token that the next window starts on
        self.tokens, self.numbers, self.held = [tokens_N[kept:]], [number_N[kept:]], len(tokens_N) - kept
        return windows(tokens_N, self.L), segments(windows(number_N, self.L))

    def full(self) -> bool:
        """Tells whether it is time to cut."""
        return self.held > max(FLUSH, self.L)


def windows(values_N: Integer[np.ndarray, "N"], L: int) -> Integer[np.ndarray, "W M"]:
    """Window w holds values wL to wL + L, both included."""
    if len(values_N) <= L:
        return np.zeros((0, L + 1), values_N.dtype)
    return np.lib.stride_tricks.sliding_window_view(values_N, L + 1)[::L]


def segments(number_WM: Int32[np.ndarray, "W M"]) -> Int32[np.ndarray, "W M"]:
    """Documents numbered from 1 in each window."""
    return np.where(number_WM < 0, np.int32(0), number_WM - (number_WM[:, :1] - 1))


class RowFile:
    """An .npy file that grows by rows; NumPy leaves room in the header for the first axis to grow."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype, row: tuple[int, ...]):
        self.file, self.dtype, self.row, self.rows = path.open("wb"), dtype, row, 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.rows, *self.row)}
        np.lib.format.write_array_header_1_0(self.file, header)
