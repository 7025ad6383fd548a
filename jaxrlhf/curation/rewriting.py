"""Lets a language model rewrite texts, by paraphrase or back-translation. The model is on a server or in a folder.

A server has the interface of OpenAI's chat completions. Each text is one request:

    POST URL/chat/completions   {"model", "messages": [{"role": "user", "content"}], "seed", "temperature", ...}
    200                         {"choices": [{"message": {"content": "..."}}]}

`rewards.client` says when a request is sent again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from jaxrlhf.curation.augment import Rewrite
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.client import Client

Ask = Callable[[Sequence[str], Sequence[int]], list[str]]
"""Returns the model's answer to each instruction; the seeds decide the sampling."""
PARAPHRASE = (
    "Write this text in other words. Keep its meaning, its names and its numbers. Answer with the new text alone.\n\n"
)
TRANSLATE = "Translate this text into {}. Answer with the translation alone.\n\n"


def paraphrase(ask: Ask) -> Rewrite:
    """Returns a function that asks the model for a paraphrase of each text."""
    return lambda texts, seeds: ask([PARAPHRASE + text for text in texts], seeds)


def back_translation(ask: Ask, language: str, home: str = "English") -> Rewrite:
    """Returns a function that has the model translate each text into `language`, and this translation into `home`."""

    def rewrite(texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        there = ask([TRANSLATE.format(language) + text for text in texts], seeds)
        return ask([TRANSLATE.format(home) + text for text in there], seeds)

    return rewrite


class ChatServer:
    """Asks an OpenAI-compatible server. `url` ends before /chat/completions, such as http://localhost:8000/v1.

    token_env    name of an environment variable that holds a token; sent as `Authorization: Bearer TOKEN`
    timeout      seconds for one request
    retries      number of retries of a request
    concurrency  number of simultaneous requests

    Raises UserError for an invalid URL or token, and Fault if the server fails.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float = 1.0,
        max_tokens: int = 512,
        token_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        concurrency: int = 8,
    ):
        self.sampling = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        settings = {"timeout": timeout, "retries": retries, "concurrency": concurrency, "headers_env": token_env}
        try:
            self.client = Client(f"{url.rstrip('/')}/chat/completions", "server", **settings)
        except UserError as error:
            raise UserError(f"--server: {str(error).removeprefix('reward ')}") from None

    def __call__(self, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        turns = [[{"role": "user", "content": text}] for text in instructions]
        bodies = [self.sampling | {"messages": messages, "seed": seed} for messages, seed in zip(turns, seeds)]
        return self.client.send([json.dumps(body).encode() for body in bodies], self._answer)

    def _answer(self, number: int, response: Any) -> str:
        try:
            answer = response["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            answer = None
        if not isinstance(answer, str):
            raise self.client.fault("the response is not a chat completion with choices[0].message.content")
        return answer.strip()


class LocalModel:
    """Asks a model folder or hub id on this machine, through the code of `jaxrlhf generate`.

    Each call loads the model, so pass all texts in one call. If the tokenizer has a chat template, an instruction is
    sent as a user turn.
    """

    def __init__(self, folder: str, *, temperature: float = 1.0, max_tokens: int = 512):
        self.folder, self.temperature, self.max_tokens = folder, temperature, max_tokens

    def __call__(self, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        from jaxrlhf.data.tokenizers import load_tokenizer
        from jaxrlhf.stages.generating import complete_prompts

        tokenizer = load_tokenizer(self.folder)
        is_chat = tokenizer is not None and tokenizer.has_chat_template
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "instructions.jsonl")
            with open(file, "w", encoding="utf-8") as lines:
                for text in instructions:
                    row = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
                    lines.write(json.dumps(row) + "\n")
            arguments = argparse.Namespace(
                run=None, model=self.folder, step=None, roles=None, prompt=None, prompts=file, prompt_field=None,
                max_new_tokens=self.max_tokens, temperature=self.temperature, top_k=None, top_p=None, choices=None,
                seed=seeds[0] if len(seeds) else 0,
            )  # fmt: skip
            return [next(iter(record["answers"].values())).strip() for record in complete_prompts(arguments)]
