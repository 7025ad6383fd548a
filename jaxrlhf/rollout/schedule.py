"""How many rows of a rollout wait, decode and enter at a time."""

import dataclasses

from jaxrlhf.config import Sampling

# Rows enter when one slot in this number is free. Later, more slots would wait, and a pass over prompts
# would take more memory. Earlier, passes would be small, and each of them reads all weights.
_ENTERING_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many rows each queue has, how many of them decode at the same time, and how many enter at a time.

    The rows are split into `shares` queues: one for each share of the batch over the mesh.
    """

    shares: int
    rows: int
    slots: int
    entering: int  # rows that enter at a time: whole groups of one prompt, or an equal part of a group

    @classmethod
    def of(cls, sampling: Sampling, prompts: int, shares: int) -> "Schedule":
        """Returns the schedule for a number of prompts.

        It has `shares` queues, or one queue if the number of prompts is not divisible by `shares`.
        """
        shares, n = 1 if prompts % shares else shares, sampling.samples_per_prompt
        rows = prompts // shares * n
        slots = rows if sampling.slots is None else min(max(sampling.slots // shares, 1), rows)
        if slots == rows:
            return cls(shares, rows, slots, rows)
        most = max(slots // _ENTERING_SHARE, 1)
        entering = most - most % n if most >= n else max(k for k in range(1, most + 1) if n % k == 0)
        return cls(shares, rows, slots, entering)

    def trips(self, tokens: int) -> tuple[float, ...]:
        """Returns the iterations of the loops, the outer one first, if each completion has `tokens` tokens."""
        if self.slots == self.rows:
            return (tokens - 1,)
        passes = -(-self.rows // self.entering)
        return passes, -(-self.rows // self.slots) * (tokens - 1) / passes
