"""The museum: public numerical bugs of other codebases, each planted here and caught. `python -m tests.museum`.

mutant    one edit of one file
forks     runs programs and tests on mutated code, each in a fork of one warm process
entries   the bugs: thread, essence, mutant, and what catches it
absent    bugs that cannot be planted here, and why
page      docs/museum.md
"""
