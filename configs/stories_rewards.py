"""Reward functions for configs/stories.yaml and the default runs of docs/defaults.md.

Each gets texts and returns one number per text.
"""

import re

CHEERFUL = {"happy", "fun", "play", "played", "smiled", "friends", "friend", "love", "loved", "good", "nice"}
HAPPY = re.compile(r"\b(happy|happily|glad|smiled?|laughed|joy|hugged|fun|best friends?|loved)\b", re.IGNORECASE)


def happy_ending(prompts, completions, **columns):
    """1 where the last sentence of the story is a happy one."""
    return [float(bool(HAPPY.search(_last_sentence(text)))) for text in completions]


def mentions_dog(prompts, completions, **columns):
    """1 where the story tells of a dog."""
    return [float(bool(re.search(r"\b(dogs?|puppy|puppies)\b", text, re.IGNORECASE))) for text in completions]


def cheerful_words(prompts, completions, **columns):
    """10 times the share of words that are cheerful: a reward that nearly every answer has some of."""
    return [10 * sum(word.strip('.,!"').lower() in CHEERFUL for word in text.split()) / max(len(text.split()), 1)
            for text in completions]


def _last_sentence(text):
    sentences = [s for s in re.split(r"(?<=[.!?\"])\s+", text.strip()) if s]
    return sentences[-1] if sentences else ""
