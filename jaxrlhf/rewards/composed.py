"""A weighted sum of rewards. The scores of each part are also available by name."""

import math
import re
from collections.abc import Mapping

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain, with_abstained
from jaxrlhf.rewards.functions import RewardFault, checked_scores

# TAKEN are names NAME for which another metric `reward/NAME` exists. ABSTAINED is the ending of the metric that counts
# how often a part gave no score.
TAKEN, ABSTAINED = ("score", "gold", "shaped", "adjusted", "score_std", "drawn", "abstained"), "_abstained"


class ComposedReward:
    """A reward (see `completions.Reward`) that is the weighted sum of its parts.

    If a part gives no score for a completion, the part adds 0. If no part with a nonzero weight gives a score, the sum
    gives no score.

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

    def __call__(self, completions: Completions) -> np.ndarray:
        return self.scores_and_parts(completions)[0]

    def scores_and_parts(self, completions: Completions) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns (scores f32[B] of the sum, unweighted scores f32[B] of each part by name)."""
        # All parts are called before the first result is fetched, so that the device computes one part while another
        # part waits for a server.
        results = {name: _call(name, part, completions) for name, (part, _) in self.parts.items()}
        count = len(completions.prompts)
        scores = {name: _fetch(name, values, count) for name, values in results.items()}
        total = sum(np.float64(weight) * np.asarray(scores[name]) for name, (_, weight) in self.parts.items())
        weighted = [name for name, (_, weight) in self.parts.items() if weight] or list(self.parts)
        abstained = np.logical_and.reduce([abstained_rows(scores[name]) for name in weighted])
        return with_abstained(total.astype(np.float32), abstained), scores


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
    return checked_scores(values, count, f"reward part {name}")
