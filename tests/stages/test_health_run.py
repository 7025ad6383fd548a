"""Whole runs that stop learning: numbers that are not finite, a policy that runs away."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.config import RunConfig
from jaxrlhf.errors import Fault
from jaxrlhf.stages.run import run_stages
from jaxrlhf.tracking.health import Health

pytestmark = pytest.mark.slow

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
RUN = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
    },
    "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 8, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": FEW, "value_adapter": FEW,
        "update": {"epochs": 2, "minibatches": 1, "optimizer": {"learning_rate": 0.05}}, "evaluation": {"prompts": 4},
        "save_every": 1, "sample_every": 100,
    },
}  # fmt: skip

# From the third call on scores whose squares are beyond float32, until the file `well` is there.
SICK = """
from pathlib import Path
here = Path(__file__).parent
def score(completions):
    calls = here / 'calls'
    calls.open('a').write('x' * (len(completions) > 2))  # the trial before training has two rows
    sick = len(calls.read_text()) > 2 and not (here / 'well').exists()
    return [(3e38 if sick else 1.0) * (-1) ** len(text.split()) for text in completions]
"""


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_are_not_finite_are_left_out_counted_and_end_the_run(tmp_path):
    (tmp_path / "sick.py").write_text(SICK)
    reward = {"kind": "function", "function": f"{tmp_path / 'sick.py'}:score"}
    settings = RUN | {"run_dir": str(tmp_path / "run"), "ppo": RUN["ppo"] | {"reward": reward}}
    with pytest.raises(Fault, match=r"ppo: 3 steps in a row made no update.*not finite.*batch\.safetensors"):
        run_stages(RunConfig.model_validate(settings | {"health": {"patience": 3}}))
    records = lines(tmp_path / "run")
    assert [record["optimizer/skipped"] for record in records] == [0, 0, 2, 2, 2]
    batch = load_file(tmp_path / "run" / "inspect" / "ppo-5" / "batch.safetensors")
    assert batch["tokens"].shape == (4, 22) and np.abs(batch["returns"]).max() > 1e38
    # Patience counts on where the checkpoint was made; a run whose trouble is over goes on with sound weights.
    with pytest.raises(Fault, match="4 steps in a row"):
        run_stages(RunConfig.model_validate(settings | {"health": {"patience": 4}}))
    (tmp_path / "well").touch()
    roles = run_stages(RunConfig.model_validate(settings | {"health": {"patience": 6}}))
    assert all(np.isfinite(leaf).all() for leaves in roles.adapters["policy"].values() for leaf in leaves.values())
    assert [record["optimizer/skipped"] for record in lines(tmp_path / "run")][-2:] == [0, 0]


def test_an_iteration_beyond_the_limit_is_not_learnt_from(tmp_path):
    (tmp_path / "reward.py").write_text("def score(completions):\n    return [float(len(t)) for t in completions]\n")
    reward = {"kind": "function", "function": f"{tmp_path / 'reward.py'}:score"}
    settings = RUN | {"run_dir": str(tmp_path / "run"), "ppo": RUN["ppo"] | {"reward": reward, "kl": {"coef": 0.0}}}
    with pytest.raises(Fault, match=r"2 steps in a row .* KL or length"):
        run_stages(RunConfig.model_validate(settings | {"health": {"max_kl": 0.2, "patience": 2}}))
    records = lines(tmp_path / "run")
    assert [record["kl/k1"] > 0.2 for record in records] == [bool(record["health/paused"]) for record in records]
    assert records[0]["health/paused"] == 0 and "policy/loss" in records[0]
    assert records[-1]["health/paused"] == 1 and "policy/loss" not in records[-1]


def test_patience_is_of_steps_in_a_row():
    health = Health(patience=2)
    found = [health.observe({"optimizer/skipped": s, "optimizer/value_skipped": 0.0}) for s in (1, 0, 1, 1)]
    assert found[:3] == [None, None, None] and "not finite" in found[3]
    assert Health(2, in_a_row=1).observe({"health/paused": 1.0}) == "KL or length was above its limit"
