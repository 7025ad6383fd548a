"""Runs with an environment: what an episode of one turn gives, resuming, and what does not work together."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.cli.evaluate import evaluate, parse
from jaxrlhf.config import PPOStageConfig, RunConfig
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.stages.run import run_stages

MODEL = {
    "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
}
FEW = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
RATE = {"learning_rate": 0.05}
PPO = {
    "iterations": 4, "batch_size": 8, "max_prompt_tokens": 8, "sampling": {"max_new_tokens": 3}, "adapter": FEW,
    "value_adapter": FEW, "evaluation": {"prompts": 8, "every": 2}, "save_every": 2, "sample_every": 2,
    "update": {"epochs": 1, "minibatches": 2, "optimizer": RATE, "value_optimizer": RATE},
}  # fmt: skip
WORDS = """
import zlib
from pathlib import Path

here = Path(__file__).parent


def worth(text):
    return zlib.crc32(text.encode()) % 1000 / 1000


def score(completions, **columns):
    return [worth(text) for text in completions]


class Once:
    def reset(self, seed=None, options=None):
        return options["prompt"], {}

    def step(self, action):
        return "thanks", worth(action), True, False, {"is_success": worth(action) > 0.5}


class Animals:
    'Wants a word of a class; fails if its seed is a multiple of 5, and always once the file down is there.'

    def reset(self, seed=None, options=None):
        calls = here / "calls"
        if (here / "down").exists() and len(calls.read_text()) >= 33:
            raise ConnectionError("no answer")
        calls.open("a").write("x")
        self.seed, self.turns = seed, 0
        return ["the cow", "the dog says", "a cat"][seed % 3], {}

    def step(self, action):
        if self.seed % 5 == 0:
            raise RuntimeError("a multiple of 5")
        self.turns += 1
        right = any(word.startswith("s") for word in action.split())
        return "no , it says", float(right) + worth(action) / 10, right, False, {"success": right}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environments")
    (folder / "words.py").write_text(WORDS)
    (folder / "calls").write_text("")
    rows = [json.dumps({"prompt": f"the {animal} says"}) for animal in ("cow", "dog", "cat", "duck", "hen")]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def run(name, factory=None, turns=1, **ppo):
        if factory is not None:
            environment = {"factory": f"{folder / 'words.py'}:{factory}", "max_turns": turns}
            ppo["environment"] = environment | ppo.get("environment", {})
        config = {"run_dir": str(folder / name), "model": MODEL, "stages": ["ppo"], "ppo": PPO | ppo}
        run_stages(RunConfig.model_validate(config))
        return folder / name

    run.folder = folder
    return run


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


_OF_THE_MACHINE = ("time", "seconds", "tokens_per_second", "memory")


def metrics(folder, *without):
    kept = [{k: v for k, v in line.items() if k.split("/")[0] not in _OF_THE_MACHINE} for line in lines(folder)]
    return [{k: v for k, v in line.items() if not k.removeprefix("evaluation/").startswith(without)} for line in kept]


def same_weights(one, other):
    files = sorted(one.glob("roles/*/adapter.safetensors"))
    assert len(files) == 2
    for file in files:
        here, there = load_file(file), load_file(other / file.relative_to(one))
        assert all(np.array_equal(here[name], there[name]) for name in here), file


def test_an_episode_of_one_turn_gives_the_bits_of_a_completion(start):
    """Metrics, samples and weights of a run with a function that gives the same reward."""
    data = {"data": {"path": str(start.folder / "rows.jsonl")}}
    function = {"kind": "function", "function": f"{start.folder / 'words.py'}:score"}
    completions = start("completions", reward=function, **data)
    episodes = start("episodes", "Once", **data)
    assert metrics(completions, "reward/abstained") == metrics(episodes, "environment")
    same_weights(completions, episodes)
    last = lines(episodes)[-1]
    assert last["environment/turns"] == 1 and last["environment/return"] == pytest.approx(last["reward/score"])
    assert {"environment/success", "evaluation/environment/success"} <= set().union(*lines(episodes))
    for record, other in zip(lines(completions, "samples"), lines(episodes, "samples"), strict=True):
        for sample, episode in zip(record.get("samples", []), other.get("samples", []), strict=True):
            sides = [turn["role"] for turn in episode.pop("conversation")]
            assert sides == ["environment", "policy", "environment"]
            assert sample == episode


SETTINGS = {"turns": 3, "score": {"normalise": "running"}, "advantage": {"gamma": 0.9, "gamma_per": "turn"}}


@pytest.fixture(scope="module")
def whole(start):
    return start("whole", "Animals", **SETTINGS)


def test_a_run_that_ends_goes_on_to_the_same_bits(start, whole):
    """Rewards of turns, failures and running normalisation included."""
    (start.folder / "calls").write_text("")
    (start.folder / "down").touch()
    with pytest.raises(Fault, match=r"all 8 episodes of a rollout failed.*no answer"):
        start("ended", "Animals", **SETTINGS)
    reached = len(lines(start.folder / "ended"))
    assert reached == 3, "one iteration after the last checkpoint"
    (start.folder / "down").unlink()
    ended = start("ended", "Animals", **SETTINGS)
    without = ("compiles",)
    assert metrics(whole, *without) == metrics(ended, *without)
    same_weights(whole, ended)
    assert lines(whole, "samples")[-1]["after"] == lines(ended, "samples")[-1]["after"]
    seen = lines(whole)
    assert any(line["environment/failed"] > 0 for line in seen)
    assert all(line["gap/logprob_max"] < 1e-5 for line in seen), "sampled turn by turn, scored in one pass"
    assert any(line["environment/turns"] > 1 for line in seen)
    assert {line["compiles/update"] for line in seen} == {1}


def test_evaluate_plays_the_same_episodes_with_every_role(whole, tmp_path, capsys):
    """Ten episodes in batches of eight; failed ones are left out; the same command gives the same."""
    options = ["--run", str(whole), "--limit", "10", "--resamples", "50"]
    reports = []
    for name in ("one", "two"):
        files = ["--json", str(tmp_path / f"{name}.json"), "--samples", str(tmp_path / f"{name}.jsonl")]
        evaluate(parse([*options, *files]))
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert reports[0] == reports[1] and reports[0]["prompts"]["rows"] == 10
    records = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    for role in ("base", "policy"):
        found = reports[0]["roles"][role]
        answers = [record["answers"][role] for record in records]
        kept = [answer for answer in answers if not answer["environment/failed"]]
        assert 0 < len(kept) < 10
        for metric in ("environment/success", "environment/turns", "environment/return"):
            mean = np.mean([answer[metric] for answer in kept])
            assert found[metric]["value"] == pytest.approx(mean) and found[metric]["low"] <= mean
    assert all(record["prompt"] in ("the cow", "the dog says", "a cat") for record in records)
    with pytest.raises(UserError, match=r"--task: is about completions of prompts, but the run has an environment"):
        evaluate(parse([*options, "--task", "exact_match"]))


DATA = {"data": {"path": "builtin:assistant-prompts"}}
REFUSED = {
    "reward": ({"reward": {"kind": "function", "function": "m:f"}}, "leave reward out"),
    "data is missing": ({"environment": None}, "data is missing; give prompts"),
    "evaluation": ({"evaluation": DATA}, "evaluation.data gives rows"),
    "curriculum": (DATA | {"success_curriculum": {}}, "success_curriculum orders prompts"),
}
UNFIT = {
    "async": {"async": 1}, "resample": {"resample": 1}, "sampling.choices": {"sampling": {"choices": ["a", "b"]}},
    "gold": {"gold": "m:f"}, "advantage.estimator": {"advantage": {"estimator": "remax"}},
    "score.overlong_penalty": {"score": {"overlong_penalty": 1.0, "overlong_buffer": 2}},
    "data.streaming": {"data": {"path": "x.jsonl", "streaming": True}}, "overflow": {"overflow": "drop"},
    "data.curriculum": {"data": {"path": "x.jsonl", "curriculum": "level"}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_contradict_each_other(name):
    settings, line = REFUSED[name]
    with pytest.raises(ValueError, match=line):
        PPOStageConfig.model_validate({"environment": "m:f"} | settings)


@pytest.mark.parametrize("name", UNFIT)
def test_settings_that_do_not_work_with_an_environment(name):
    grouped = {"sampling": {"samples_per_prompt": 2}} | UNFIT[name] if name == "resample" else UNFIT[name]
    config = PPOStageConfig.model_validate({"environment": "m:f"} | grouped)
    with pytest.raises(UserError, match=f"ppo.{name}: with ppo.environment") as error:
        check_algorithm(config)
    assert "\n" not in str(error.value)


def test_the_short_form_and_the_default_length():
    config = PPOStageConfig.model_validate({"environment": "m:f", "sampling": {"max_new_tokens": 5}})
    assert config.environment.factory == "m:f" and config.reward is None
    assert config.response_tokens == 2 * 8 * 5
    once = config.model_copy(update={"environment": config.environment.model_copy(update={"max_turns": 1})})
    assert once.response_tokens == 5
    assert PPOStageConfig.model_validate(config.model_dump(by_alias=True)) == config
