"""Runs every trial of the whole program under faults. The exit code is 1 where one does not hold.

python -m tests.faults --only=kill
python -m tests.faults --out=docs/reliability.md
"""

import argparse
import logging
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from tests.faults.page import page
from tests.faults.server import Server
from tests.faults.trials import KINDS, Campaign, Trial


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", choices=[*KINDS], help="Trials of this kind.")
    parser.add_argument("--out", type=pathlib.Path, help="A file for the page.")
    given = parser.parse_args(argv)
    if given.out and given.only:
        parser.error("--out writes the page of all kinds; leave out --only.")
    logging.getLogger("moe_jax").propagate = False  # trials listen for its warnings
    with tempfile.TemporaryDirectory() as folder, Server(pathlib.Path(folder) / "campaign") as server:
        campaign = Campaign(server)
        found = {kind: trials(campaign, kind) for kind in ([given.only] if given.only else KINDS)}
    bad = sum(bool(trial.wrong) for several in found.values() for trial in several)
    if given.out and not bad:
        given.out.write_text(page(found), encoding="utf-8")
    return int(bool(bad))


def trials(campaign: Campaign, kind: str) -> list[Trial]:
    """Runs all trials of a kind."""
    found = []
    for i in range(KINDS[kind].count):
        found.append(KINDS[kind].trial(campaign, i))
        print(f"{kind} {i}: {' | '.join(part or 'holds' for part in found[-1])}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
