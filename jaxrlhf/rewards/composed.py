"""Several rewards as one: their weighted sum, with each part known by name."""

import math
import re
from collections.abc import Mapping

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain, with_abstained
from jaxrlhf.rewards.functions import RewardFault, checked_scores

# `reward/NAME` of the metrics that have this name already, and the ending of those that tell where a part abstained.
TAKEN, ABSTAINED = ("score", "gold", "shaped", "adjusted", "score_std", "drawn", "abstained"), "_abstained"


class ComposedReward:
    """A reward (see `completions.Reward`): the sum of weight times part, where a part that abstains counts 0.

    It abstains itself where all parts do that have a weight.

    `parts`: name -> (reward, weight). A name becomes the metric `reward/NAME`; a part of weight 0 is only measured.
    Raises UserError for a name or a weight that cannot be used, and `RewardFault`, which names the part, when called.
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
        """(scores f32[B], each part's own scores f32[B] without its weight, by name)."""
        # All are called before any is fetched: the device computes one part while another waits for a server.
        given = {name: _called(name, part, completions) for name, (part, _) in self.parts.items()}
        count = len(completions.prompts)
        scores = {name: _fetched(name, values, count) for name, values in given.items()}
        total = sum(np.float64(weight) * np.asarray(scores[name]) for name, (_, weight) in self.parts.items())
        weighed = [name for name, (_, weight) in self.parts.items() if weight] or list(self.parts)
        abstained = np.logical_and.reduce([abstained_rows(scores[name]) for name in weighed])
        return with_abstained(total.astype(np.float32), abstained), scores


def _called(name: str, part: Reward, completions: Completions):
    try:
        return part(completions)
    except UserError:
        raise
    except RewardFault as error:
        raise RewardFault(f"reward part {name}: {one_line(error)}") from error
    except Exception as error:
        raise RewardFault(f"reward part {name}: raised {type(error).__name__}: {one_line(error)}") from error


def _fetched(name: str, values, count: int) -> np.ndarray:
    """Fetches a part's scores and checks them here, because a NaN in the sum would not say which part it came from."""
    values = values if isinstance(values, np.ndarray) else fetch(values)  # which would lose where a part abstained
    return checked_scores(values, count, f"reward part {name}")
