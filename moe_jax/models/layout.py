"""Which layers of a stack are sparse, and how the stack is scanned."""

import itertools


def sparse_layers(layout: str, N: int) -> tuple[bool, ...]:
    """For each of N layers, whether it is sparse.

    layout: "every 2" (the last of each two, GLaM's), "all", "none", "first 3", "last 3", or indices "0,4,5".
    """
    word, _, number = layout.partition(" ")
    try:
        if layout in ("all", "none"):
            chosen = set(range(N)) if layout == "all" else set()
        elif word in ("every", "first", "last"):
            if not 1 <= (n := int(number)) <= N:
                raise ValueError
            chosen = set({"every": range(n - 1, N, n), "first": range(n), "last": range(N - n, N)}[word])
        else:
            chosen = {int(i) for i in layout.strip("()[], ").split(",")}
    except ValueError:
        raise ValueError(
            f"layout={layout!r} is not a choice of layers; use 'every n', 'first n', 'last n' (n <= N={N}), "
            "'all', 'none', or indices like '0,4'."
        ) from None
    if outside := sorted(i for i in chosen if not 0 <= i < N):
        raise ValueError(f"layout={layout!r} names layers {outside}, but there are N={N}, counted from 0.")
    return tuple(i in chosen for i in range(N))


def stacks(sparse: tuple[bool, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """Splits layers into (block, how often it repeats), so that scanning compiles as few layers as can be.

    Either the shortest period, as one stack, or every run of equal layers as a stack of its own.
    """
    N = len(sparse)
    period = next(p for p in range(1, N + 1) if N % p == 0 and sparse == sparse[:p] * (N // p))
    runs: list[tuple[tuple[bool, ...], int]] = [((kind,), len(list(run))) for kind, run in itertools.groupby(sparse)]
    return [(sparse[:period], N // period)] if period <= len(runs) else runs
