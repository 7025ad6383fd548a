"""Completions as records of samples.jsonl: texts, scores, and numbers of each token.

A record has prompt, completion, score, and gold if there is a gold score. If there is an experience, the record also
has tokens: T texts that join to the completion. It then has T numbers each of logprobs, ref_logprobs, values and
advantages. In training it also has T numbers new_logprobs, measured after the update. If the reward scores inside
completions, the record has steps: [text, reward] of each step, where a text ends at the token that has the reward. The
record of an episode has its conversation, and its completion is the text of all turns of the policy.
"""

from collections.abc import Mapping

import jax
import numpy as np

from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.records import Experience
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.steps import step_texts

SAMPLES = 8  # number of completions that are written for people to read
DIGITS = 4
BY_TOKEN = ("logprobs", "ref_logprobs", "values", "advantages")


def samples_of(
    completions: Completions,
    rows: Mapping[str, np.ndarray],
    experience: Experience | None = None,
    step_rewards: np.ma.MaskedArray | None = None,
) -> list[dict]:
    """Returns the first `SAMPLES` completions as records. `rows` maps metric names to f32[B].

    `step_rewards` are the rewards inside the completions, f32[B,R].

    All processes must call this function.
    """
    scores = {"score": rows["reward/score"]} | ({"gold": rows["reward/gold"]} if "reward/gold" in rows else {})
    records = [
        {"prompt": prompt, "completion": completion} | {name: rounded(by_row[i]) for name, by_row in scores.items()}
        | completions.details(i)
        for i, (prompt, completion) in enumerate(zip(completions.prompts[:SAMPLES], completions.texts))
    ]
    if experience is not None:
        for record, texts in zip(records, completions.token_texts(SAMPLES)):
            record["tokens"] = texts
        for name in BY_TOKEN:
            add_by_token(records, name, completions, getattr(experience, name))
        if step_rewards is not None:
            for record, rewards, real in zip(records, step_rewards, completions.response_mask):
                rewards = rewards[real]
                texts = step_texts(record["tokens"], ~np.ma.getmaskarray(rewards))
                record["steps"] = [list(pair) for pair in zip(texts, rounded(rewards.compressed()))]
    return records


def add_by_token(records: list[dict], name: str, completions: Completions, values: jax.Array) -> None:
    """Adds to each record the values of its completion's tokens, from f32[B,R].

    All processes must call this function.
    """
    values, mask = fetch((values, completions.rollout.response_mask))
    for record, by_token, real in zip(records, values, mask):
        record[name] = rounded(by_token[real])


def rounded(values: np.ndarray) -> float | list[float]:
    """Returns numbers rounded to `DIGITS` decimals, for a log that people read."""
    return np.asarray(values, np.float64).round(DIGITS).tolist()
