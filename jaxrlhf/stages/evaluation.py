"""What PPO changed: numbers before and after, and answers side by side, as a person reads them."""

import dataclasses
import textwrap
from collections.abc import Mapping

import numpy as np

from jaxrlhf.records import Experience, Rollout
from jaxrlhf.rewards.completions import Completions

SAMPLES = 8  # answers kept for a person to read
WIDTH = 100
LABELS = {
    "reward/score": "reward that was maximised",
    "reward/gold": "gold score (never trained on)",
    "kl/k1": "KL to the reference, nats per answer",
    "length/mean": "tokens per answer",
    "length/eos_share": "share of answers that ended",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A policy's answers to the evaluation prompts: means by metric name, and some of the answers."""

    numbers: dict[str, float]
    samples: list[dict]


def rows_measured(experience: Experience, rollout: Rollout) -> dict[str, np.ndarray]:
    """What is measured of each of B answers beside its scores, [B] each, by metric name. Takes numpy arrays."""
    mask = rollout.response_mask
    return {
        "kl/k1": np.sum(np.where(mask, experience.logprobs - experience.ref_logprobs, 0.0), axis=1),
        "length/mean": np.sum(mask, axis=1),
        "length/eos_share": rollout.ended,
    }


def samples_of(completions: Completions, scores) -> list[dict]:
    """One record per answer: prompt, completion, score."""
    return [
        {"prompt": prompt, "completion": completion, "score": round(float(score), 4)}
        for prompt, completion, score in zip(completions.prompts, completions.texts, np.asarray(scores))
    ]


def comparison(evaluations: Mapping[str, Evaluation], samples: int = 5) -> str:
    """The final table with a column for each policy, and sample answers of the first and the last side by side."""
    width = max(14, *(len(f"{name} PPO") + 2 for name in evaluations))
    lines = ["", " " * 40 + "".join(f"{f'{name} PPO':>{width}}" for name in evaluations)]
    for name, label in LABELS.items():
        if all(name in e.numbers for e in evaluations.values()):
            lines.append(f"{label:40}" + "".join(f"{e.numbers[name]:{width}.3f}" for e in evaluations.values()))
    before, after = evaluations["before"], evaluations["after"]
    for old, new in list(zip(before.samples, after.samples))[:samples]:
        lines += ["", *_wrapped("prompt", old["prompt"])]
        lines += _wrapped(f"before ({old['score']:.2f})", old["completion"])
        lines += _wrapped(f"after ({new['score']:.2f})", new["completion"])
    return "\n".join(lines) + "\n"


def _wrapped(label: str, text: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - 18) or [""]
    return [f"{label if i == 0 else '':18}{line}" for i, line in enumerate(lines)]
