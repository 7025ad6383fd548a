"""A whole run, killed twice and continued, against one that nothing interrupted."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
CONFIG = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
    },
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 120}, "adapter": {"kind": "full"},
        "batch_size": 8, "max_length": 64, "evaluation": {"heldout": 4}, "save_every": 2,
    },
    "reward_model": {
        "data": {"path": "builtin:assistant-preferences", "limit": 40}, "adapter": FEW, "batch_size": 8,
        "max_length": 48, "buckets": 1, "evaluation": {"heldout": 4}, "save_every": 2,
    },
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 4, "batch_size": 8,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": FEW, "kl": {"target": 0.001},
        "update": {"epochs": 2, "minibatches": 2}, "gold": "jaxrlhf.toy.world:gold_score", "evaluation": {"prompts": 8},
        "save_every": 2, "sample_every": 1,
    },
}  # fmt: skip

# Runs until the line of one step is in the metrics and the checkpoint before it on disk; then kills itself.
KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from jaxrlhf.config import RunConfig
from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.stages.run import run_stages

config, stage, step, saved = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
write = MetricsLog.write

def write_and_die(self, *place, **kwargs):
    write(self, *place, **kwargs)
    if place[:2] == (stage, step) and "seconds" in place[2]:
        checkpoint = Path(config["run_dir"], "checkpoints", stage, str(saved))
        for _ in range(600):
            if checkpoint.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)

MetricsLog.write = write_and_die
run_stages(RunConfig.model_validate(config))
"""


def kill(processes, config, stage, step, saved):
    """Runs in another process that is killed after `step`, with the checkpoint of step `saved` the latest."""
    processes.run("-c", KILLED, json.dumps(config), stage, step, saved, status=-signal.SIGKILL)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def lasting(record):
    """A line of metrics without what clocks and memory say."""
    passing = ("seconds", "time", "tokens_per_second/", "memory/")
    return {name: x for name, x in record.items() if not name.startswith(passing)}


@pytest.fixture(scope="module")
def runs(processes, tmp_path_factory):
    """Folders and settings of both runs, what run_stages gave at the end of each, and the metrics at the last kill."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: {**CONFIG, "run_dir": str(folder / name)} for name in ("straight", "killed")}
    settings = {name: RunConfig.model_validate(config) for name, config in configs.items()}
    with ThreadPoolExecutor(1) as beside:  # the other process works while this one does
        killed = configs["killed"]
        kills = beside.submit(lambda: [kill(processes, killed, stage, 3, saved=2) for stage in ("sft", "ppo")])
        roles = {"straight": run_stages(settings["straight"])}
        kills.result()
    broken = lines(folder / "killed", "metrics.jsonl")
    roles["killed"] = run_stages(settings["killed"])
    return SimpleNamespace(
        straight=folder / "straight", killed=folder / "killed", settings=settings, roles=roles, broken=broken
    )


def test_killed_and_continued_is_bit_identical(runs):
    files = ["roles/base/model.safetensors"]
    files += [f"roles/{name}/adapter.safetensors" for name in ("reward", "policy", "value")]
    for file in files:
        straight, killed = ((folder / file).read_bytes() for folder in (runs.straight, runs.killed))
        assert straight == killed, file
    policy, reward = (runs.straight / file for file in (files[2], files[1]))
    assert policy.read_bytes() != reward.read_bytes()
    assert (runs.straight / "roles/finished.json").read_text() == (runs.killed / "roles/finished.json").read_text()


def test_no_line_of_the_logs_is_lost_or_doubled(runs):
    assert (runs.broken[-1]["stage"], runs.broken[-1]["step"]) == ("ppo", 3)  # one step after the checkpoint
    for name in ("metrics.jsonl", "samples.jsonl"):
        straight, killed = ([lasting(x) for x in lines(folder, name)] for folder in (runs.straight, runs.killed))
        assert straight == killed, name
    places = [(x["stage"], x["step"]) for x in lines(runs.straight, "metrics.jsonl")]
    steps = {stage: [step for s, step in places if s == stage] for stage in ("sft", "reward_model", "ppo")}
    assert [stage for stage, _ in places] == [stage for stage, numbers in steps.items() for _ in numbers]
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in steps.values())
    assert len(steps["sft"]) > 3 and len(steps["reward_model"]) > 3 and len(steps["ppo"]) == 4


def test_every_program_is_compiled_once(runs):
    for record in [*runs.broken, *lines(runs.straight, "metrics.jsonl"), *lines(runs.killed, "metrics.jsonl")]:
        counts = {name: x for name, x in record.items() if name.startswith("compiles/")}
        wanted = {"rollout", "annotate", "experience", "update"} if record["stage"] == "ppo" else {"update"}
        assert counts == {f"compiles/{name}": 1 for name in wanted}, record


def test_the_metrics_of_ppo_are_those_of_the_contract(runs):
    for record in lines(runs.straight, "metrics.jsonl"):
        assert "seconds" in record and "optimizer/grad_norm" in record
        if record["stage"] != "ppo":
            continue
        assert set(record) >= {
            "reward/score", "reward/gold", "reward/shaped", "kl/k1", "kl/coef", "policy/loss", "policy/entropy",
            "policy/approx_kl", "policy/clip_low", "policy/clip_high", "policy/first_ratio_error", "value/loss",
            "value/clip", "value/explained_variance", "length/mean", "length/eos_share", "gap/logprob_max",
            "gap/logprob_mean", "time/rollout", "time/reward", "time/annotate", "time/update",
            "tokens_per_second/rollout", "compiles/rollout", "compiles/annotate", "compiles/experience",
            "compiles/update", "memory/peak_bytes", "optimizer/grad_norm",
        }  # fmt: skip
        assert record["policy/first_ratio_error"] < 1e-5 and record["gap/logprob_max"] < 1e-5
    coefficients = [x["kl/coef"] for x in lines(runs.straight, "metrics.jsonl") if x["stage"] == "ppo"]
    assert len(set(coefficients)) > 1  # the adaptive coefficient is part of what is saved


def test_the_base_is_what_sft_left(runs):
    """PPO and the reward model write no byte of it; the run's folder holds the base from before them."""
    stored = named_parameters(load_pretrained(str(runs.straight / "roles/base"))[0])
    for roles in runs.roles.values():
        for name, leaf in named_parameters(roles.base).items():
            assert np.asarray(leaf).tobytes() == np.asarray(stored[name]).tobytes(), name


def test_a_finished_run_does_nothing_again(runs, capfd):
    before = {path: path.read_bytes() for path in runs.straight.rglob("*") if path.is_file()}
    again = run_stages(runs.settings["straight"])
    assert {path: path.read_bytes() for path in runs.straight.rglob("*") if path.is_file()} == before
    assert capfd.readouterr().err.count("already finished") == 3
    for name, adapter in runs.roles["straight"].adapters.items():
        for path, leaves in adapter.items():
            for leaf in leaves:
                np.testing.assert_array_equal(again.adapters[name][path][leaf], leaves[leaf])
