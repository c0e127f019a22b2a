"""The campaign of faults: what users, disks and machines do to a program, and what must come of it.

A kind of fault has a file of its own: a generator or an injector that is a function of a number, and a test that asks
for what must hold. The test runs a few instances in every `make test`, in seconds, and all of them, marked `faults`,
under `make faults`:

    SIZES = [SHORT, pytest.param(WHOLE, marks=pytest.mark.faults)]

    @pytest.mark.parametrize("n", SIZES)
    def test_...(n): ...

Faults of whole runs are trials (`trials.py`), which `python -m tests.faults` runs too, for docs/reliability.md.
Instance i is the same in both forms and on every machine, so that a failure is repeated by its number.
"""
