"""Runs with ppo.async: what is sampled with which policy, what is computed, and what a resumed run continues from."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.ppo.iteration import Iteration
from jaxrlhf.stages.ppo.sampler import Sampler
from jaxrlhf.stages.run import run_stages

FEW = {"rank": 2, "target_modules": ["q_proj"]}
MODEL = {
    "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
}
ITERATIONS = 5
PPO = {
    "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": ITERATIONS, "batch_size": 4,
    "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 4}, "adapter": FEW, "value_adapter": FEW,
    "evaluation": {"prompts": 4}, "save_every": 2, "sample_every": 1,
}  # fmt: skip
RATES = {"optimizer": {"learning_rate": 0.05}, "value_optimizer": {"learning_rate": 0.05}}
UPDATE = {"epochs": 1, "minibatches": 2, **RATES}
# Scores of few values, so that groups with equal scores are common. While a file named `down` is there, the reward
# fails when it was called often enough.
REWARD = """
from pathlib import Path
here = Path(__file__).parent
def score(completions, **rest):
    calls = here / 'calls'
    if (here / 'down').exists() and len(calls.read_text()) >= 5:
        raise ConnectionError('no answer')
    calls.open('a').write('x')
    return [float(len(text) % 3) for text in completions]
"""
GROUPS = {
    "resample": 2, "advantage": {"estimator": "grpo"}, "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2},
    "score": {"normalise": "running"}, "refresh_reference": 2, "kl": {"target": 1.0, "horizon": 100},
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "calls").write_text("")

    def run(name, update=UPDATE, **ppo):
        reward = {"kind": "function", "function": f"{tmp_path / 'reward.py'}:score"}
        section = PPO | {"update": update, "reward": reward} | ppo
        run_stages(RunConfig.model_validate({"run_dir": str(tmp_path / name), "model": MODEL, "stages": ["ppo"],
                                             "ppo": section}))  # fmt: skip
        return tmp_path / name

    return run


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def weights(folder):
    files = {role: folder / "roles" / role / "adapter.safetensors" for role in ("policy", "value")}
    return {role: load_file(file) for role, file in files.items() if file.exists()}  # grpo has no value model


@pytest.mark.parametrize("case", [{}, GROUPS], ids=["one completion", "groups"])
def test_without_learning_it_samples_and_scores_what_a_plain_run_does(start, case):
    still = {"epochs": 1, "minibatches": 2, "optimizer": {"learning_rate": 0.0},
             "value_optimizer": {"learning_rate": 0.0}}  # fmt: skip
    plain, behind = start("plain", still, **case), start("behind", still, **case, **{"async": 1})
    samples = [[line.get("samples") for line in lines(run, "samples")] for run in (plain, behind)]
    texts = [[[(s["completion"], s["score"]) for s in of or []] for of in run] for run in samples]
    assert texts[0] == texts[1] and len(texts[0]) == ITERATIONS + 1 and texts[0][0] != texts[0][1]
    for one, other in zip(lines(plain), lines(behind), strict=True):
        for name in ("reward/score", "kl/k1", "kl/coef", "groups/draws", "value/loss", "policy/entropy"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-6), name
        assert other["policy/importance_weight"] == pytest.approx(1, abs=1e-5)


@pytest.fixture
def events(monkeypatch):
    """(iteration, draw, policy that samples it) and (iteration, "update", policy before it), and programs by name."""
    found, programs = [], []
    begin, call, iterate = Sampler.begin, Program.__call__, Iteration.__call__

    def noted_begin(sampler, policy, prompts, draw):
        found.append((draw, jax.device_get(policy)))
        return begin(sampler, policy, prompts, draw)

    def noted_call(program, *args, **kwargs):
        programs.append(program.name)
        return call(program, *args, **kwargs)

    def noted_iteration(iteration, state, step, *rest):
        found.append(("update", jax.device_get(state.ppo.policy)))
        return iterate(iteration, state, step, *rest)

    monkeypatch.setattr(Sampler, "begin", noted_begin)
    monkeypatch.setattr(Program, "__call__", noted_call)
    monkeypatch.setattr(Iteration, "__call__", noted_iteration)
    return found, programs


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("update", [UPDATE, UPDATE | {"minibatches": 1}], ids=["two steps", "one step"])
def test_the_policy_that_samples_is_one_update_behind(start, events, update):
    found, programs = events
    folder = start("behind", update, **{"async": 1})
    policies = [policy for name, policy in found if name == "update"]
    draws = [(draw, policy) for draw, policy in found if draw != "update"]
    assert [draw for draw, _ in draws] == list(range(ITERATIONS)), "each once, and none after the last iteration"
    for draw, policy in draws:
        assert same(policy, policies[max(draw - 1, 0)])
        assert draw < 2 or not same(policy, policies[draw]), "it learns"
    assert programs.count("rollout") == ITERATIONS + 2, "with one evaluation before and one after"
    metrics = lines(folder)
    assert metrics[0]["gap/logprob_max"] < 1e-5 and all(line["gap/logprob_max"] > 1e-3 for line in metrics[1:])
    for line in metrics:
        assert line["policy/first_ratio_error"] < 1e-5, "old logprobs are of the policy before the update"
        assert {line[f"compiles/{name}"] for name in ("rollout", "annotate", "experience", "update")} == {1}
        assert abs(line["policy/importance_weight"] - 1) < 0.5
    known = ("rollout", "annotate", "experience", "update")
    order = [name for name in programs if name in known]
    assert order[:10] == [
        "rollout", "rollout", *known[1:], "annotate",  # the samples that are logged need logprobs after the update
        "rollout", *known[1:],
    ], "the next completions are sampled before the update"  # fmt: skip


@pytest.mark.parametrize("case", [{}, GROUPS], ids=["one completion", "groups"])
def test_a_run_that_a_reward_ends_goes_on_to_the_same_bits(start, tmp_path, case):
    """The reward of an iteration fails while the completions of the next are sampled and the last update runs."""
    (tmp_path / "down").touch()
    with pytest.raises(RewardFault, match="no answer"):
        start("broken", **case, **{"async": 1})
    done = len(lines(tmp_path / "broken"))
    assert 0 < done < ITERATIONS, "the iteration before the failure is logged and saved"
    (tmp_path / "down").unlink()
    broken, straight = (start(name, **case, **{"async": 1}) for name in ("broken", "straight"))
    assert weights(broken).keys() == weights(straight).keys() >= {"policy"}
    for role, leaves in weights(straight).items():
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(weights(broken)[role][leaf], value, err_msg=f"{role} {leaf}")
    kinds = ("reward", "kl", "gap", "policy", "value", "groups")
    both = [[{k: v for k, v in line.items() if k.startswith(kinds)} for line in lines(run)]
            for run in (broken, straight)]  # fmt: skip
    assert both[0] == both[1] and len(both[0]) == ITERATIONS
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines(broken, "samples")] == [
        {k: v for k, v in line.items() if k != "time"} for line in lines(straight, "samples")
    ]
