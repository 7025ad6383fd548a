"""What samples.jsonl holds of training: texts, scores, and numbers of each token before and after the update."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.stages.run import run_stages

CONFIG = {
    "model": {
        "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
    },
    "stages": ["ppo"],
    "health": {"max_kl": 1e-12},  # the second iteration and those after it make no update
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 5, "batch_size": 8,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "evaluation": {"prompts": 8},
        "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}},
        "gold": "jaxrlhf.toy.world:gold_score", "adapter": {"rank": 2, "target_modules": ["q_proj"]},
        "update": {"epochs": 1, "minibatches": 2, "optimizer": {"learning_rate": 0.01}}, "sample_every": 3,
    },
}  # fmt: skip
BY_TOKEN = ("tokens", "logprobs", "ref_logprobs", "new_logprobs", "values", "advantages")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics, samples and policy of two runs that differ in how often they write samples."""
    found = {}
    for every in (3, 1):
        folder = tmp_path_factory.mktemp("run")
        ppo = CONFIG["ppo"] | {"sample_every": every}
        roles = run_stages(RunConfig.model_validate(CONFIG | {"run_dir": str(folder), "ppo": ppo}))
        metrics, samples = (
            [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
            for name in ("metrics.jsonl", "samples.jsonl")
        )
        found[every] = SimpleNamespace(metrics=metrics, samples=samples, policy=roles.adapters["policy"])
    return found


def test_each_number_is_that_of_its_token(runs):
    *training, last = runs[3].samples
    assert [line["step"] for line in training] == [1, 3, 5], "every third, the first and the last"
    for line in training:
        metrics = runs[3].metrics[line["step"] - 1]
        assert len(line["scores"]) == len(line["samples"]) == 8
        assert np.mean(line["scores"]) == pytest.approx(metrics["reward/score"], abs=1e-4)
        assert [sample["score"] for sample in line["samples"]] == line["scores"]
        gold = [sample["gold"] for sample in line["samples"]]
        assert np.mean(gold) == pytest.approx(metrics["reward/gold"], abs=1e-4)
        for sample in line["samples"]:
            assert "".join(sample["tokens"]) == sample["completion"]
            assert len({len(sample[name]) for name in BY_TOKEN}) == 1
        kl = [np.sum(np.subtract(sample["logprobs"], sample["ref_logprobs"])) for sample in line["samples"]]
        assert np.mean(kl) == pytest.approx(metrics["kl/k1"], abs=1e-3)
        values = np.concatenate([sample["values"] for sample in line["samples"]])
        assert values.mean() == pytest.approx(metrics["value/mean"], abs=1e-4)
        advantages = np.concatenate([sample["advantages"] for sample in line["samples"]])
        assert advantages.mean() == pytest.approx(0, abs=1e-3) and advantages.std() == pytest.approx(1, abs=0.02)
    for record in (*last["before"], *last["after"]):
        assert "".join(record["tokens"]) == record["completion"] and "new_logprobs" not in record


def test_new_logprobs_are_those_after_the_update(runs):
    moved, still = (
        [np.subtract(sample["new_logprobs"], sample["logprobs"]) for sample in runs[3].samples[i]["samples"]]
        for i in (0, 1)
    )
    assert max(np.abs(change).max() for change in moved) > 1e-3
    assert all((change == 0).all() for change in still), "this iteration made no update"


def test_samples_change_nothing_and_compile_nothing(runs):
    often, rarely = runs[1], runs[3]
    for path, leaves in often.policy.items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, rarely.policy[path][name])
    for run in runs.values():
        assert all(x == 1 for line in run.metrics for name, x in line.items() if name.startswith("compiles/"))
        written = {line["step"] for line in run.samples}
        assert {line["step"] for line in run.metrics if "time/samples" in line} == written
