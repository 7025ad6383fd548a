"""Which policy of rematerialisation an update fits with: no more is compiled than needed, each costs what it must."""

from types import SimpleNamespace

import pytest

from jaxrlhf.plan.planner import POLICIES, search
from jaxrlhf.plan.report import remat_lines

GIB = 2**30
PEAKS = {"none": 90.0, "dots": 70.0, "full": 20.0}  # GiB, of which 10 are fixed


def plan_of(policy: str) -> SimpleNamespace:
    return SimpleNamespace(peak=PEAKS[policy] * GIB, temporaries=(PEAKS[policy] - 10) * GIB)


@pytest.mark.parametrize(
    ("given", "memory", "less", "compiled", "said"),
    [
        ("none", 100, False, [], ""),
        ("none", 100, True, [], ""),
        ("none", 80, False, ["dots"], "sft.remat=none does not fit (90.00 GiB); dots would (70.00 GiB)"),
        ("none", 30, False, ["dots", "full"],
         "sft.remat=none does not fit (90.00 GiB), nor would dots (70.00 GiB); full would (20.00 GiB)"),
        ("none", 15, False, ["dots", "full"],
         "sft.remat=none does not fit (90.00 GiB), nor would dots (70.00 GiB) and full (20.00 GiB)"),
        ("none", 9, False, [],
         "sft.remat=none does not fit, nor would another: what it does not change takes 10.00 GiB"),
        ("dots", 80, False, [], "sft.remat=dots fits; --remat finds out whether less need be computed again"),
        ("dots", 80, True, ["none"], "sft.remat=dots fits (70.00 GiB); none (90.00 GiB) would not"),
        ("dots", 30, False, ["full"], "sft.remat=dots does not fit (70.00 GiB); full would (20.00 GiB)"),
        ("full", 100, True, ["none"], "sft.remat=none fits (90.00 GiB); full is not needed"),
        ("full", 80, True, ["none", "dots"],
         "sft.remat=dots fits (70.00 GiB), none (90.00 GiB) would not; full is not needed"),
        ("full", 30, True, ["none", "dots"],
         "sft.remat=full fits (20.00 GiB); none (90.00 GiB) and dots (70.00 GiB) would not"),
        ("full", 100, False, [], "sft.remat=full fits; --remat finds out whether less need be computed again"),
        ("full", 15, True, [], "sft.remat=full does not fit (20.00 GiB), and keeps least of all"),
    ],
    ids=lambda value: "" if isinstance(value, str) and " " in value else str(value).replace(" ", ""),
)  # fmt: skip
def test_the_first_that_fits_is_found_and_no_more_is_compiled_than_needed(given, memory, less, compiled, said):
    asked = []

    def under(policy):
        asked.append(policy)
        return plan_of(policy)

    options = SimpleNamespace(memory=memory * GIB, remat=less)
    found = search(given, plan_of(given), under, options)
    assert asked == compiled and list(found) == [given, *compiled]
    stage = SimpleNamespace(stage="sft", remat=found)
    assert remat_lines(stage, options.memory, less) == ([said] if said else [])
    fitting = [policy for policy in POLICIES if PEAKS[policy] <= memory]
    if fitting and PEAKS[given] > memory:
        assert fitting[0] in found
