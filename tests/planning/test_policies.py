"""Which policy of rematerialisation an update fits with: no more is compiled than needed, each costs what it must."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.planning.cards import CARDS
from jaxrlhf.planning.compiling import depths_of, measure, measure_with
from jaxrlhf.planning.count import Layout
from jaxrlhf.planning.planner import Asked, make_plan
from jaxrlhf.planning.remat import POLICIES, search
from jaxrlhf.planning.report import as_json, remat_lines
from jaxrlhf.planning.shapes import Shapes, read_model

GIB = 2**30
PEAKS = {"none": 90.0, "dots": 70.0, "full": 20.0}  # GiB, of which 10 are fixed


def searched(given: str, memory: float, less: bool = False):
    """(what was found, the policies that were compiled beside the given one)."""
    asked = []

    def plan_of(policy):
        asked.append(policy)
        parts = {"weights": 8.0 * GIB, "rows": 2.0 * GIB, "activations": (PEAKS[policy] - 10) * GIB}
        seconds = 1.0 + POLICIES.index(policy) / 4
        return SimpleNamespace(peak=PEAKS[policy] * GIB, parts=parts, seconds=SimpleNamespace(bound=seconds))

    found = search("sft.remat", given, plan_of, memory * GIB, less)
    assert asked[0] == given
    return found, asked[1:]


@pytest.mark.parametrize(
    ("given", "memory", "less", "compiled", "said"),
    [
        ("none", 100, False, [], ""),
        ("none", 100, True, [], ""),
        ("none", 80, False, ["dots"],
         "sft.remat=none does not fit (90.00 GiB); dots would (70.00 GiB, at least 1.25 s in place of 1.00 s)"),
        ("none", 30, False, ["dots", "full"],
         "sft.remat=none does not fit (90.00 GiB), nor would dots (70.00 GiB); "
         "full would (20.00 GiB, at least 1.50 s in place of 1.00 s)"),
        ("none", 15, False, ["dots", "full"],
         "sft.remat=none does not fit (90.00 GiB), nor would dots (70.00 GiB) and full (20.00 GiB)"),
        ("none", 9, False, [],
         "sft.remat=none does not fit, nor would another: what it does not change takes 10.00 GiB"),
        ("dots", 80, False, [], "sft.remat=dots fits; --remat finds out whether less need be computed again"),
        ("dots", 80, True, ["none"], "sft.remat=dots fits (70.00 GiB); none (90.00 GiB) would not"),
        ("dots", 30, False, ["full"],
         "sft.remat=dots does not fit (70.00 GiB); full would (20.00 GiB, at least 1.50 s in place of 1.25 s)"),
        ("full", 100, True, ["none"],
         "sft.remat=none fits (90.00 GiB, at least 1.00 s in place of 1.50 s); full is not needed"),
        ("full", 80, True, ["none", "dots"],
         "sft.remat=dots fits (70.00 GiB, at least 1.25 s in place of 1.50 s), none (90.00 GiB) would not; "
         "full is not needed"),
        ("full", 30, True, ["none", "dots"],
         "sft.remat=full fits (20.00 GiB); none (90.00 GiB) and dots (70.00 GiB) would not"),
        ("full", 100, False, [], "sft.remat=full fits; --remat finds out whether less need be computed again"),
        ("full", 15, True, [], "sft.remat=full does not fit (20.00 GiB), and keeps least of all"),
    ],
    ids=lambda value: "" if isinstance(value, str) and " " in value else str(value).replace(" ", ""),
)  # fmt: skip
def test_the_first_that_fits_is_found_and_no_more_is_compiled_than_needed(given, memory, less, compiled, said):
    found, asked = searched(given, memory, less)
    assert asked == compiled
    assert remat_lines(found) == ([said] if said else [])
    fitting = [policy for policy in POLICIES if PEAKS[policy] <= memory]
    if found.complete and fitting:  # of all three, not only of those that were looked at
        assert found.cheapest == fitting[0]


SETTINGS = {
    "run_dir": "run",
    "stages": ["sft"],
    "model": {
        "new": {"hidden_size": 256, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 512,
                "max_positions": 128}
    },
    "adapter": {"rank": 4},
    "sft": {"data": {"path": "rows.jsonl"}, "batch_size": 16, "max_length": 128, "remat": "none"},
}  # fmt: skip


def config_with(remat) -> RunConfig:
    return RunConfig.model_validate(SETTINGS | {"sft": SETTINGS["sft"] | {"remat": remat}})


@pytest.fixture(scope="module")
def measured():
    """The update as it is compiled with each policy, by policy."""
    config = config_with("none")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shapes, layout = Shapes(config, mesh, read_model(config.model)), Layout(dict(mesh.shape))
    assert depths_of(shapes.model.layers) == (3,)
    update = list(measure("sft", shapes, layout, lambda text: None).values())
    said = []
    found = {"none": update[0]} | {p: measure_with(p, update, layout, said.append)[0] for p in POLICIES[1:]}
    assert said == [f"compiles sft_update with 3 layers and remat={p}" for p in POLICIES[1:]]
    return found


def test_the_more_is_computed_again_the_less_is_kept(measured):
    counts = {policy: m.count for policy, m in measured.items()}
    assert counts["none"].temporaries > counts["dots"].temporaries > counts["full"].temporaries
    again = {policy: count.flops - counts["none"].flops for policy, count in counts.items()}
    # Of dots what attention multiplies, of full each product with a weight as well.
    seen = 3 * 4 * 16 * 128 * 128 * 256
    weights = 3 * 2 * 16 * 128 * (2 * 256 * 256 + 2 * 256 * 128 + 2 * 256 * 512)
    assert 0 < again["dots"] <= 1.01 * seen < weights < again["full"] < 1.3 * weights


def test_a_plan_names_the_policy_that_fits(measured):
    """With memory between what two policies take."""
    config = config_with("none")
    asked = Asked(1, CARDS["h100"], memory=0.0, largest_batch=False)
    rest = sum(measured["none"].parts.values())
    sizes = {policy: rest + m.count.temporaries for policy, m in measured.items()}
    between = dataclasses.replace(asked, memory=(sizes["none"] + sizes["dots"]) / 2)
    said = []
    plan = make_plan(config, between, jax.devices()[:1], said.append)
    (stage,) = plan.stages
    assert stage.remat.cheapest == "dots" and stage.peak == stage.remat.peaks["none"] == sizes["none"]
    assert stage.remat.peaks["dots"] == sizes["dots"]
    assert [re.sub(".* and ", "", text) for text in said[1:]] == ["remat=dots"]
    assert as_json(plan)["stages"][0]["remat"]["cheapest"] == "dots"


def test_a_setting_of_old_is_planned_as_what_it_is_called_now(measured):
    asked = Asked(1, CARDS["h100"], memory=2.0**40, largest_batch=False)
    said = []
    (stage,) = make_plan(config_with(True), asked, jax.devices()[:1], said.append).stages
    assert (stage.remat.given, stage.remat.cheapest, stage.remat.complete) == ("full", "full", False)
    assert len(said) == 1 and stage.peak == sum(measured["full"].parts.values()) + measured["full"].count.temporaries
