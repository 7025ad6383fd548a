"""The form of the text games: an environment, an expert that plays it, and demonstrations as builtin data.

A game is an environment of the text form (see `jaxrlhf/environments/protocol.py`). An episode depends only on the seed
of `reset` and on the actions. An observation is one chat message of the role user. The last step of an episode has
`info["success"]`. All texts are lower case words that are separated by single spaces, for the word-level tokenizer of
`model.new`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrlhf.toy.tasks.task import Random, Row, Task, words_of

Messages = list[dict[str, str]]
Player = Callable[[Any, Random], str]
Step = tuple[Messages, float, bool, bool, dict[str, Any]]

# The chat template of the games' tokenizer. A turn of the assistant ends with <eos>, and no turn depends on later ones.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %} {{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)
ROLES = "user: assistant: tool: system:"
MAX_STEPS = 1000  # of an episode that an expert plays


class Game:
    """Base of the games. A subclass has `start` and `play`, and draws from `self.random` only.

    `start(options)` returns the first text. `play(action)` returns (text, outcome): the text after an action, and None
    while the game goes on, or (reward, success) at its end. The action has single spaces and is lower case.
    """

    random: Random | None = None
    _over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Starts an episode. Without a seed, the episode goes on with the random numbers of the last one."""
        if seed is not None or self.random is None:
            self.random = np.random.default_rng(seed)
        self._over = False
        return said(self.start(options or {})), {}

    def step(self, action: str) -> Step:
        """Plays an action. Raises RuntimeError if the episode is over."""
        if self._over:
            raise RuntimeError("the episode is over; call reset")
        text, outcome = self.play(" ".join(action.lower().split()))
        self._over = outcome is not None
        reward, success = outcome or (0.0, False)
        return said(text), float(reward), self._over, False, {"success": bool(success)} if self._over else {}

    def start(self, options: dict[str, Any]) -> str:
        raise NotImplementedError

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        raise NotImplementedError


def said(text: str) -> Messages:
    """Returns a text as an observation."""
    return [{"role": "user", "content": text}]


def play_episode(
    env: Any, policy: Callable[[Any], str], seed: int | None = None, options: dict[str, Any] | None = None
) -> tuple[Messages, float, dict[str, Any]]:
    """Plays an episode and returns (messages, sum of rewards, info of the last step).

    `policy` takes the environment and returns the next action. The messages begin with the first observation and end
    with the last one.
    """
    observation, info = env.reset(seed=seed, options=options)
    messages, total = list(observation), 0.0
    for _ in range(MAX_STEPS):
        action = policy(env)
        observation, reward, terminated, truncated, info = env.step(action)
        messages += [{"role": "assistant", "content": action}, *observation]
        total += reward
        if terminated or truncated:
            break
    return messages, total, info


def demonstrations(
    make: Callable[[], Any], players: dict[Player, float], words: tuple[str, ...], rows: dict[str, int]
) -> Task:
    """Returns the builtin data of a game: chats of episodes.

    A row has `messages`, which end with the last action, and `success`. `players` are functions of the environment and
    random numbers, each with its share of the episodes. Rows with equal messages are in the same split.
    """

    def draw(rng: Random) -> Row:
        act = list(players)[int(rng.choice(len(players), p=list(players.values())))]
        seed = int(rng.integers(2**31))
        messages, _, info = play_episode(make(), lambda env: act(env, rng), seed)
        while messages[-1]["role"] != "assistant":
            messages.pop()
        return {"messages": messages, "success": info["success"]}

    def key(row: Row) -> str:
        return " / ".join(message["content"] for message in row["messages"])

    return Task(draw, words_of(ROLES, *words), rows, key, CHAT_TEMPLATE)
