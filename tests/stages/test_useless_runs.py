"""Runs that cannot learn end early, in one line: weights that are not finite, no updates, rewards that do not work."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.cli.train import main

NEW = {"new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32}}
PPO = {
    "data": {"path": "builtin:assistant-prompts", "limit": 16}, "max_prompt_tokens": 16, "iterations": 2,
    "batch_size": 4, "evaluation": {"prompts": 4}, "sampling": {"max_new_tokens": 4},
    "adapter": {"rank": 2, "target_modules": ["q_proj", "down_proj"]}, "update": {"epochs": 1, "minibatches": 1},
}  # fmt: skip
GOOD = "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def give(tmp_path, capsys):
    """`give(config, *overrides)` runs a config; its exit status and its lines on stderr."""
    (tmp_path / "reward.py").write_text(GOOD)
    reward = {"kind": "function", "function": f"{tmp_path / 'reward.py'}:score"}

    def run(*overrides, **config):
        base = {"run_dir": str(tmp_path / "run"), "stages": ["ppo"], "model": NEW, "ppo": PPO | {"reward": reward}}
        (tmp_path / "config.yaml").write_text(json.dumps(base | config))
        status = main(["--config", str(tmp_path / "config.yaml"), *overrides])
        return status, capsys.readouterr().err

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(give, stories260k, value):
    folder = shutil.copytree(stories260k, give.folder / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    status, errors = give(model={"path": str(folder)})
    assert status == 2 and "model.safetensors: tensor model.layers.1.mlp.up_proj.weight has NaN or inf" in errors
    assert not (give.folder / "run").exists()


@pytest.mark.parametrize("setting", ["ppo.update.optimizer.learning_rate=1e30", "ppo.adapter={rank: 2, alpha: 1e38}"])
def test_a_stage_whose_updates_were_all_skipped_fails_and_saves_no_role(give, setting):
    for _ in range(2):  # the same command ends in the same way
        status, errors = give("ppo.adapter={rank: 2}", "ppo.update.epochs=4", setting)
        assert status == 1 and "Traceback" not in errors
        assert "ppo: all 2 steps skipped their updates" in errors.splitlines()[-1]
        assert "goes on" not in errors.splitlines()[-1], "the same command would not help"
        assert not (give.folder / "run" / "roles" / "policy").exists()


def test_weights_become_no_role_if_their_evaluation_is_not_finite(give):
    data = {"path": "builtin:assistant-demonstrations", "limit": 40}
    sft = {"data": data, "batch_size": 36, "max_length": 64, "epochs": 1, "adapter": {"rank": 2}}
    status, errors = give("sft.optimizer.learning_rate=1e36", stages=["sft"], sft=sft)
    assert status == 1 and "sft: heldout_loss of the trained weights is " in errors.splitlines()[-1]
    assert not (give.folder / "run" / "roles" / "sft").exists()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return [1.0]", r"returned shape \(1,\) for 2 completions"),
        ("raise ValueError('no key')", "raised ValueError: no key"),
        ("return [float('nan')] * len(completions)", "returned nan for"),
    ],
)
def test_a_reward_is_called_before_the_first_stage(give, body, what):
    (give.folder / "reward.py").write_text(f"def score(prompts, completions, **columns):\n    {body}\n")
    sft = {"data": {"path": "builtin:assistant-demonstrations", "limit": 40}}
    status, errors = give(stages=["sft", "ppo"], sft=sft)
    *frames, line = errors.splitlines()
    assert status == 2 and line.startswith("error: ppo.reward: the reward failed on the first 2 rows: ")
    assert re.search(what, line) and "Traceback" not in errors
    assert ("line 2, in score" in errors) == ("raise" in body), "the frames of the user's code, and no others"
    assert not any("jaxrlhf/" in frame for frame in frames) and not (give.folder / "run").exists()


@pytest.mark.parametrize(
    ("best", "hint"),
    [("reward/scores", "did you mean reward/score"), ("reward/gold", "only if ppo.gold names a function"),
     ("nothing", "give one of")],
)  # fmt: skip
def test_the_best_checkpoint_is_by_a_metric_that_is_logged(give, best, hint):
    status, errors = give(f"checkpoints.best={best}", "checkpoints.result=best")
    assert status == 2 and f"checkpoints.best: no stage logs '{best}'" in errors and hint in errors
    assert not (give.folder / "run").exists()


def test_a_dead_server_is_found_before_the_first_stage(give):
    reward = {"kind": "http", "url": "http://127.0.0.1:1/score", "retries": 0}
    status, errors = give(ppo=PPO | {"reward": {"kind": "sum", "parts": {"server": reward}}})
    assert status == 2 and "127.0.0.1:1" in errors
    assert "ppo.reward.parts.server: the reward failed on the first 2 rows" in errors
    assert errors.count("Traceback") == 0 and not (give.folder / "run").exists()
