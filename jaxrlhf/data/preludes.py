"""Texts that are put before a chat template, and their variables.

transformers compiles templates with `trim_blocks`, so the final newline of a text is not written.
"""

import datetime

# Sets missing content to null. transformers removes null content, but DeepSeek's templates test it with `is none`.
NULL_CONTENT = (
    "{% set filled = namespace(messages=[]) %}{% for message in messages %}"
    "{% set filled.messages = filled.messages + [message if 'content' in message else dict(message, content=none)] %}"
    "{% endfor %}{% set messages = filled.messages %}\n"
)
# Replaces transformers' function `strftime_now`, which reads the clock. transformers 5 passes a function to a template
# as text, so the template receives the value of each strftime directive instead.
CLOCK = (
    "{% macro strftime_now(format) %}{% set time = namespace(text=format) %}"
    "{% for directive, text in jaxrlhf_time.items() %}{% set time.text = time.text.replace(directive, text) %}"
    "{% endfor %}"
    "{{ time.text }}{% endmacro %}\n"
)


def directives(time: datetime.datetime) -> dict[str, str]:
    """Returns the value of each strftime directive at this time.

    Directives without leading zeros, such as %-d, are included.
    """
    bare = {f"%-{letter}": time.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dmyHIMSj"}
    letters = "aAbBcdeDfFGhHIjmMnprRStTuUVwWxXyYzZ"
    return bare | {f"%{letter}": time.strftime(f"%{letter}") for letter in letters} | {"%%": "%"}
