"""Runs with rewards inside completions: what they learn, what they log, and that they resume to the same bits."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.stages.ppo.remarks import remarks
from jaxrlhf.stages.run import run_stages
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

FEW = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
MODEL = {
    "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
}
# Two words are right if the first begins with s and the second with w. A random answer has both in one of 200 cases.
REWARDS = """
from pathlib import Path
here = Path(__file__).parent
def right(word, first):
    return float(word.strip().startswith("s" if first else "w"))
def process(steps, **columns):
    return [[right(step, i == 0) for i, step in enumerate(row)] for row in steps]
def outcome(completions, **columns):
    words = [text.split() for text in completions]
    return [2.0 * (len(row) == 2 and right(row[0], True) * right(row[1], False)) for row in words]
def lengths(steps, **columns):
    calls = here / "calls"
    if (here / "down").exists() and len(calls.read_text()) >= 5:
        raise ConnectionError("no answer")
    calls.open("a").write("x")
    return [[float(len(step) % 3) for step in row] for row in steps]
def too_few(steps, **columns):
    return [[1.0] for row in steps]
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "calls").write_text("")

    def run(name, function, **ppo):
        steps = {} if function == "outcome" else {"granularity": "step", "step_separator": " "}
        reward = {"kind": "function", "function": f"{tmp_path / 'rewards.py'}:{function}"} | steps
        section = {
            "data": {"path": "builtin:assistant-prompts", "limit": 20}, "max_prompt_tokens": 16, "adapter": FEW,
            "value_adapter": FEW, "reward": reward, "sample_every": 1,
        }  # fmt: skip
        config = {"run_dir": str(tmp_path / name), "model": MODEL, "stages": ["ppo"], "ppo": section | ppo}
        run_stages(RunConfig.model_validate(config))
        return tmp_path / name

    return run


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_two_steps_are_learnt_in_few_iterations_from_a_process_reward_only(start):
    rate = {"learning_rate": 0.02}
    settings = {
        "iterations": 9, "batch_size": 64, "adapter": {"kind": "full"}, "value_adapter": {"kind": "full"},
        "sampling": {"max_new_tokens": 2}, "kl": {"coef": 0.0},
        "evaluation": {"prompts": 64}, "save_every": 100,
        "update": {"epochs": 4, "minibatches": 1, "optimizer": rate, "value_optimizer": rate},
    }  # fmt: skip
    process, outcome = (start(name, name, **settings) for name in ("process", "outcome"))
    scores = {folder: [line["reward/score"] for line in lines(folder)] for folder in (process, outcome)}
    assert scores[process][-1] > 1 and scores[process][0] < 0.3, "of 2"
    assert max(scores[outcome]) < 0.5
    last = lines(process)[-1]
    assert last["length/steps"] == pytest.approx(2, abs=0.1)
    assert last["reward/step"] == pytest.approx(last["reward/score"] / 2, abs=0.05)
    assert "reward/step" not in lines(outcome)[-1]
    for record in lines(process, "samples"):
        for sample in record.get("samples", []):
            assert "".join(text for text, _ in sample["steps"]) == sample["completion"]
            assert sum(reward for _, reward in sample["steps"]) == sample["score"]


GROUPS = {
    "resample": 2, "advantage": {"estimator": "grpo"}, "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2},
    "score": {"normalise": "running", "missing_eos_penalty": 0.5}, "async": 1,
}  # fmt: skip


def test_a_run_that_a_reward_ends_goes_on_to_the_same_bits(start, tmp_path):
    """With everything that keeps rewards between draws and iterations."""
    rate = {"learning_rate": 0.05}
    settings = {
        "iterations": 4, "batch_size": 4, "sampling": {"max_new_tokens": 4}, "evaluation": {"prompts": 4},
        "save_every": 2, "update": {"epochs": 1, "minibatches": 2, "optimizer": rate, "value_optimizer": rate},
    } | GROUPS  # fmt: skip
    whole = start("whole", "lengths", **settings)
    (tmp_path / "calls").write_text("")
    (tmp_path / "down").touch()
    with pytest.raises(RewardFault, match="no answer"):
        start("ended", "lengths", **settings)
    (tmp_path / "down").unlink()
    ended = start("ended", "lengths", **settings)
    for file in sorted(whole.glob("roles/*/adapter.safetensors")):
        one, other = load_file(file), load_file(ended / file.relative_to(whole))
        assert all(np.array_equal(one[name], other[name]) for name in one), file
    kept = [{k: v for k, v in line.items() if k.startswith(("reward", "kl", "groups"))} for line in lines(whole)]
    again = [{k: v for k, v in line.items() if k.startswith(("reward", "kl", "groups"))} for line in lines(ended)]
    assert kept == again and len(kept) == 4
    assert {line["compiles/experience"] for line in lines(whole)} == {1}


def test_plans_have_the_shapes_of_process_rewards():
    section = {
        "data": {"path": "p"}, "batch_size": 4, "sampling": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "reward": {"kind": "model", "granularity": "step"},
    }  # fmt: skip
    config = {"run_dir": "r", "model": MODEL, "stages": ["ppo"], "ppo": section}
    config = resolved(RunConfig.model_validate(config))
    shapes = Shapes(config, make_mesh(config.mesh, jax.devices()[:1]), read_model(config.model))
    calls = {call.name: call for call in calls_of("ppo", shapes)}
    reward, experience = calls["reward"], calls["experience"]
    assert reward.program.lower(*reward.args, **reward.kwargs).out_info.shape == (8, 6)
    assert experience.args[2].shape == experience.kwargs["steps"].shape == (8, 6)
    experience.program.lower(*experience.args, **experience.kwargs)


def test_a_wrong_number_of_steps_stops_before_the_run(start):
    with pytest.raises(UserError, match=r"ppo.reward: the reward failed on the first 2 rows: .* returned 1 number"):
        start("bad", "too_few", iterations=2, batch_size=4, sampling={"max_new_tokens": 2})


@pytest.mark.parametrize(("estimator", "said"), [("rloo", True), ("remax", True), ("grpo", False), ("gae", False)])
def test_estimators_that_sum_steps_say_so(estimator, said):
    reward = {"kind": "function", "function": "a:b", "granularity": "step"}
    section = {
        "data": {"path": "p"}, "reward": reward, "advantage": {"estimator": estimator}, "kl": {"coef": 0.0},
        "sampling": {"samples_per_prompt": 2},
    }  # fmt: skip
    config = RunConfig.model_validate({"run_dir": "r", "model": MODEL, "stages": ["ppo"], "ppo": section}).ppo
    check_algorithm(config)
    assert any("sums the rewards inside a completion" in line for line in remarks(config)) == said


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "function", "function": "a:b", "step_separator": ";"}, "step_separator has no effect with"),
        ({"kind": "model", "step_reward": "difference"}, "step_reward has no effect without granularity: step"),
        ({"kind": "model", "path": "m", "granularity": "step", "end_at_eos": True}, "end_at_eos: true has no effect"),
        ({"kind": "model", "granularity": "token"}, "granularity"),
        ({"kind": "http", "url": "http://a", "granularity": "step", "step_separator": ""}, "step_separator"),
    ],
)
def test_settings_that_do_not_fit(reward, message):
    section = {"data": {"path": "p"}, "reward": reward}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"run_dir": "r", "model": MODEL, "stages": ["ppo"], "ppo": section})
