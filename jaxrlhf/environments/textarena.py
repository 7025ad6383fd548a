"""Games of TextArena (https://github.com/LeonGuertler/TextArena, README: offline play), for one agent.

Games on a server come through `openenv.OpenEnv`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import UserError, one_line

MAX_TURNS = 10_000  # of the other players in a row


class TextArena:
    """A text environment around a TextArena game: one agent, and other players that are functions.

    TextArena draws from the random numbers of Python's module `random`, which it seeds: with threads, games that draw
    inside an episode are not reproducible. The reward is the game's at the end. Success is a reward above 0.

    Args:
      game: id of a game, such as "TicTacToe-v0" (needs `pip install textarena`), or a game with TextArena's methods.
      opponents: functions of the other players. A function takes an observation and returns an action.
      player: the number of the agent; null draws it from the seed.
    """

    def __init__(
        self, game: str | Any, opponents: Sequence[Callable[[str], str]] = (), player: int | None = None
    ) -> None:
        self.game = _make(game) if isinstance(game, str) else game
        self.opponents, self.player = list(opponents), player
        if player is not None and not 0 <= player <= len(self.opponents):
            raise UserError(f"player: must be 0 to {len(self.opponents)}, the number of opponents, not {player}")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a game. The others move until it is the agent's turn."""
        players = len(self.opponents) + 1
        drawn = int(np.random.default_rng(seed).integers(players))
        self.agent = drawn if self.player is None else self.player
        others = [number for number in range(players) if number != self.agent]
        self._others = dict(zip(others, self.opponents))
        self.game.reset(num_players=players, seed=seed)
        done, text = self._until_agent(False)
        if done:
            raise RuntimeError("the game ended before the agent's first turn")
        return [{"role": "user", "content": text}], {"player": self.agent}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Plays the agent's action, then the others' until it is the agent's turn again."""
        done, _ = self.game.step(action=action)
        done, text = self._until_agent(bool(done))
        observation = [{"role": "user", "content": text}]
        if not done:
            return observation, 0.0, False, False, {}
        rewards, game_info = self.game.close()
        reward = float((rewards or {}).get(self.agent, 0.0))
        return observation, reward, True, False, {"success": reward > 0, "game": (game_info or {}).get(self.agent, {})}

    def _until_agent(self, done: bool) -> tuple[bool, str]:
        for _ in range(MAX_TURNS):
            if done:
                return True, ""
            number, observation = self.game.get_observation()
            text = _as_text(observation)
            if number == self.agent:
                return False, text
            done, _ = self.game.step(action=self._others[number](text))
            done = bool(done)
        raise RuntimeError(f"the agent had no turn in {MAX_TURNS:,} turns")


def _make(name: str) -> Any:
    try:
        import textarena
    except ImportError:
        raise UserError(f"{name}: needs TextArena: pip install textarena") from None
    try:
        return textarena.make(env_id=name)
    except Exception as error:
        raise UserError(f"{name}: TextArena cannot make this game: {one_line(error)}") from error


def _as_text(observation: Any) -> str:
    """Returns an observation as text: as it is, or the texts of its (sender, text, kind) messages."""
    if isinstance(observation, str):
        return observation
    return "\n".join(str(message[1]) for message in observation)
