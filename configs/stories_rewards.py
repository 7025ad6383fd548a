"""Reward functions for configs/stories.yaml: each gets texts and returns one number per text."""

import re

HAPPY = re.compile(r"\b(happy|happily|glad|smiled?|laughed|joy|hugged|fun|best friends?|loved)\b", re.IGNORECASE)


def happy_ending(prompts, completions, **columns):
    """1 where the last sentence of the story is a happy one."""
    return [float(bool(HAPPY.search(_last_sentence(text)))) for text in completions]


def mentions_dog(prompts, completions, **columns):
    """1 where the story tells of a dog."""
    return [float(bool(re.search(r"\b(dogs?|puppy|puppies)\b", text, re.IGNORECASE))) for text in completions]


def _last_sentence(text):
    sentences = [s for s in re.split(r"(?<=[.!?\"])\s+", text.strip()) if s]
    return sentences[-1] if sentences else ""
