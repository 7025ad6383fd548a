"""The final comparison of a PPO run: metrics before and after, and sample completions side by side."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrlhf.errors import Diverged, printable
from jaxrlhf.records import Experience, Rollout

WIDTH = 100
LABELS = {
    "reward/score": "reward that was maximised",
    "reward/gold": "gold score (never trained on)",
    "kl/k1": "KL to the reference, nats per completion",
    "environment/success": "share of episodes with success",
    "environment/turns": "turns per episode",
    "length/mean": "tokens per completion",
    "length/eos_share": "share of completions that ended",
}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation of a stage on held-out rows."""

    metrics: dict[str, float]  # metrics by name, without the prefix evaluation/
    record: dict[str, Any]  # records for samples.jsonl; may be empty
    results: Any  # lines to print at the end of the stage


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of a policy on the evaluation prompts, and some of the policy's completions."""

    means: dict[str, float]  # metric name -> mean
    samples: list[dict]
    scores: list[float]  # scores of all completions

    @property
    def record(self) -> dict[str, Any]:
        """Returns the record for samples.jsonl."""
        return {"evaluation": {"samples": self.samples, "scores": self.scores}}


def check_results(stage: str, results: Mapping[str, float], run_dir: str) -> None:
    """Raises `Diverged` if a result of a stage's final evaluation is not finite.

    The trained weights are then of no use.
    """
    for name, value in results.items():
        if not np.isfinite(value):
            raise Diverged(
                f"{stage}: {name} of the trained weights is {value}, so these weights are not saved as a role; "
                f"checkpoints are in {run_dir}/checkpoints/{stage}; start a new run in another run_dir, with a lower "
                "learning rate"
            )


def row_metrics(experience: Experience, rollout: Rollout) -> dict[str, np.ndarray]:
    """Returns the metrics of B completions, except scores: metric name -> [B]. The arguments hold numpy arrays."""
    mask = rollout.response_mask
    return {
        "kl/k1": np.sum(np.where(mask, experience.logprobs - experience.ref_logprobs, 0.0), axis=1),
        "length/mean": np.sum(mask, axis=1),
        "length/eos_share": rollout.ended,
    }


def comparison(evaluations: Mapping[str, Evaluation], samples: int = 5) -> str:
    """Returns the final table with a column per policy, and `samples` completions before and after PPO, as lines."""
    width = max(14, *(len(f"{name} PPO") + 2 for name in evaluations))
    lines = ["", " " * 42 + "".join(f"{f'{name} PPO':>{width}}" for name in evaluations)]
    for name, label in LABELS.items():
        if all(name in e.means for e in evaluations.values()):
            lines.append(f"{label:42}" + "".join(f"{e.means[name]:z{width}.3f}" for e in evaluations.values()))
    before, after = evaluations["before"], evaluations["after"]
    for old, new in list(zip(before.samples, after.samples))[:samples]:
        lines += ["", *_wrapped("prompt", old["prompt"])]
        lines += _wrapped(f"before ({old['score']:z.2f})", _answer(old))
        lines += _wrapped(f"after ({new['score']:z.2f})", _answer(new))
    return "\n".join(lines) + "\n"


def _answer(record: Mapping[str, Any]) -> str:
    """Returns the completion of a record, or all of a conversation after the first observation."""
    turns = record.get("conversation", [])[1:]
    return " ".join(f"[{turn['role']}] {turn['text']}" for turn in turns) or record["completion"]


def _wrapped(label: str, text: str) -> list[str]:
    lines = textwrap.wrap(printable(" ".join(text.split())), WIDTH - 18) or [""]
    return [f"{label if i == 0 else '':18}{line}" for i, line in enumerate(lines)]
