"""Which policy of rematerialisation an update fits with: the one that computes least again."""

import dataclasses
from collections.abc import Callable
from typing import Any

POLICIES = ("none", "dots", "full")  # the more is computed again, the less is kept


@dataclasses.dataclass(frozen=True)
class Remat:
    """What is known of a stage's update under the policies that were looked at."""

    setting: str  # its key path
    given: str
    peaks: dict[str, float]  # bytes per card at the fullest moment
    seconds: dict[str, float]  # least time of a call
    fixed: float  # bytes that no policy changes: weights, adapters, optimizer, rows
    cheapest: str | None  # the first that fits of those looked at; None: none of them
    complete: bool  # whether none that computes less again was left out


def search(setting: str, given: str, plan_of: Callable[[str], Any], memory: float, less: bool) -> Remat:
    """Looks for the first policy that fits, where the given one does not, or where `less` asks for one below it.

    `plan_of(policy)` gives a `ProgramPlan`; what is asked for has to be compiled, so that no more is asked for than
    needed: nothing where the given one fits and is the first, and nothing where what no policy changes is too much.
    """
    plans = {given: plan_of(given)}
    at = POLICIES.index(given)
    fits = plans[given].peak <= memory
    fixed = sum(size for name, size in plans[given].parts.items() if name != "activations")
    others = POLICIES[:at] if fits else POLICIES[at + 1 :]
    if fixed > memory or (fits and not less):
        others = ()
    for policy in others:
        plans[policy] = plan_of(policy)
        if plans[policy].peak <= memory:
            break
    cheapest = next((name for name in POLICIES if name in plans and plans[name].peak <= memory), None)
    return Remat(
        setting,
        given,
        {name: plan.peak for name, plan in plans.items()},
        {name: plan.seconds.bound for name, plan in plans.items()},
        fixed,
        cheapest,
        less or not fits or given == POLICIES[0],
    )
