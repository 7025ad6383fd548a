"""A reward from a language model that judges completions, behind an OpenAI-compatible chat server.

Each completion is one POST request to URL/chat/completions with the rubric as the user's message. The rubric is a jinja
template that a sandbox renders. Its variables are `prompt`, `completion` and the row's columns. If the completion is
compared with a reference (setting `against`), the variables are `prompt`, `first`, `second` and the columns. Then there
are two requests, one for each order, because a judge may prefer the text in one place, such as the first (Wang et al.
2023, arXiv:2305.17926).

Every reply is saved in a cache folder. The key of a reply is a hash of the request: model, rubric with prompt and
completion, and sampling settings. So a resumed run gets the same scores, also from another server of the same model.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config import JudgeRewardConfig
from jaxrlhf.data.chats import Chat, content_text
from jaxrlhf.data.templates import compiled
from jaxrlhf.errors import UserError, one_line
from jaxrlhf.rewards.client import Client
from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.structured import parse_json

# Not a part of a word, a date or a number such as 8,5 or 1,000, which countries read in different ways.
NUMBER = re.compile(r"(?<![\w.])(?<!\d[,-])-?\d+(?:\.\d+)?(?!\w|[.,-]\d)")
MARKS = " *_[]\n\""  # around a score in a token
CHOICE = re.compile(r"\b(A|B|TIE)\b", re.IGNORECASE)
WINS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
TOP_LOGPROBS = 20  # the most that the API allows

Reply = Mapping[str, Any]
"""{"content": text, "logprobs": [{"token", "logprob", "top_logprobs"}] or None}"""


class JudgeReward:
    """A reward (see `completions.Reward`) from a judge. The module docstring describes the requests.

    A completion whose judgement cannot be read has no score, and neither has a row without a reference. `key_path` is
    the config section. Raises `UserError` if the rubric, the URL, the token or the cache folder cannot be used.
    """

    may_abstain = True

    def __init__(self, config: JudgeRewardConfig, key_path: str, say: Callable[[str], None] | None = None):
        self.config, self.name = config, f"judge {config.model}"
        self._render = compiled(config.rubric, f"{key_path}.rubric")
        url = config.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        settings = {"timeout": config.timeout, "retries": config.retries, "concurrency": config.concurrency}
        try:
            self.client = Client(url, "judge", headers_env=config.token_env, say=say, **settings)
        except UserError as error:
            raise UserError(f"{key_path}.url: {error}") from None
        self.cache = None if config.cache is None else Cache(cache_folder(config.cache), f"{key_path}.cache")

    def check_rows(self, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]], key_path: str) -> None:
        """Raises `UserError` if no row has the column of `against`, or if the rubric cannot be rendered for a row or is
        the same for two completions.
        """
        against = self.config.against
        if against is not None and not any(against in row for row in rows):
            present = ", ".join(sorted(set().union(*rows))) or "none"
            raise UserError(f"{key_path}.against: the data has no column {against}; the columns are: {present}")
        for number, (prompt, row) in enumerate(zip(prompts, rows), 1):
            try:
                one, other = (self._messages(prompt, text, row) for text in ("a", "another completion"))
            except ValueError as error:
                raise UserError(f"{key_path}.rubric: prompt {number}: {error}") from None
            if any(map(str.__eq__, one, other)):
                names = "{{ completion }}" if self.config.against is None else "{{ first }} and {{ second }}"
                raise UserError(f"{key_path}.rubric: does not show what is judged; it must contain {names}")

    def __call__(self, completions: Completions) -> np.ndarray:
        chats = completions.chats or [None] * len(completions.prompts)
        requests: list[list[bytes]] = []  # per row: none, one, or one for each order
        for number, (text, chat, answer, row) in enumerate(
            zip(completions.prompts, chats, completions.texts, completions.rows)
        ):
            prompt = text if chat is None else chat_text(chat)
            try:
                messages = self._messages(prompt, answer.strip(), row)
            except ValueError as error:
                raise RewardFault(f"{self.name}: row {number}: {error}") from None
            requests.append([self._request(message) for message in messages])
        replies = self._replies(list(dict.fromkeys(request for row in requests for request in row)))
        scores = [self._score([replies[request] for request in row]) for row in requests]
        abstained = np.array([score is None for score in scores], bool)
        return with_abstained(np.array([score or 0.0 for score in scores], np.float32), abstained)

    def _messages(self, prompt: str, completion: str, row: Mapping[str, Any]) -> list[str]:
        """Returns the rubric of a row, once or in both orders. Raises ValueError if it cannot be rendered."""
        pairs: list[dict[str, Any]] = [{"completion": completion}]
        if self.config.against is not None:
            reference = row.get(self.config.against)
            if reference is None:
                return []
            if not isinstance(reference, str):
                raise ValueError(f"the column {self.config.against} must hold text, not a {type(reference).__name__}")
            pairs = [{"first": completion, "second": reference}, {"first": reference, "second": completion}]
        try:
            return [self._render({**row, "prompt": prompt, **pair}) for pair in pairs]
        except Exception as error:  # jinja, or an operator on a value of a wrong type
            names = ", ".join(["prompt", *pairs[0], *row])
            raise ValueError(f"the rubric fails: {one_line(error)}; the variables are: {names}") from None

    def _request(self, message: str) -> bytes:
        config = self.config
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        request = {"model": config.model, "messages": [*system, {"role": "user", "content": message}]}
        request |= {"temperature": config.temperature, "max_tokens": config.max_tokens}
        if config.read == "logprobs":
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        request |= config.extra
        request = {name: value for name, value in request.items() if value is not None}
        return json.dumps(request, sort_keys=True).encode()

    def _replies(self, requests: Sequence[bytes]) -> dict[bytes, Reply]:
        """Returns the reply to each request, from the cache or from the server."""
        found = {request: self.cache.get(request) if self.cache else None for request in requests}
        missing = [request for request, reply in found.items() if reply is None]

        def read(number: int, response: Any) -> Reply:
            reply = self._read(response)
            if self.cache:
                self.cache.put(missing[number], reply)
            return reply

        return found | dict(zip(missing, self.client.send(missing, read) if missing else []))

    def _read(self, response: Any) -> Reply:
        try:
            choice = response["choices"][0]
            content = choice["message"].get("content") or ""
            logprobs = (choice.get("logprobs") or {}).get("content")
            if not isinstance(content, str):
                raise TypeError
        except (TypeError, KeyError, IndexError, AttributeError):
            raise self.client.fault("the response is not a chat completion with choices[0].message.content") from None
        if self.config.read == "logprobs" and not isinstance(logprobs, list):
            raise self.client.fault("the response has no logprobs; use a server that has them, or set read: text")
        return {"content": content, "logprobs": logprobs if self.config.read == "logprobs" else None}

    def _score(self, replies: Sequence[Reply]) -> float | None:
        """Returns the score of a row from its reply, or from its replies in both orders.

        Returns None if a reply is missing or cannot be read, or if the score is not from `low` to `high`.
        """
        config = self.config
        read: Callable[[Reply], float | None]
        if config.against is None:
            read = {"text": _last_number, "json": self._json_number, "logprobs": self._expected_number}[config.read]
        else:
            read = {"text": _last_choice, "json": self._json_choice, "logprobs": _expected_choice}[config.read]
        scores = [read(reply) for reply in replies]
        if not scores or None in scores:
            return None
        if config.against is not None:
            return (scores[0] + 1 - scores[1]) / 2
        return scores[0] if config.low <= scores[0] <= config.high else None

    def _field(self, reply: Reply) -> Any:
        text = reply["content"]
        objects = re.findall(r"\{[^{}]*\}", text)
        for candidate in (text, *objects[-1:]):  # the judge may write before and after the object
            try:
                value = parse_json(candidate, fenced=True)
            except ValueError:
                continue
            if isinstance(value, dict) and self.config.field in value:
                return value[self.config.field]
        return None

    def _json_number(self, reply: Reply) -> float | None:
        value = self._field(reply)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
            return None
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return None

    def _json_choice(self, reply: Reply) -> float | None:
        return WINS.get(str(self._field(reply)).strip().upper())

    def _expected_number(self, reply: Reply) -> float | None:
        """Returns the mean of all scores, weighted by their probabilities at the last token that is a score."""
        values = {str(score): float(score) for score in range(int(self.config.low), int(self.config.high) + 1)}
        return _expected(reply, values)


def _last_number(reply: Reply) -> float | None:
    """Returns the last number. The 10 in 7/10 and in "7 out of 10" is skipped."""
    text = re.sub(r"([\d*_])\s*(?:/|out of)\s*[*_]*\d+(?:\.\d+)?", r"\1", reply["content"])
    numbers = NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def _last_choice(reply: Reply) -> float | None:
    """Returns the value in `WINS` of the last A, B or tie, such as in [[A]] or "Answer: B"."""
    found = [name for name in CHOICE.findall(reply["content"]) if name != "a"]  # not the article
    return WINS[found[-1].upper()] if found else None


def _expected_choice(reply: Reply) -> float | None:
    return _expected(reply, {"A": 1.0, "B": 0.0})


def _expected(reply: Reply, values: Mapping[str, float]) -> float | None:
    """Returns the mean of `values`, weighted by their probabilities at the last token that is a key of `values`."""
    try:
        tokens = [token for token in reply["logprobs"] if token["token"].strip(MARKS) in values]
        pairs = [(values.get(t["token"].strip(MARKS)), float(t["logprob"])) for t in tokens[-1]["top_logprobs"]]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    known = [(value, np.exp(logprob)) for value, logprob in pairs if value is not None and logprob <= 0]
    total = sum(weight for _, weight in known)
    return float(sum(value * weight for value, weight in known) / total) if total > 0 else None


def chat_text(chat: Chat) -> str:
    """Returns the messages of a chat, one per paragraph, each after its role."""
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in chat.messages)


# ---------------------------------------------------------------- the cache


def cache_folder(setting: str) -> Path:
    """Returns the folder of the setting. auto is jaxrlhf/judge in the user's cache folder."""
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrlhf" / "judge"


class Cache:
    """Replies in a folder, one file per request. Several processes can use it, because files are renamed into place."""

    def __init__(self, folder: Path, key_path: str):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"{key_path}: cannot write to {folder} ({error.strerror}); give another folder, or null for no cache"
            ) from None

    def get(self, request: bytes) -> Reply | None:
        """Returns the reply to a request, or None if there is none or its file cannot be read."""
        try:
            reply = json.loads(self._path(request).read_bytes())
        except (OSError, ValueError):
            return None
        return reply if isinstance(reply, dict) and isinstance(reply.get("content"), str) else None

    def put(self, request: bytes, reply: Reply) -> None:
        """Saves a reply. A full disk raises RewardFault."""
        path = self._path(request)
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(json.dumps(reply).encode())
            os.replace(file.name, path)
        except OSError as error:
            raise RewardFault(f"the judge's cache cannot write {path}: {error.strerror}") from error

    def _path(self, request: bytes) -> Path:
        name = hashlib.sha256(request).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
