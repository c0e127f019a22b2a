"""Text for tests that is the same on every machine: no package and no version of Python changes it."""

import hashlib
import pathlib

from moe_jax.data import Folder

DOMAINS = tuple("abcdefgh")
DOCUMENTS = 32  # of each domain
VOWELS = ("aeiou", "áéíóú", "аеиоу", "あえいおう")  # of one byte, of two, of three


def word(number: int) -> str:
    """One of 256 words of two syllables; every fourth of them in another script."""
    vowels = VOWELS[number % 4 if number % 16 < 4 else 0]
    return "bdgklmnprstvz"[number % 13] + vowels[number % 5] + "lmnrstx"[number % 7] + vowels[number // 5 % 5]


def document(domain: str, number: int) -> str:
    """Ten to twenty lines of sixteen words, drawn by a hash; a domain has its own half of them."""
    lines = []
    for line in range(10 + number % 11):
        drawn = hashlib.sha256(f"{domain} {number} {line}".encode()).digest()[:16]
        lines.append(" ".join(word((n // 2 + 16 * DOMAINS.index(domain)) % 256) for n in drawn))
    return "\n".join(lines) + "\n"


def text_folder(root: pathlib.Path) -> Folder:
    """Writes eight domains of 32 documents of 1 to 2 kB below a folder: 400 kB, a twentieth of it held out."""
    for domain in DOMAINS:
        (root / domain).mkdir(parents=True)
        for number in range(DOCUMENTS):
            (root / domain / f"{number}.txt").write_text(document(domain, number), encoding="utf-8")
    return Folder(str(root))
