"""Reward functions for configs/stories.yaml and docs/defaults.md; each returns one number per completion."""

import re

CHEERFUL = {"happy", "fun", "play", "played", "smiled", "friends", "friend", "love", "loved", "good", "nice"}
HAPPY = re.compile(r"\b(happy|happily|glad|smiled?|laughed|joy|hugged|fun|best friends?|loved)\b", re.IGNORECASE)


def happy_ending(prompts, completions, **columns):
    """1 if the last sentence of the story is a happy one."""
    return [float(bool(HAPPY.search(_last_sentence(text)))) for text in completions]


def mentions_dog(prompts, completions, **columns):
    """1 if the story mentions a dog."""
    return [float(bool(re.search(r"\b(dogs?|puppy|puppies)\b", text, re.IGNORECASE))) for text in completions]


def cheerful_words(prompts, completions, **columns):
    """10 times the share of cheerful words, a dense reward: nearly every story has some."""
    return [10 * sum(word.strip('.,!"').lower() in CHEERFUL for word in text.split()) / max(len(text.split()), 1)
            for text in completions]


def _last_sentence(text):
    sentences = [s for s in re.split(r"(?<=[.!?\"])\s+", text.strip()) if s]
    return sentences[-1] if sentences else ""
