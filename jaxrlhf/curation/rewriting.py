"""Has a language model rewrite texts: paraphrases, and translations and back. The model is a server or a folder.

A server has the interface of OpenAI's chat completions. Each text is one request:

    POST URL/chat/completions   {"model", "messages": [{"role": "user", "content"}], "seed", "temperature", ...}
    200                         {"choices": [{"message": {"content": "..."}}]}

After a failed connection, a timeout or a status 429 or 5xx the request is sent again, after a pause that grows.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxrlhf.curation.augment import Rewrite
from jaxrlhf.data.sources import one_line
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.rewards.event_loop import run_async
from jaxrlhf.rewards.remote import Unavailable, retry_delay

if TYPE_CHECKING:
    import httpx2

Ask = Callable[[Sequence[str], Sequence[int]], list[str]]
"""Returns the model's answer to each instruction; the seeds decide the sampling."""
PARAPHRASE = (
    "Write this text in other words. Keep its meaning, its names and its numbers. Answer with the new text alone.\n\n"
)
TRANSLATE = "Translate this text into {}. Answer with the translation alone.\n\n"


def paraphrase(ask: Ask) -> Rewrite:
    """Returns a function that asks the model for each text in other words."""
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

    Raises UserError for an invalid URL, and Fault if the server fails.
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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError("--server: must be a URL such as http://localhost:8000/v1, without user and password")
        self.url, self.model, self.temperature, self.max_tokens = url.rstrip("/"), model, temperature, max_tokens
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self._headers = {}
        if token_env is not None:
            if not os.environ.get(token_env):
                raise UserError(f"--token-env: the environment variable {token_env} is not set; set it to the token")
            self._headers = {"Authorization": f"Bearer {os.environ[token_env]}"}

    def __call__(self, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return run_async(self._ask_all(instructions, seeds))

    async def _ask_all(self, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        import httpx2

        slots = asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(headers=self._headers, timeout=self.timeout, follow_redirects=False) as client:

            async def one(instruction: str, seed: int) -> str:
                async with slots:
                    return await self._ask(client, instruction, seed)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*pair)) for pair in zip(instructions, seeds)]
            except BaseExceptionGroup as faults:  # the first fault has cancelled the other requests
                raise faults.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, client: "httpx2.AsyncClient", instruction: str, seed: int) -> str:
        import httpx2

        body = {
            "model": self.model, "messages": [{"role": "user", "content": instruction}], "seed": seed,
            "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip
        for attempt in range(self.retries + 1):
            try:
                return self._answer(await client.post(f"{self.url}/chat/completions", json=body))
            except (Unavailable, httpx2.TransportError) as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            if attempt < self.retries:
                await asyncio.sleep(retry_delay(attempt, None, 0.5, 30.0, random.random()))
        raise Fault(f"{self.url}: {problem} (tried {self.retries + 1} times)")

    def _answer(self, response: "httpx2.Response") -> str:
        if response.status_code == 429 or response.status_code >= 500:
            raise Unavailable(f"status {response.status_code}", None)
        if response.status_code != 200:
            raise Fault(f"{self.url}: status {response.status_code}: {response.text[:200]!r}")
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise Fault(f"{self.url}: the answer is no chat completion: {one_line(error)}") from error
        if not isinstance(answer, str):
            raise Fault(f"{self.url}: the answer has no text")
        return answer.strip()


class LocalModel:
    """Asks a model folder or hub id on this machine, through the code of `jaxrlhf generate`.

    Each call loads the model, so all texts belong into one call. If the tokenizer has a chat template, an instruction
    is a turn of the user.
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
                max_new_tokens=self.max_tokens, temperature=self.temperature, top_k=None, top_p=None,
                seed=seeds[0] if len(seeds) else 0,
            )  # fmt: skip
            return [next(iter(record["answers"].values())).strip() for record in complete_prompts(arguments)]
