"""Completions as records of samples.jsonl: texts and scores, and what each token did.

A record of a completion with T tokens: prompt, completion, score, gold (if there is a gold score); with the arrays of
an experience also tokens (T texts, which join to the completion), logprobs, ref_logprobs, values, advantages and, in
training, new_logprobs (after the update): T numbers each.
"""

from collections.abc import Mapping

import jax
import numpy as np

from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.records import Experience
from jaxrlhf.rewards.completions import Completions

SAMPLES = 8  # completions kept for reading
DIGITS = 4
BY_TOKEN = ("logprobs", "ref_logprobs", "values", "advantages")


def samples_of(
    completions: Completions, rows: Mapping[str, np.ndarray], experience: Experience | None = None
) -> list[dict]:
    """Returns the first `SAMPLES` completions as records. `rows` holds f32[B] by metric name.

    All processes must call it.
    """
    scores = {"score": rows["reward/score"]} | ({"gold": rows["reward/gold"]} if "reward/gold" in rows else {})
    records = [
        {"prompt": prompt, "completion": completion} | {name: rounded(by_row[i]) for name, by_row in scores.items()}
        for i, (prompt, completion) in enumerate(zip(completions.prompts[:SAMPLES], completions.texts))
    ]
    if experience is not None:
        for record, texts in zip(records, completions.token_texts(SAMPLES)):
            record["tokens"] = texts
        for name in BY_TOKEN:
            add_by_token(records, name, completions, getattr(experience, name))
    return records


def add_by_token(records: list[dict], name: str, completions: Completions, values: jax.Array) -> None:
    """Adds to each record the values f32[B,R] of its completion's tokens. All processes must call it."""
    values, mask = fetch((values, completions.rollout.response_mask))
    for record, by_token, real in zip(records, values, mask):
        record[name] = rounded(by_token[real])


def rounded(values: np.ndarray) -> float | list[float]:
    """Numbers for a log that people read."""
    return np.asarray(values, np.float64).round(DIGITS).tolist()
