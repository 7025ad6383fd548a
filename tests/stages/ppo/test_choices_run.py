"""A run whose answers are labels: it learns them, samples nothing else, and resumes to the same bits."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.config import RunConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.run import run_stages

MODEL = {
    "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
}
LABELS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack quack", "hen": "quack"}
PPO = {
    "batch_size": 20, "max_prompt_tokens": 8, "save_every": 4, "evaluation": {"prompts": 20},
    "sampling": {"choices": sorted(set(LABELS.values())), "max_new_tokens": 3, "samples_per_prompt": 4},
    "advantage": {"estimator": "rloo"}, "kl": {"coef": 0.0},
}  # fmt: skip
UPDATE = {"epochs": 2, "minibatches": 2, "optimizer": {"learning_rate": 0.01}}
REWARD = """
from pathlib import Path
here = Path(__file__).parent
def score(completions, label, **rest):
    calls = here / 'calls'
    if (here / 'down').exists() and len(calls.read_text()) >= 7:
        raise ConnectionError('no answer')
    calls.open('a').write('x')
    assert {text.strip() for text in completions} <= {'moo', 'woof', 'meow', 'quack', 'quack quack'}, completions
    return [float(text.strip() == wanted) for text, wanted in zip(completions, label)]
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    (folder / "reward.py").write_text(REWARD)
    (folder / "calls").write_text("")
    rows = [json.dumps({"prompt": f"the {animal} says", "label": label}) for animal, label in LABELS.items()]
    (folder / "rows.jsonl").write_text("\n".join(rows * 4) + "\n")

    def run(name, iterations=12, **ppo):
        reward = {"kind": "function", "function": f"{folder / 'reward.py'}:score"}
        section = {"data": {"path": str(folder / "rows.jsonl")}, "reward": reward, "iterations": iterations}
        section |= PPO | {"update": UPDATE} | ppo
        run_stages(RunConfig.model_validate(
            {"run_dir": str(folder / name), "model": MODEL, "stages": ["ppo"], "ppo": section,
             "adapter": {"kind": "full"}}
        ))  # fmt: skip
        return folder / name

    run.folder = folder
    return run


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_labels_are_learnt_and_a_resumed_run_has_the_same_bits(start):
    down = start.folder / "down"
    down.touch()
    with pytest.raises(RewardFault):
        start("broken")
    down.unlink()
    resumed, straight = start("broken"), start("straight")
    records = lines(straight)
    scores = [record["reward/score"] for record in records]
    assert scores[0] < 0.5 and np.mean(scores[-3:]) > 0.9, scores
    for record in records:
        assert record["policy/first_ratio_error"] < 1e-5 and record["gap/logprob_max"] < 1e-5
        assert record["length/eos_share"] == 1 and record["policy/entropy"] < np.log(4)
        assert {name: n for name, n in record.items() if name.startswith("compiles/") and n != 1} == {}
    texts = {sample["completion"].strip() for line in lines(straight, "samples") for sample in line.get("samples", ())}
    assert texts <= set(LABELS.values()) and len(texts) > 1
    one, other = (
        {name: x for file in (run / "roles" / "policy").glob("*.safetensors") for name, x in load_file(file).items()}
        for run in (resumed, straight)
    )
    assert one
    assert one.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_settings_that_contradict_choices_are_refused(start):
    refused = (
        ({"update": {"mask_truncated": True}}, "ppo.update.mask_truncated: has no effect with ppo.sampling.choices"),
        ({"score": {"missing_eos_penalty": 1.0}}, "ppo.score.missing_eos_penalty: has no effect"),
        ({"sampling": PPO["sampling"] | {"max_new_tokens": 2}}, "ppo.sampling.max_new_tokens: is 2, but the choice"),
    )
    for settings, message in refused:
        with pytest.raises(UserError, match=message):
            start("refused", **settings)
    assert not (start.folder / "refused").exists()
