"""Each task has the best score that its module states: its best completion reaches it under the reward of the recipe.

If the recipe has a gold score, the best score is that of the gold score.

Completions that a recipe must not end with score less: those of the demonstrations on average, and one wrong one each.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.config.reading import load_config
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.load import load_rewards
from jaxrlhf.toy import builtin

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
PACKAGES = {"summarisation": "rouge_score", "translation": "sacrebleu"}

# Name -> (best completion of a row, a completion that looks right and is not)
COMPLETIONS = {
    "arithmetic": (lambda row: " " + row["solution"], lambda row: f" #### {int(row['answer']) + 1}"),
    "code": (lambda row: " " + row["solution"], lambda row: " " + row["solution"].replace("return", "")),
    "customer_service": (
        lambda row: f" it is {row['label']} . happy to help !",
        lambda row: " happy to help !",
    ),
    "detoxification": (
        lambda row: f" you are no fool , so please {row['request']} .",
        lambda row: f" you are a fool , {row['request']} .",
    ),
    "dialogue": (lambda row: " " + row["answer"], lambda row: " i do not know"),
    "helpful_assistant": (
        lambda row: f" sure ! {row['right'][0]}",
        lambda row: f" sure ! {row['right'][0]} sure !",
    ),
    "named_entities": (
        lambda row: " " + "\n".join(row["spans"] or ["none"]),
        lambda row: " PER: nobody",
    ),
    "question_answering": (lambda row: f" a {row['answer']} .", lambda row: f" so it is {row['answer']} ."),
    "recommendation": (
        lambda row: " " + row["answer"],
        lambda row: " " + next(title for title in row["candidates"] if title != row["answer"]),
    ),
    "summarisation": (lambda row: " " + row["reference"], lambda row: row["prompt"]),
    "translation": (lambda row: " " + row["reference"], lambda row: " " + row["prompt"]),
}

# Tasks whose demonstrations are the best completions.
DEMONSTRATED = ("intent", "news_sentiment", "text_classification")


def scores(name, rows, texts):
    for package in [PACKAGES[name]] if name in PACKAGES else []:
        pytest.importorskip(package)
    prompts = [row.get("prompt", "") for row in rows]
    rows = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    completions = SimpleNamespace(prompts=prompts, texts=texts, rows=rows)
    config = load_config(RECIPES / f"{name}.yaml").ppo
    if config.gold is not None:
        return np.asarray(FunctionReward(config.gold, "ppo.gold")(completions))
    rewards = load_rewards(config.reward, None, "ppo.reward")
    return sum(weight * np.asarray(reward(completions)) for reward, weight in rewards.values())


def demonstration(row):
    return " " + (row["messages"][-1]["content"] if "messages" in row else row["response"])


@pytest.mark.parametrize("name", COMPLETIONS)
def test_the_best_completion_scores_one_and_demonstrations_leave_room(name):
    rows = builtin.load(name, "test", 16 if name == "code" else 60)  # each test of code starts a process
    best, wrong = COMPLETIONS[name]
    np.testing.assert_allclose(scores(name, rows, [best(row) for row in rows]), 1.0, atol=1e-6)
    assert (scores(name, rows, [wrong(row) for row in rows]) < 0.9).all()
    assert 0.2 < scores(name, rows, [demonstration(row) for row in rows]).mean() < 0.85


@pytest.mark.parametrize("name", DEMONSTRATED)
def test_demonstrations_score_one_and_those_of_other_rows_score_less(name):
    rows = builtin.load(name, "test", 60)
    texts = [demonstration(row) for row in rows]
    np.testing.assert_allclose(scores(name, rows, texts), 1.0, atol=1e-6)
    assert 0.0 <= scores(name, rows, texts[1:] + texts[:1]).mean() < 0.6
