"""Whole runs of PPO's relatives: no value model, groups, a sum of rewards; and a reward that fails loses nothing."""

import json

import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
PARTS = {
    "right": {"kind": "function", "function": "jaxrlhf.toy.world:gold_score", "weight": 2.0},
    "brief": {
        "kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3, "side": "over"},
        "weight": 0.5,
    },
    "exact": {
        "kind": "function", "function": "jaxrlhf.rewards.library:exact_match", "columns": {"answer": "answer"},
        "weight": 0.0,
    },
}  # fmt: skip
GRPO = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
    },
    "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 3, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6, "samples_per_prompt": 4}, "adapter": FEW,
        "advantage": {"estimator": "grpo"}, "update": {"epochs": 2, "minibatches": 2, "kl_loss": "k3"},
        "reward": {"kind": "sum", "parts": PARTS}, "gold": "jaxrlhf.toy.world:gold_score", "evaluation": {"prompts": 4},
        "save_every": 100, "sample_every": 1,
    },
}  # fmt: skip


def config(folder, **ppo):
    return RunConfig.model_validate(GRPO | {"run_dir": str(folder), "ppo": GRPO["ppo"] | ppo})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_grpo_with_a_sum_of_rewards(tmp_path):
    roles = run_stages(config(tmp_path))
    assert "value" not in roles.adapters and not (tmp_path / "roles" / "value").exists()
    for record in lines(tmp_path):
        whole = 2 * record["reward/right"] + 0.5 * record["reward/brief"]
        assert record["reward/score"] == pytest.approx(whole, abs=1e-5)
        assert record["reward/gold"] == pytest.approx(record["reward/right"], abs=1e-6)
        assert "policy/kl_loss" in record and "value/loss" not in record
        assert {record[f"compiles/{name}"] for name in ("rollout", "annotate", "experience", "update")} == {1}
        assert record["policy/first_ratio_error"] < 1e-5
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len({sample["prompt"] for sample in samples[0]["samples"][:4]}) == 1, "a group stands side by side"


def test_remax_measures_from_the_greedy_answer(tmp_path):
    code = "def score(completions):\n    return [text.count('e') / 9 for text in completions]\n"
    (tmp_path / "letters.py").write_text(code)
    function = {"kind": "function", "function": f"{tmp_path / 'letters.py'}:score"}
    sampling = {"max_new_tokens": 6}
    run_stages(config(tmp_path, advantage={"estimator": "remax"}, reward=function, sampling=sampling, batch_size=8))
    record = lines(tmp_path)[-1]
    assert record["compiles/rollout"] == 1, "the greedy answers are the same program at temperature 0"
    assert record["advantage/std"] > 0


def test_a_reward_that_fails_loses_no_step(tmp_path):
    """What was learnt until the fault is saved, and the run goes on from there as if nothing had been."""
    source = tmp_path / "moody.py"
    source.write_text(
        "from pathlib import Path\n"
        "here = Path(__file__).parent\n"
        "def score(completions, **rest):\n"
        "    if (here / 'down').exists() and (here / 'calls').read_text().count('x') >= 2:\n"
        "        raise ConnectionError('no answer')\n"
        "    (here / 'calls').open('a').write('x' * (len(completions) > 2))\n"  # the trial has two rows
        "    return [float(len(text.split())) for text in completions]\n"
    )
    reward = {"kind": "function", "function": f"{source}:score"}
    (tmp_path / "calls").write_text("")
    (tmp_path / "down").touch()
    with pytest.raises(RewardFault, match=r"moody\.py:score raised ConnectionError"):
        run_stages(config(tmp_path / "broken", reward=reward))
    assert len(lines(tmp_path / "broken")) == 2
    (tmp_path / "down").unlink()
    run_stages(config(tmp_path / "broken", reward=reward))
    run_stages(config(tmp_path / "straight", reward=reward))
    policies = [tmp_path / name / "roles" / "policy" / "adapter.safetensors" for name in ("broken", "straight")]
    assert policies[0].read_bytes() == policies[1].read_bytes()
