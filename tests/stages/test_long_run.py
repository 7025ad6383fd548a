"""An iteration of PPO on sequences of 384 tokens whose positions are split, against one device."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

RUN = '''
import json, sys
from jaxrlhf.config import RunConfig
from jaxrlhf.models import attention
from jaxrlhf.stages.run import run_stages

attention.LONGEST_WHOLE = 128  # attention is computed in blocks
few = {"rank": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]}
run_stages(RunConfig.model_validate({
    "run_dir": sys.argv[1], "mesh": json.loads(sys.argv[2]), "stages": ["ppo"],
    "model": {"new": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 64,
                      "max_positions": 384}},
    "ppo": {
        "data": {"path": sys.argv[3]}, "iterations": 1, "batch_size": 4, "max_prompt_tokens": 256,
        "sampling": {"max_new_tokens": 128, "prefill_chunk": 64}, "adapter": few, "value_adapter": few,
        "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 50}},
        "update": {"epochs": 1, "minibatches": 2, "microbatch_size": 2, "remat": "full",
                   "optimizer": {"learning_rate": 0.003}, "value_optimizer": {"learning_rate": 0.003}},
        "evaluation": {"every": None, "prompts": 4}, "sample_every": 1,
    },
}))
'''


def test_context_learns_what_one_device_does(processes, tmp_path):
    generator, words = np.random.default_rng(0), ("cat", "blue", "black", "capital")
    lengths = generator.integers(75, 250, 4)
    rows = [{"prompt": " ".join(generator.choice(words, length))} for length in lengths]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, mesh, devices in (("one", {}, 1), ("context", {"data": 2, "context": 4}, 8)):
        processes.run("-c", RUN, tmp_path / name, json.dumps(mesh), tmp_path / "prompts.jsonl", devices=devices)
    names = ("one", "context")
    one, split = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in names)
    assert one["length/mean"] > 50 and one["policy/first_ratio_error"] < 1e-5 > split["policy/first_ratio_error"]
    for metric in ("length/mean", "reward/score", "kl/k1", "policy/loss", "value/loss", "gap/logprob_max"):
        assert split[metric] == pytest.approx(one[metric], abs=1e-5), metric
    for role in ("policy", "value"):
        alone, found = (load_file(tmp_path / name / "roles" / role / "adapter.safetensors") for name in names)
        for leaf, values in alone.items():
            np.testing.assert_allclose(found[leaf], values, atol=1e-5, rtol=0, err_msg=f"{role} {leaf}")
        assert max(np.abs(values).max() for leaf, values in alone.items() if leaf.endswith("lora_b")) > 0.002
