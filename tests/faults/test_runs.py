"""Whatever happens to a run, the same command goes on exactly, or says in a sentence why it does not."""

import pytest

from tests.faults import page
from tests.faults.server import Server
from tests.faults.trials import KINDS, Campaign

TRIALS = [
    pytest.param(kind, i, id=f"{kind}-{i}", marks=[] if i in KINDS[kind].short else pytest.mark.faults)
    for kind in KINDS
    for i in range(KINDS[kind].count)
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("campaign")) as server:
        yield Campaign(server)


@pytest.mark.parametrize(("kind", "i"), TRIALS)
def test_a_run_under_faults(campaign, kind, i):
    trial = KINDS[kind].trial(campaign, i)
    assert trial.wrong == "", trial


def test_the_page_is_of_these_trials():
    """docs/reliability.md says of every kind how many trials there are, and that all held."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.startswith(page.INTRO)
    assert text.endswith(page.FIELD)
    for kind in KINDS:
        assert f"{page.start_of_row(kind)} {KINDS[kind].count} | {KINDS[kind].holds} |" in text, kind
