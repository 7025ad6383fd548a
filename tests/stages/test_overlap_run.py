"""What the devices are given before the host asks the reward, and what the host does while they update.

A clock would not tell on a busy machine; the order of events does. The reward here waits until the passes that need no
scores are done: it could not, if they were given to the devices after it.
"""

import json

import jax
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.stages.metric_names import metrics_of
from jaxrlhf.stages.ppo.sampler import Clock, Sampler
from jaxrlhf.stages.run import run_stages
from jaxrlhf.tracking.metrics import MetricsLog

FEW = {"rank": 2, "target_modules": ["q_proj"]}
CONFIG = {
    "model": {
        "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
    },
    "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 2, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 4}, "adapter": FEW, "evaluation": {"prompts": 4},
        "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}},
        "update": {"epochs": 1, "minibatches": 2}, "save_every": 100, "sample_every": 1,
    },
}  # fmt: skip
CASES = {
    "gae": {},
    "remax": {"advantage": {"estimator": "remax"}},
    "resample": {
        "resample": 1, "advantage": {"estimator": "grpo"}, "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2},
    },
}  # fmt: skip


@pytest.fixture
def events(monkeypatch):
    """Programs that are called, rewards that are asked, and so on, in order."""
    found, given = [], {}

    def noting(kind, name, event):
        method = getattr(kind, name)

        def noted(self, *args, **kwargs):
            found.append(event(self, *args))
            result = method(self, *args, **kwargs)
            given[found[-1]] = result
            return result

        monkeypatch.setattr(kind, name, noted)

    def asked(reward, answers):
        if "annotate" in given:
            jax.block_until_ready(given["annotate"])
        return "reward"

    noting(Program, "__call__", lambda program, *_: program.name)
    noting(FunctionReward, "__call__", asked)
    noting(MetricsLog, "write", lambda log, *_: {"samples": "line of samples"}.get(log._path.stem, log._path.stem))
    noting(Completions, "token_texts", lambda *_: "samples")
    noting(Sampler, "prefetch", lambda *_: "prompts")
    noting(Clock, "lap", lambda clock, name, _: name)
    return found


def iterations(events):
    """The events of each iteration, from its rollout to its line of metrics."""
    found, own = [], []
    for event in events[events.index("rollout") :]:  # the first reward is the trial before training
        own.append(event)
        if event == "metrics":
            found.append(own)
            own = []
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_overlaps(tmp_path, events, case):
    config = RunConfig.model_validate(CONFIG | {"run_dir": str(tmp_path), "ppo": CONFIG["ppo"] | CASES[case]})
    run_stages(config)
    first, second = iterations(events)
    for order in (first, second):
        at = order.index
        passes, scores = ("annotate", "reward") if case != "resample" else ("reward", "annotate")
        assert at("rollout") < at(passes) < at(scores) < at("experience") < at("update"), order
        for beside in ("samples", *(["prompts"] if order is first else [])):
            last = len(order) - 1 - order[::-1].index(beside)
            assert at("update") < last < at("time/update"), f"{beside}: while the update runs, before it is waited for"
        assert at("time/update") < at("line of samples") < at("time/samples"), "it holds logprobs after the update"
        if case == "remax":
            greedy = order.index("rollout", at("rollout") + 1)
            assert greedy < at("reward") and order.count("reward") == 2, "both are under way before either is scored"
    assert second[0] == "rollout" or case == "resample", "its prompts were ready"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record.keys() - {"stage", "step", "time"} <= metrics_of(config), "checkpoints.best may name each"
        times = [record[f"time/{name}"] for name in ("rollout", "reward", "annotate", "update", "samples")]
        assert min(times) > 0 and sum(times) <= record["seconds"], "parts of one wall clock"
