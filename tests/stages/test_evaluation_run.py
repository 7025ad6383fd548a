"""Whole runs with evaluation while training: it changes no weight and compiles nothing again; resumes are exact."""

import json

import numpy as np
import pytest

from jaxrlhf.algorithms.losses import pairwise_loss
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.stages.reward_model import measured
from jaxrlhf.stages.run import run_stages
from jaxrlhf.tracking.metrics import MetricsLog

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
PASSING = ("seconds", "time", "memory/", "tokens_per_second/", "compiles/")
NO_BETTER = {"metric": "evaluation/kl/k1", "mode": "lowest", "min_delta": 1e6}  # than the first
FALLS = {"schedule": "plateau", "plateau": NO_BETTER | {"patience": 1}}
CONFIG = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
    },
    "adapter": FEW,
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 120}, "batch_size": 4, "max_length": 64,
        "save_every": 4, "evaluation": {"heldout": 8}, "optimizer": {"learning_rate": 0.01},
    },
    "reward_model": {
        "data": {"path": "builtin:assistant-preferences", "limit": 60}, "batch_size": 8, "max_length": 48, "buckets": 1,
        "save_every": 4, "evaluation": {"heldout": 6}, "optimizer": {"learning_rate": 0.01},
    },
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 30}, "max_prompt_tokens": 16, "iterations": 7,
        "batch_size": 4, "sampling": {"max_new_tokens": 6}, "gold": "jaxrlhf.toy.world:gold_score", "save_every": 3,
        "sample_every": 100, "evaluation": {"prompts": 6},
        "update": {"minibatches": 1, "epochs": 2, "optimizer": {"learning_rate": 0.01}},
    },
}  # fmt: skip
EVERY = {"sft": 2, "reward_model": 3, "ppo": 2}


def config(folder, every=None, **ppo):
    stages = {name: CONFIG[name] for name in EVERY}
    stages["ppo"] = stages["ppo"] | ppo
    for name, steps in (every or {}).items():
        stages[name] = stages[name] | {"evaluation": stages[name]["evaluation"] | {"every": steps}}
    return RunConfig.model_validate(CONFIG | stages | {"run_dir": str(folder)})


def lines(folder, stage, log="metrics"):
    found = [json.loads(line) for line in (folder / f"{log}.jsonl").read_text().splitlines()]
    found = [line for line in found if line["stage"] == stage]
    return [{k: v for k, v in line.items() if not k.startswith(PASSING)} for line in found]


def weights(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("roles/*/adapter.safetensors")}


@pytest.mark.slow
def test_evaluations_change_no_weight_and_compile_nothing_again(tmp_path, monkeypatch):
    plain, evaluated, programs = tmp_path / "plain", tmp_path / "evaluated", {}
    run_stages(config(plain))
    call = Program.__call__

    def noted(self, *args, **kwargs):
        programs.setdefault(self.name, set()).add(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Program, "__call__", noted)
    run_stages(config(evaluated, EVERY))
    assert weights(plain) == weights(evaluated) != {}
    assert {"sft_evaluate", "pair_scores", "rollout", "annotate", "experience", "update"} <= set(programs)
    assert {name: [p.compiles for p in some] for name, some in programs.items()} == {name: [1] for name in programs}
    finished = json.loads((evaluated / "roles" / "finished.json").read_text())
    assert finished == json.loads((plain / "roles" / "finished.json").read_text())
    for stage, every in EVERY.items():
        before, after = lines(plain, stage), lines(evaluated, stage)
        values = {line["step"]: {k: v for k, v in line.items() if k.startswith("evaluation/")} for line in after}
        assert [{k: v for k, v in line.items() if not k.startswith("evaluation/")} for line in after] == before
        total = len(after)
        assert [step for step in values if values[step]] == [*range(every, total, every), total]
        last = {name.removeprefix("evaluation/"): value for name, value in values[total].items()}
        if stage == "ppo":
            assert last == finished["ppo"]["after"]
        elif stage == "sft":
            loss = finished["sft"]["heldout_loss"]
            assert last == {"sft/loss": loss, "sft/perplexity": pytest.approx(np.exp(loss))}
        else:
            assert {name.replace("reward_model/", "heldout_"): value for name, value in last.items()} == {
                name: value for name, value in finished[stage].items() if name.removeprefix("heldout_") in
                ("accuracy", "loss", "margin", "calibration_error")
            }  # fmt: skip
    *during, last = [line["evaluation"] for line in lines(evaluated, "ppo", "samples") if "evaluation" in line]
    prompts = [sample["prompt"] for sample in last["samples"]]
    assert during and all([sample["prompt"] for sample in one["samples"]] == prompts for one in during)
    assert np.mean(last["scores"]) == pytest.approx(finished["ppo"]["after"]["reward/score"], abs=1e-4)
    (first, *_) = lines(evaluated, "reward_model", "samples")
    assert sum(row["pairs"] for row in first["calibration"]) == len(first["margins"]) == 6


@pytest.mark.slow
def test_kills_change_neither_rates_nor_the_step_at_which_a_stage_ends(tmp_path, monkeypatch):
    settings = {
        "early_stopping": NO_BETTER | {"patience": 2},
        "update": CONFIG["ppo"]["update"] | {
            "optimizer": FALLS | {"learning_rate": 0.01}, "value_optimizer": FALLS | {"learning_rate": 0.02}
        },
    }  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_stages(config(straight, EVERY, **settings))
    write = MetricsLog.write
    for step in (3, 5):

        def interrupt(self, stage, number, values, step=step):
            write(self, stage, number, values)
            if (stage, number) == ("ppo", step) and "metrics" in self._path.name:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_stages(config(killed, EVERY, **settings))
    run_stages(config(killed, EVERY, **settings))
    assert weights(straight) == weights(killed) != {}
    for log in ("metrics", "samples"):
        assert lines(straight, "ppo", log) == lines(killed, "ppo", log)
    last = lines(straight, "ppo")[-1]
    assert last["step"] == 6, "two evaluations after the first are no better"
    names = ("optimizer/learning_rate", "optimizer/value_learning_rate")
    rates = [tuple(line[name] for name in names) for line in lines(straight, "ppo")]
    assert rates == [pytest.approx((0.01 * half, 0.02 * half)) for half in (1, 1, 1, 1, 0.5, 0.5)]
    files = [(folder / "roles" / "finished.json").read_text() for folder in (straight, killed)]
    assert files[0] == files[1] and json.loads(files[0])["ppo"]["stopped_early"]["best_step"] == 2


def test_the_reward_models_measures():
    """The loss is that of training; the calibration error of known bins is known."""
    chosen, rejected, margin = np.random.default_rng(0).standard_normal((3, 50))
    rejected[:3] = chosen[:3]
    found = measured(chosen, rejected, margin, 0.05).metrics
    loss, accuracy = pairwise_loss(chosen, rejected, margin, 0.05, np.ones(50))
    assert found["reward_model/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert found["reward_model/accuracy"] == pytest.approx(float(accuracy) + 1.5 / 50), "a tie counts half"
    assert found["reward_model/margin"] == pytest.approx((chosen - rejected).mean())

    def logit(p):
        return np.log(p / (1 - p))

    # Two bins: 4 pairs of confidence 0.62, 3 of them right; 6 pairs of confidence 0.91, 3 right.
    difference = np.array([1, 1, 1, -1]) * logit(0.62), np.array([1, 1, 1, -1, -1, -1]) * logit(0.91)
    evaluated = measured(np.concatenate(difference), np.zeros(10), np.zeros(10), 0.0)
    error = 0.4 * abs(0.75 - 0.62) + 0.6 * abs(0.5 - 0.91)
    assert evaluated.metrics["reward_model/calibration_error"] == pytest.approx(error)
    low, high = evaluated.record["calibration"]
    assert low == {"confidence": pytest.approx(0.62), "accuracy": 0.75, "pairs": 4}
    assert high == {"confidence": pytest.approx(0.91), "accuracy": 0.5, "pairs": 6}
