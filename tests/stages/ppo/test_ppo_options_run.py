"""Whole runs with what PPO can do beside the plain thing: dynamic sampling, a moving reference, a shared trunk, ..."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.cli.export import main as export
from jaxrlhf.cli.generate import main as generate
from jaxrlhf.config import RunConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
FAST = {"learning_rate": 0.02}
ONE_STEP_EACH = {"epochs": 2, "minibatches": 1}
MODEL = {
    "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
}
DEMONSTRATIONS = {"path": "builtin:assistant-demonstrations", "limit": 40}
PPO = {
    "data": {"path": "builtin:assistant-prompts", "limit": 20}, "batch_size": 4, "max_prompt_tokens": 16,
    "sampling": {"max_new_tokens": 6}, "adapter": FEW, "value_adapter": FEW, "evaluation": {"prompts": 4},
    "save_every": 100, "sample_every": 1,
}  # fmt: skip

# A reward with few values, so that groups with equal scores are common; it fails while a file named `down` is there
# and it was called often enough.
MOODY = """
from pathlib import Path
here = Path(__file__).parent
def score(completions, **rest):
    calls = here / 'calls'
    if (here / 'down').exists() and len(calls.read_text()) >= {often}:
        raise ConnectionError('no answer')
    calls.open('a').write('x')
    return [float(len(text.split()) > 5) for text in completions]
"""


def config(folder, reward, **ppo):
    reward = {"kind": "function", "function": f"{reward}:score"} if reward else {}
    settings = {"run_dir": str(folder), "model": MODEL, "stages": ["ppo"], "ppo": PPO | {"reward": reward} | ppo}
    return RunConfig.model_validate(settings)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def roles(folder, name):
    return load_file(folder / "roles" / name / "adapter.safetensors")


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A GRPO run in which everything that is carried from iteration to iteration moves; broken off, and straight."""
    folder = tmp_path_factory.mktemp("moving")
    (folder / "moody.py").write_text(MOODY.replace("{often}", "6"))
    (folder / "calls").write_text("")
    (folder / "down").touch()
    settings = dict(
        iterations=4, sampling={"max_new_tokens": 6, "samples_per_prompt": 3}, resample=2, refresh_reference=2,
        advantage={"estimator": "grpo"}, score={"normalise": "running", "clip": 2.0, "length_penalty": 0.01},
        pretraining={"data": DEMONSTRATIONS, "batch_size": 2, "max_length": 32},
        update={"epochs": 2, "minibatches": 2, "ema_decay": 0.9, "optimizer": FAST, "kl_stop": 50.0},
    )  # fmt: skip
    with pytest.raises(RewardFault, match="moody"):
        run_stages(config(folder / "broken", folder / "moody.py", **settings))
    (folder / "down").unlink()
    for name in ("broken", "straight"):
        run_stages(config(folder / name, folder / "moody.py", **settings))
    return folder


def test_all_that_moves_is_in_the_checkpoint(moving):
    for name in ("policy", "average"):
        broken, straight = (roles(moving / run, name) for run in ("broken", "straight"))
        assert set(broken) == set(straight)
        for leaf, value in straight.items():
            np.testing.assert_array_equal(broken[leaf], value, err_msg=f"{name} {leaf}")
    kinds = ("reward", "groups", "kl")
    told = [
        [{name: x for name, x in line.items() if name.startswith(kinds)} for line in lines(moving / run)]
        for run in ("broken", "straight")
    ]
    assert told[0] == told[1] and len(told[0]) == 4


def test_groups_with_equal_scores_are_drawn_again_within_bounds(moving):
    records = lines(moving / "straight")
    assert any(record["groups/draws"] > 1 for record in records), "the reward gives equal groups often"
    for record in records:
        assert 1 <= record["groups/draws"] <= 3
        assert record["groups/informative"] >= record["groups/informative_drawn"]
        if record["groups/informative"] < 1:
            assert record["groups/draws"] == 3, "given up only where the bound was reached"
        assert {name: n for name, n in record.items() if name.startswith("compiles/") and n != 1} == {}
        assert "compiles/merge" in record
        assert record["policy/first_ratio_error"] < 1e-5
    samples = json.loads((moving / "straight" / "samples.jsonl").read_text().splitlines()[0])
    assert len({sample["prompt"] for sample in samples["samples"][:3]}) == 1, "groups stay side by side"


def test_the_reference_follows(moving):
    """An iteration after the policy became the reference begins at a KL of 0."""
    kls = [record["kl/k3"] for record in lines(moving / "straight")]
    assert abs(kls[0]) < 1e-6 and abs(kls[2]) < 1e-6 and kls[1] > 1e-4 and kls[3] > 1e-4


def test_the_mix_and_the_normalised_scores_are_told(moving):
    records = lines(moving / "straight")
    assert all(record["policy/pretraining_loss"] > 0 for record in records)
    assert all(record["policy/steps"] == 4 for record in records)
    # The first iteration's scores by their own moments, less the penalty for 1 to 6 tokens.
    first = records[0]
    assert first["reward/adjusted"] == pytest.approx(-0.01 * first["length/mean"], abs=1e-3)
    assert 0 <= first["reward/score"] <= 1 and 0 <= first["reward/drawn"] <= 1


def test_the_average_is_a_role_like_others(moving, capsys):
    policy, average = roles(moving / "straight", "policy"), roles(moving / "straight", "average")
    assert any((policy[name] != value).any() for name, value in average.items())
    run = ["--run", str(moving / "straight")]
    assert generate([*run, "--roles", "policy,average", "--prompt", "what colour is grass ?"]) == 0
    assert "average:" in capsys.readouterr().out
    for format in ("merged", "peft"):
        target = moving / format
        assert export([*run, "--to", str(target), "--format", format, "--role", "average"]) == 0
        assert any(target.glob("*.safetensors"))


def test_a_shared_trunk_warm_up_and_fitted_scores(tmp_path):
    (tmp_path / "reward.py").write_text("def score(completions):\n    return [100.0 + len(t) for t in completions]\n")
    run_stages(
        config(
            tmp_path / "run", tmp_path / "reward.py", iterations=3, value_adapter=None,
            score={"normalise": "initial", "initial_completions": 6, "overlong_penalty": 1.0, "overlong_buffer": 2},
            update={"epochs": 2, "minibatches": 1, "value_trunk": "policy", "value_warmup": 1, "optimizer": FAST},
        )
    )  # fmt: skip
    records = lines(tmp_path / "run")
    assert all(abs(record["reward/adjusted"]) < 10 < 100 < record["reward/score"] for record in records)
    assert all(record["value/loss"] > 0 for record in records)
    assert {record["compiles/annotate"] for record in records} == {1}
    kls = [record["kl/k3"] for record in records]
    assert abs(kls[0]) < 1e-6 and abs(kls[1]) < 1e-6 and kls[2] > 1e-6, "the policy waits for one iteration"
    policy, value = roles(tmp_path / "run", "policy"), roles(tmp_path / "run", "value")
    assert set(value) - set(policy) == {"score/kernel", "score/bias"} and value["score/kernel"].any()
    assert all((value[name] == leaf).all() for name, leaf in policy.items())
    run, target = str(tmp_path / "run"), str(tmp_path / "value")
    assert export(["--run", run, "--to", target, "--format", "reward", "--role", "value"]) == 0


def test_one_setting_trains_all_roles_whole(tmp_path):
    """And a policy that starts from LoRA pairs is, whole, what they were."""
    settings = {
        "run_dir": str(tmp_path / "run"), "model": MODEL, "adapter": {"kind": "full"},
        "sft": {"data": DEMONSTRATIONS, "adapter": FEW, "batch_size": 4, "max_length": 64, "evaluation": {"heldout": 0},
                "optimizer": {"learning_rate": 0.02}},
        "reward_model": {"data": {"path": "builtin:assistant-preferences", "limit": 20}, "batch_size": 4,
                         "max_length": 48, "buckets": 1},
        "ppo": {k: v for k, v in PPO.items() if "adapter" not in k} | {"iterations": 1, "update": ONE_STEP_EACH},
    }  # fmt: skip
    run_stages(RunConfig.model_validate(settings))
    sft = roles(tmp_path / "run", "sft")
    assert all("lora" in name for name in sft)
    for name in ("reward", "policy", "value"):
        whole = roles(tmp_path / "run", name)
        assert "embed_tokens/embedding" in whole and not any("lora" in leaf for leaf in whole), name
    record = lines(tmp_path / "run")[-1]
    assert abs(record["kl/k1"]) < 1e-3, "the whole copy begins where the reference's pairs are"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"resample": 2}, r"ppo\.resample: .*samples_per_prompt"),
        ({"update": {"value_warmup": 3}}, "ppo.update.value_warmup: 3 of 3 iterations"),
        ({"update": {"value_trunk": "policy"}, "advantage": {"estimator": "reinforce"}}, "trunk: .*no value model"),
        ({"update": {"epochs": 1, "minibatches": 1, "kl_stop": 0.1}}, "kl_stop: .*only one"),
        ({"update": {"dual_clip": 3.0, "loss": "pg"}}, r"ppo\.update\.dual_clip: .*loss=pg"),
        ({"update": {"importance_level": "sequence"}}, "importance_level: .*importance_cap"),
        ({"update": {"pretraining_coef": 2.0}}, "pretraining_coef: .*ppo.pretraining.data.path"),
        ({"update": {"value_trunk": "policy"}}, "ppo.value_adapter: .*value_trunk=policy"),
        ({"kl": {"coef": 0.0, "target": 6.0}}, "ppo.kl.target: cannot adapt a ppo.kl.coef of 0"),
        ({"kl": {"target": 6.0, "horizon": 1}, "batch_size": 8}, "ppo.kl.horizon: .*more than 1.6"),
        ({"score": {"overlong_penalty": 1.0, "overlong_buffer": 7}}, "overlong_buffer: is 7 tokens, .*at most 6"),
        ({"advantage": {"estimator": "remax", "whiten_rewards": True}}, "whiten_rewards: .*length"),
        ({"pretraining": {"data": DEMONSTRATIONS, "max_length": 500}}, "ppo.pretraining.max_length: is 500 tokens"),
        ({"pretraining": {"data": {"path": "nowhere.jsonl"}, "max_length": 32}}, "nowhere.jsonl"),
        ({"update": {"microbatch_size": 2}, "pretraining": {"data": DEMONSTRATIONS, "batch_size": 3, "max_length": 32}},
         "ppo.pretraining.batch_size: 3 rows"),
    ],
)  # fmt: skip
def test_contradictions_stop_before_anything_is_compiled(tmp_path, settings, complaint):
    (tmp_path / "reward.py").write_text("def score(completions):\n    return [0.0 for t in completions]\n")
    with pytest.raises(UserError, match=complaint):
        run_stages(config(tmp_path / "run", tmp_path / "reward.py", **{"iterations": 3} | settings))
    assert not (tmp_path / "run").exists()
