"""Whole runs of PPO on 1, 2, 4 and 8 virtual devices: rows, weights, positions and heads are split, alone and together.

All must draw the same tokens and learn the same weights, and no device may hold more than its share of what is split.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

MESHES = {  # (data, fsdp, context, tensor)
    1: [(1, 1, 1, 1)],
    2: [(2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    4: [(1, 2, 1, 2)],
    8: [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2), (2, 1, 2, 2)],
}
ALONE = (1, 1, 1, 1)

# Run by each process for all its meshes; sizes are multiples of 8, so that every kernel can be split 8 times.
RUNS = '''
import json, sys
import jax
from jaxrlhf.config import RunConfig
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.run import run_stages

def config(folder, data, fsdp, context, tensor):
    few = {"rank": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    return RunConfig.model_validate({
        "run_dir": folder, "stages": ["ppo"],
        "mesh": {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor},
        "model": {"new": {"hidden_size": 64, "layers": 1, "heads": 8, "kv_heads": 8, "intermediate_size": 64,
                          "max_positions": 64}},
        "ppo": {
            "data": {"path": "builtin:assistant-prompts", "limit": 40}, "iterations": 5, "batch_size": 16,
            "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": few, "value_adapter": few,
            "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}},
            "update": {"epochs": 1, "minibatches": 2, "optimizer": {"learning_rate": 0.003},
                       "value_optimizer": {"learning_rate": 0.003}},
            "evaluation": {"prompts": 16}, "save_every": 100, "sample_every": 1},
    })

def held(tree):
    """Bytes by device, and by leaf: (shape, bytes, largest share of a device)."""
    devices, leaves = {}, []
    for leaf in jax.tree.leaves(tree):
        shares = [(shard.device.id, shard.data.nbytes) for shard in leaf.addressable_shards]
        for device, size in shares:
            devices[device] = devices.get(device, 0) + size
        leaves.append((leaf.shape, leaf.nbytes, max(size for _, size in shares)))
    return {"devices": devices, "leaves": leaves}

class Watched(ppo.Iteration):
    def __call__(self, *given):
        result = super().__call__(*given)
        trees = {"base": named_parameters(self.roles.base), "state": result[0].ppo, "experience": result[2]}
        found.update({name: held(tree) for name, tree in trees.items()})
        return result

ppo.Iteration = Watched
for mesh in json.loads(sys.argv[2]):
    found = {}
    folder = f"{sys.argv[1]}/{'x'.join(map(str, mesh))}"
    run_stages(config(folder, *mesh))
    json.dump(found, open(f"{folder}/held.json", "w"))
'''


@pytest.fixture(scope="module")
def folder(processes, tmp_path_factory):
    """A run directory for each mesh, by its name such as 2x2x1x1."""
    folder = tmp_path_factory.mktemp("meshes")
    for count, meshes in MESHES.items():
        processes.run("-c", RUNS, folder, json.dumps(meshes), devices=count)
    return folder


def run_of(folder, mesh):
    return folder / "x".join(map(str, mesh))


def lines(run, name):
    records = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def texts(run):
    """Completion, tokens and score of every sample, in order; logprobs and values may round differently."""
    found = lines(run, "samples.jsonl")
    samples = [x for line in found for kind in ("samples", "before", "after") for x in line.get(kind, [])]
    assert len(samples) > 16
    return [(x["completion"], x.get("tokens"), x["score"]) for x in samples]


OTHERS = [mesh for meshes in MESHES.values() for mesh in meshes if mesh != ALONE]


@pytest.mark.parametrize("mesh", OTHERS, ids=lambda mesh: "x".join(map(str, mesh)))
def test_every_mesh_learns_what_one_device_does(folder, mesh):
    one, other = run_of(folder, ALONE), run_of(folder, mesh)
    assert texts(one) == texts(other), "tokens and scores"
    for role in ("policy", "value"):
        alone, split = (load_file(run / "roles" / role / "adapter.safetensors") for run in (one, other))
        assert alone.keys() == split.keys()
        for leaf, values in alone.items():
            np.testing.assert_allclose(split[leaf], values, atol=1e-5, rtol=0, err_msg=f"{role} {leaf}")
        moved = max(np.abs(values).max() for leaf, values in alone.items() if leaf.endswith("lora_b"))
        assert moved > 0.005, "it learnt"
    for alone, split in zip(lines(one, "metrics.jsonl"), lines(other, "metrics.jsonl"), strict=True):
        for metric in ("kl/k1", "gap/logprob_max", "policy/entropy"):  # made of logprobs
            assert split[metric] == pytest.approx(alone[metric], abs=1e-5), metric
        assert {split[f"compiles/{program}"] for program in ("rollout", "annotate", "experience", "update")} == {1}


@pytest.mark.parametrize("mesh", OTHERS, ids=lambda mesh: "x".join(map(str, mesh)))
def test_no_device_holds_more_than_its_share(folder, mesh):
    data, fsdp, context, tensor = mesh

    def parts(name, shape):
        """In how many parts an array must lie; of a LoRA pair's matrix, whose long side goes with its kernel's, any."""
        if name == "experience":
            return {data * fsdp}
        if len(shape) < 2 or 1 in shape:  # norms, scales, counts, and a value head's one column
            return {1}
        if name == "base":
            return {fsdp * (tensor if shape[0] % tensor == 0 else 1)}  # the vocabulary is no multiple of 4
        return {fsdp, tensor}

    held = json.loads((run_of(folder, mesh) / "held.json").read_text())
    assert held.keys() == {"base", "state", "experience"}
    for name, found in held.items():
        wrong = [leaf for leaf in found["leaves"] if leaf[1] / leaf[2] not in parts(name, leaf[0])]
        assert not wrong, name
        assert len(found["devices"]) == data * fsdp * context * tensor
        assert {*found["devices"].values()} == {sum(share for *_, share in found["leaves"])}, "all hold as much"
    whole, share = (sum(leaf[i] for leaf in held["base"]["leaves"] if leaf[0][0] % tensor == 0) for i in (1, 2))
    assert share < 1.2 * whole / (fsdp * tensor), "nothing large is whole"
