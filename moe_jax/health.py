"""Health of a run: losses that are not finite or that spike, and the newest step that is known to be good."""

from collections import deque

import numpy as np

WINDOW = 1000  # losses that a new one is compared with
FEWEST = 100  # of them, before anything is called a spike
DEVIATIONS = 7.0
RESOLUTION = 1e-6  # of a loss in float32: what is no more than rounding is no deviation


class Health:
    """Follows the loss of every step.

    A loss is a spike where it is at least seven standard deviations above the mean of the last 1,000, as in the spike
    score of OLMo 2 (arXiv:2501.00656, section 3). A step is in trouble where its loss is a spike or its loss or
    gradient is not finite; so may be the parameters that it was computed from. A continuation compares anew.
    """

    def __init__(self, step: int = 0, skipped_in_a_row: int = 0):
        """step: where the run begins or goes on. skipped_in_a_row: the last of its steps that were not finite."""
        self.step = step
        self.trouble_since = step - skipped_in_a_row + 1 if skipped_in_a_row else None  # the first of these steps
        self.losses = deque[float](maxlen=WINDOW)
        self.spikes = 0

    def add(self, step: int, loss: float, finite: bool) -> None:
        """Adds the next step. finite: its loss and its gradient are."""
        spike = finite and self.is_spike(loss)
        if spike or not finite:
            self.trouble_since = self.trouble_since or step
        else:
            self.trouble_since = None
        if finite:
            self.losses.append(loss)
        self.step, self.spikes = step, self.spikes + spike

    def is_spike(self, loss: float) -> bool:
        """Tells whether a finite loss is a spike after those before it."""
        if len(self.losses) < FEWEST:
            return False
        mean, deviation = np.mean(self.losses), np.std(self.losses)
        return bool(loss - mean >= DEVIATIONS * max(deviation, RESOLUTION * abs(mean)))

    @property
    def last_good(self) -> int:
        """The newest step from whose parameters another one was computed without trouble; 0 is the beginning."""
        first_unknown = self.step if self.trouble_since is None else self.trouble_since - 1
        return max(first_unknown - 1, 0)

    def take_spikes(self) -> int:
        """Spikes since this was last asked."""
        found, self.spikes = self.spikes, 0
        return found
