"""A weighted sum of rewards. The scores of each part are also available by name."""

import math
import re
from collections.abc import Mapping

import numpy as np

from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError, one_line
from jaxrlhf.rewards.completions import (
    Completions,
    Reward,
    abstained_rows,
    by_step,
    may_abstain,
    summed,
    with_abstained,
)
from jaxrlhf.rewards.functions import RewardFault, checked_scores
from jaxrlhf.rewards.steps import at_end

# TAKEN are names NAME for which another metric `reward/NAME` exists. ABSTAINED is the ending of the metric that counts
# how often a part gave no score.
TAKEN, ABSTAINED = ("score", "gold", "shaped", "adjusted", "score_std", "drawn", "abstained", "step"), "_abstained"


class ComposedReward:
    """A reward (see `completions.Reward`) that is the weighted sum of its parts.

    If a part gives no score for a completion, the part adds 0. If no part with a nonzero weight gives a score, the sum
    gives no score. If a part with a nonzero weight scores inside completions, so does the sum, and the scores of other
    parts stand at the last token.

    `parts` maps a name to (reward, weight). Each part is logged as the metric `reward/NAME`. A part with weight 0 is
    only logged. The constructor raises `UserError` if a name or a weight cannot be used. If a part fails, a call raises
    `RewardFault` with the name of the part.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]):
        if not parts:
            raise UserError("reward parts: there are no parts; a sum must have at least one")
        for name, (_, weight) in parts.items():
            if not re.fullmatch(r"[\w.-]+", name) or name in TAKEN or name.endswith(ABSTAINED):
                raise UserError(
                    f"reward part {name!r}: a name must consist of letters, digits, '_', '.' and '-'; it must not end "
                    f"in {ABSTAINED} and must not be one of {', '.join(TAKEN)}"
                )
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"reward part {name}: the weight must be a finite number, not {weight!r}")
        self.parts = dict(parts)
        self.name = " + ".join(f"{weight:g} {name}" for name, (_, weight) in self.parts.items())
        self.may_abstain = any(may_abstain(part) for part, _ in self.parts.values())
        self.by_step = any(by_step(part) for part, weight in self.parts.values() if weight)

    def __call__(self, completions: Completions) -> np.ndarray:
        return self.scores_and_parts(completions)[0]

    def scores_and_parts(self, completions: Completions) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns (scores f32[B] or f32[B,R] of the sum, unweighted scores f32[B] of each part by name)."""
        # All parts are called before the first result is fetched, so that the device computes one part while another
        # part waits for a server.
        results = {name: _call(name, part, completions) for name, (part, _) in self.parts.items()}
        count = len(completions.prompts)
        scores = {name: _fetch(name, values, count) for name, values in results.items()}
        if self.by_step:
            return self._sum_inside(scores, completions.response_mask), {n: summed(part) for n, part in scores.items()}
        scores = {name: summed(values) for name, values in scores.items()}
        total = sum(np.float64(weight) * np.asarray(scores[name]) for name, (_, weight) in self.parts.items())
        weighted = [name for name, (_, weight) in self.parts.items() if weight] or list(self.parts)
        abstained = np.logical_and.reduce([abstained_rows(scores[name]) for name in weighted])
        return with_abstained(total.astype(np.float32), abstained), scores

    def _sum_inside(self, scores: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ma.MaskedArray:
        """Returns the weighted sum f32[B,R]. Scores of whole completions are added at the last token.

        `mask` bool[B,R] marks the tokens of completions.
        """
        total, given = np.zeros(mask.shape), np.zeros(mask.shape, bool)
        for name, (_, weight) in self.parts.items():
            if weight:
                values = scores[name]
                values = values if values.ndim == 2 else at_end(values, abstained_rows(values), mask)
                total += weight * np.ma.filled(values, 0).astype(np.float64)
                given |= ~np.ma.getmaskarray(values)
        return np.ma.MaskedArray(total.astype(np.float32), ~given)


def _call(name: str, part: Reward, completions: Completions):
    try:
        return part(completions)
    except UserError:
        raise
    except RewardFault as error:
        raise RewardFault(f"reward part {name}: {one_line(error)}") from error
    except Exception as error:
        raise RewardFault(f"reward part {name} raised {type(error).__name__}: {one_line(error)}") from error


def _fetch(name: str, values, count: int) -> np.ndarray:
    """Fetches and checks the scores of one part, so that the error for a NaN names the part."""
    values = values if isinstance(values, np.ndarray) else fetch(values)  # fetch removes the mask of a masked array
    if isinstance(values, np.ma.MaskedArray) and values.ndim == 2:
        return values  # rewards inside completions, which the part has checked
    return checked_scores(values, count, f"reward part {name}")
