"""A weighted sum of rewards; each part's scores are also available by name."""

import math
import re
from collections.abc import Mapping

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain, with_abstained
from jaxrlhf.rewards.functions import RewardFault, checked_scores

# Names whose metric `reward/NAME` exists already, and the ending of the metric that counts how often a part abstained.
TAKEN, ABSTAINED = ("score", "gold", "shaped", "adjusted", "score_std", "drawn", "abstained"), "_abstained"


class ComposedReward:
    """A reward (see `completions.Reward`): the weighted sum of its parts.

    A part that abstains on a completion adds 0. The sum abstains if every part with a nonzero weight abstains.

    `parts` maps a name to (reward, weight). Each part is logged as the metric `reward/NAME`; a part of weight 0 is only
    logged. The constructor raises `UserError` for a name or weight that cannot be used. A call raises `RewardFault`,
    which names the part.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]):
        if not parts:
            raise UserError("reward parts: there are none; want at least one")
        for name, (_, weight) in parts.items():
            if not re.fullmatch(r"[\w.-]+", name) or name in TAKEN or name.endswith(ABSTAINED):
                raise UserError(
                    f"reward part {name!r}: want a name of letters, digits, _ . and -, not {', '.join(TAKEN)} and none "
                    f"that ends in {ABSTAINED}"
                )
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"reward part {name}: its weight is {weight!r}; want a finite number")
        self.parts = dict(parts)
        self.name = " + ".join(f"{weight:g} {name}" for name, (_, weight) in self.parts.items())
        self.may_abstain = any(may_abstain(part) for part, _ in self.parts.values())

    def __call__(self, completions: Completions) -> np.ndarray:
        return self.scores_and_parts(completions)[0]

    def scores_and_parts(self, completions: Completions) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(scores of the sum f32[B], unweighted scores f32[B] of each part by name)."""
        # All parts are called before any is fetched: the device computes one while another waits for a server.
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
        raise RewardFault(f"reward part {name}: raised {type(error).__name__}: {one_line(error)}") from error


def _fetch(name: str, values, count: int) -> np.ndarray:
    """Fetches and checks the scores of one part. The sum could not tell which part a NaN comes from."""
    values = values if isinstance(values, np.ndarray) else fetch(values)  # fetch would drop the mask of abstentions
    return checked_scores(values, count, f"reward part {name}")
