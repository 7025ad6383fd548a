"""Answers in words, and a folder's worth of a reward model or classifier with a word tokenizer."""

import numpy as np
import pytest

from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.completions import Completions

WORDS = ["is", "it", "good", "bad", "very", "so", "not", "."]


@pytest.fixture(scope="session")
def policy_tokenizer():
    return build_word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def answered(policy_tokenizer):
    """`answered([(prompt, completion, ended), ...], chats=())`: the answers as a rollout would hold them."""

    def make(rows, chats=()):
        tokenizer = policy_tokenizer
        prompts = [tokenizer.encode_prompt(prompt) for prompt, _, _ in rows]
        responses = [
            [*tokenizer.encode_prompt(text)[1:], *([tokenizer.eos_id] if ended else [])] for _, text, ended in rows
        ]
        before, after = max(map(len, prompts)), max(map(len, responses))
        tokens = np.full((len(rows), before + after), 7, np.int32)  # what is no token is junk
        mask = np.zeros(tokens.shape, bool)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            tokens[i, before - len(prompt) : before + len(response)] = prompt + response
            mask[i, before - len(prompt) : before + len(response)] = True
        ended = np.array([ended for _, _, ended in rows])
        zeros = np.zeros(len(rows), np.float32)
        rollout = Rollout(tokens, mask, mask[:, before:], np.zeros((len(rows), after)), ended, zeros)
        return Completions(rollout, [prompt for prompt, _, _ in rows], [{}] * len(rows), tokenizer, chats)

    return make


@pytest.fixture(scope="session")
def rows():
    """Six questions and answers of different lengths, one unfinished."""
    return [
        ("is it good", "it is very good .", True),
        ("is it", "so so", True),
        ("is it bad", "not bad", False),
        ("good", ".", True),
        ("is it so very very bad", "it is so very very very bad . so bad .", True),
        ("it is", "bad", True),
    ]
