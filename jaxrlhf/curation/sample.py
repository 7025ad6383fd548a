"""Samples completions of a model for people to score. This is the command `jaxrlhf data sample`.

A row keeps its columns and gets `prompt` and `completions`, a list of {"response", "role", "score": null} in random
order. People replace null by numbers; `jaxrlhf data convert --from scored` then writes preference pairs.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Sequence

from jaxrlhf.curation.reading import parse_fields
from jaxrlhf.curation.writing import check_output, jsonl_writer
from jaxrlhf.data.prompts import read_prompts
from jaxrlhf.data.sources import Row


def sample(
    path: str,
    out: str,
    model: argparse.Namespace,
    *,
    count: int = 2,
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[int, int]:
    """Writes a row with completions for each prompt of a file. Returns (number of rows, number of completions).

    model   options of `jaxrlhf generate` that choose the model and the sampling
    count   completions of each role per prompt; equal ones are written once
    """
    from jaxrlhf.stages.generating import complete_prompts

    check_output(out, overwrite)
    rows, prompts, _ = read_prompts(parse_fields(path, settings))
    completions: list[list[tuple[str, str]]] = [[] for _ in rows]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "prompts.jsonl")
        with jsonl_writer(file) as write:
            for row, prompt in zip(rows, prompts):
                text = {"prompt": prompt} if isinstance(prompt, str) else {
                    "prompt": prompt.messages, "tools": prompt.tools, "chat_template_kwargs": dict(prompt.arguments)
                }  # fmt: skip
                for _ in range(count):
                    write(Row(text, row.where))
        options = argparse.Namespace(**vars(model) | {"prompt": None, "prompts": file, "prompt_field": "prompt"})
        for number, record in enumerate(complete_prompts(options)):
            completions[number // count] += [(role, text) for role, text in record["answers"].items()]
    written = 0
    with jsonl_writer(out, overwrite) as write:
        for number, (row, prompt, found) in enumerate(zip(rows, prompts, completions)):
            unique = list({text: role for role, text in reversed(found)}.items())
            random.Random(f"{model.seed} {number}").shuffle(unique)  # the order must not tell the role
            scored = [{"response": text, "role": role, "score": None} for text, role in unique]
            shown = prompt if isinstance(prompt, str) else prompt.messages
            write(Row(row.values | {"prompt": shown, "completions": scored}, row.where))
            written += len(scored)
    return len(rows), written
