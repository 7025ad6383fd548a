"""Calls rewards once before training, so that a broken server or a wrong shape is found in seconds, not after SFT."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxrlhf.config import ModelRewardConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.classifier import ClassifierReward
from jaxrlhf.rewards.code_tests import CodeTestsReward
from jaxrlhf.rewards.completions import Completions, Reward
from jaxrlhf.rewards.functions import FunctionReward, RewardFault
from jaxrlhf.rewards.judge import JudgeReward
from jaxrlhf.rewards.remote import HTTPReward

ROWS, TOKENS = 2, 8
CALLED = FunctionReward | HTTPReward | ClassifierReward | CodeTestsReward | JudgeReward


def try_rewards(
    rewards: Mapping[str, Reward | ModelRewardConfig | None],
    prompts: PromptSet,
    tokenizer: Tokenizer,
    choices: Sequence[str] | None = None,
) -> None:
    """Scores two completions with each function, server, classifier, sandbox and judge.

    The completions are the first two of `choices`, if completions are limited to these. Otherwise the completion of a
    prompt is a copy of the prompt's last tokens.

    If a reward fails, `UserError` is raised with the key path of this reward. Rewards that are decoders are not called,
    because they were checked when they were loaded, and a call would compile a program.
    """
    completions = _completions(prompts, tokenizer, choices)
    for key_path, reward in rewards.items():
        if isinstance(reward, CALLED):
            try:
                reward(completions)
            except RewardFault as fault:
                raise UserError(f"{key_path}: the reward failed on the first {ROWS} rows: {fault}") from fault


def _completions(prompts: PromptSet, tokenizer: Tokenizer, choices: Sequence[str] | None) -> Completions:
    """Returns two prompts of the data with a completion each."""
    rows = [0, min(1, len(prompts) - 1)]
    padded = prompts.padded(rows)
    if choices is None:
        answers = [prompts.ids[index][-TOKENS:] for index in rows]
    else:
        pairs = [(prompts.chats[index] or prompts.texts[index], choice) for index, choice in zip(rows, choices)]
        answers = [answer for _, answer in tokenizer.encode_pairs(pairs)]
    response = np.zeros((ROWS, max(map(len, answers))), np.int32)
    response_mask = np.zeros(response.shape, bool)
    for row, ids in enumerate(answers):
        response[row, : len(ids)], response_mask[row, : len(ids)] = ids, True
    rollout = Rollout(
        tokens=np.concatenate([padded.tokens, response], axis=1),
        mask=np.concatenate([padded.mask, response_mask], axis=1),
        response_mask=response_mask,
        sample_logprobs=np.zeros(response.shape, np.float32),
        ended=np.ones(ROWS, bool),
        temperature=np.ones(ROWS, np.float32),
    )
    texts, columns, chats = ([values[i] for i in rows] for values in (prompts.texts, prompts.columns, prompts.chats))
    return Completions(rollout, texts, columns, tokenizer, chats)
