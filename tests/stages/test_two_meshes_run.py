"""PPO that samples on some of eight virtual devices and learns on the others, against one mesh of all of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

CHOICES = {"choices": ["a cow", "a dog", "a duck", "a"], "max_new_tokens": 3}
MESHES = {
    "one": {},
    "two": {"rollout": {"fsdp": 2, "tensor": 2}, "update": {"data": 4}},
    "uneven": {"rollout": {"tensor": 2}, "update": {"data": 2, "fsdp": 3}},
}
MESHES |= {f"{name}, choices": MESHES[name] for name in ("one", "two")}

RUNS = '''
import json, sys
from pathlib import Path
import jax
from jaxrlhf.config import RunConfig
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.run import run_stages

folder = Path(sys.argv[1])
(folder / "reward.py").write_text(f"""
from pathlib import Path
here, calls = Path({str(folder)!r}), []
def score(completions):
    calls.append(1)
    if (here / 'down').exists() and len(calls) >= 4:
        raise ConnectionError('no answer')
    return [len(text) / 20 + text.count('e') / 3 for text in completions]
""")

def run(name, mesh):
    few = {"rank": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    run_stages(RunConfig.model_validate({
        "run_dir": str(folder / name), "mesh": mesh, "stages": ["ppo"],
        "model": {"new": {"hidden_size": 64, "layers": 1, "heads": 8, "kv_heads": 8, "intermediate_size": 64,
                          "max_positions": 64}},
        "ppo": {
            "data": {"path": "builtin:assistant-prompts", "limit": 40}, "iterations": 4, "batch_size": 24, "async": 1,
            "max_prompt_tokens": 16, "adapter": few,
            "sampling": CHOICES if "choices" in name else {"max_new_tokens": 6}, "value_adapter": few,
            "reward": {"kind": "function", "function": f"{folder}/reward.py:score"},
            "update": {"epochs": 1, "minibatches": 2, "optimizer": {"learning_rate": 0.003},
                       "value_optimizer": {"learning_rate": 0.003}},
            "evaluation": {"prompts": 16}, "save_every": 100, "sample_every": 1},
    }))

devices = {}
class Watched(ppo.Iteration):
    def __call__(self, *given):
        result = super().__call__(*given)
        state, _, experience = result
        trees = {"rollout": [self.sampler.base, state.behind], "update": [self.roles.base, state.ppo, experience]}
        for part, tree in trees.items():
            devices[part] = sorted({device.id for leaf in jax.tree.leaves(tree) for device in leaf.devices()})
        return result
ppo.Iteration = Watched

meshes, CHOICES = map(json.loads, sys.argv[2:])
for name, mesh in meshes.items():
    run(name, mesh)
    (folder / name / "devices.json").write_text(json.dumps(devices))
(folder / "down").touch()
try:
    run("broken", meshes["two"])
except RewardFault:
    (folder / "down").unlink()
run("broken", meshes["two"])
'''


@pytest.fixture(scope="module")
def folder(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = processes.run("-c", RUNS, folder, json.dumps(MESHES), json.dumps(CHOICES), devices=8)
    assert "resumes after step" in done.errors
    return folder


def lines(run, name):
    records = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def texts(run):
    samples = [x for line in lines(run, "samples.jsonl") for x in line.get("samples", [])]
    assert len(samples) > 16
    return [(x["completion"], x["tokens"], x["score"]) for x in samples]


def weights(run):
    return {role: load_file(run / "roles" / role / "adapter.safetensors") for role in ("policy", "value")}


@pytest.mark.parametrize("name", ["two", "uneven", "two, choices"])
def test_two_meshes_learn_what_one_does(folder, name):
    one, two = folder / name.replace("two", "one").replace("uneven", "one"), folder / name
    assert texts(one) == texts(two), "tokens and scores"
    if "choices" in name:
        assert {text.strip() for text, *_ in texts(two)} <= {*CHOICES["choices"]}
    for role, leaves in weights(one).items():
        for leaf, values in leaves.items():
            np.testing.assert_allclose(weights(two)[role][leaf], values, atol=1e-5, rtol=0, err_msg=f"{role} {leaf}")
    assert max(np.abs(x).max() for leaf, x in weights(one)["policy"].items() if leaf.endswith("lora_b")) > 0.003
    for record in lines(two, "metrics.jsonl"):
        assert {record[f"compiles/{program}"] for program in ("rollout", "annotate", "experience", "update")} == {1}
    assert json.loads((one / "devices.json").read_text()) == {"rollout": [*range(8)], "update": [*range(8)]}
    first = 2 if name == "uneven" else 4
    assert json.loads((two / "devices.json").read_text()) == {"rollout": [*range(first)], "update": [*range(first, 8)]}


def test_a_broken_run_on_two_meshes_goes_on_to_the_same_bits(folder):
    for role, leaves in weights(folder / "two").items():
        for leaf, values in leaves.items():
            np.testing.assert_array_equal(weights(folder / "broken")[role][leaf], values, err_msg=f"{role} {leaf}")
    assert texts(folder / "broken") == texts(folder / "two")
