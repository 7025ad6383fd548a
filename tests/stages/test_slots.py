"""`ppo.sampling.slots` against the batch and the mesh, and what the plan and the loops make of it."""

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxrlhf.config import RunConfig, Sampling
from jaxrlhf.distributed.mesh import AXES
from jaxrlhf.errors import UserError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import abstract_decoder
from jaxrlhf.plan import work
from jaxrlhf.rollout.schedule import Schedule
from jaxrlhf.stages.checks import check_stage

MODEL = DecoderConfig(31, 16, 24, 1, 2, 1, 8, 64)


def check(slots, data=1, **ppo):
    config = RunConfig.model_validate({
        "run_dir": "run", "stages": ["ppo"], "model": {"path": "model"},
        "ppo": {"data": {"path": "p.jsonl"}, "batch_size": 16, "max_prompt_tokens": 8, **ppo,
                "sampling": {"max_new_tokens": 8, "samples_per_prompt": 2, "slots": slots}},
    })  # fmt: skip
    mesh = AbstractMesh((data, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return check_stage(config, "ppo", MODEL, mesh)


def test_slots_fit_the_batch_and_the_mesh():
    for slots, data in ((None, 8), (1, 1), (32, 1), (8, 8), (24, 8)):
        check(slots, data)
    with pytest.raises(UserError, match=r"^ppo\.sampling\.slots: is 33, but an iteration has only 32 completions"):
        check(33)
    with pytest.raises(UserError, match=r"^ppo\.sampling\.slots: 12 .* cannot be split over 8 devices .*; use 8 or 16"):
        check(12, data=8)


@pytest.mark.parametrize(
    ("prompts", "samples", "slots", "shares", "expected"),
    [
        (64, 1, None, 1, (1, 64, 64, 64)),
        (64, 1, 99, 1, (1, 64, 64, 64)),
        (64, 1, 32, 1, (1, 64, 32, 4)),
        (64, 4, 32, 8, (8, 32, 4, 1)),  # a group of 4 enters in four parts
        (64, 3, 64, 1, (1, 192, 64, 6)),  # two groups of 3
        (64, 12, 64, 1, (1, 768, 64, 6)),  # half a group of 12
        (63, 1, 32, 8, (1, 63, 32, 4)),  # 8 shares do not divide the prompts
        (64, 1, 4, 8, (8, 8, 1, 1)),
    ],
)
def test_groups_enter_whole_or_in_equal_parts(prompts, samples, slots, shares, expected):
    sampling = Sampling(samples_per_prompt=samples, slots=slots)
    assert Schedule.of(sampling, prompts, shares) == Schedule(*expected)


def test_the_loops_run_as_often_as_full_completions_need():
    assert Schedule(1, 64, 64, 64).trips(20) == (19,)
    passes, steps = Schedule(1, 64, 32, 8).trips(20)
    assert (passes, passes * steps) == (8, 2 * 19)


def test_the_least_work_has_at_most_the_slots_in_a_step():
    """Four completions through two slots: the third enters when the second ends, and the fourth after the third."""
    base, lengths = abstract_decoder(MODEL), np.array([6, 2, 3, 1])
    few = work.rollout(base, None, np.full(4, 5), lengths, slots=2)
    whole = work.rollout(base, None, np.full(4, 5), lengths)
    np.testing.assert_allclose(few.flops.sum(), whole.flops.sum())
    one = work.rollout(base, None, np.full(1, 5), np.array([2])).flops[1]
    rows = np.array([2, 2, 2, 1, 1])
    np.testing.assert_allclose(few.flops[1:] / one, rows, rtol=0.2)  # attention sees more from step to step
    assert few.tokens == whole.tokens == 12 and len(whole.flops) == 6
