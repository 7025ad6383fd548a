"""Games of two players on a board, as text, against random moves, alpha-beta search, or a player that is a function."""

from collections.abc import Callable
from typing import Any, ClassVar

from jaxrlhf.toy.games.game import Game
from jaxrlhf.toy.tasks.task import Random, pick

Opponent = Callable[[str], str]
"""Takes the text that the opponent sees, and returns its action."""

MARKS = ("x", "o")
WON = 1_000_000  # value of a won position; what `heuristic` returns is far smaller
OUTCOMES = {"win": 1.0, "draw": 0.0, "loss": -1.0}  # rewards
SAID = ("you are board you win you lose draw illegal move", *MARKS)


class BoardGame(Game):
    """Base of the board games: the agent and an opponent move in turn. The reward is 1, 0 or -1 for win, draw, loss.

    A position is a pair of bit sets: the cells of the player who moves next, and those of the other player. An illegal
    action loses. `info["outcome"]` at the end is win, draw, loss or illegal. `info["success"]` is a win; against an
    opponent of `draws_suffice` a draw too.

    Args:
      opponent: "random", "minimax" (alpha-beta search, `depth` moves deep), or a function that takes the text and
        returns an action. The function sees the board as an agent of the other mark sees it.
      first: who moves first: "agent", "opponent" or "random".
      depth: moves that minimax looks ahead; null means the whole game.
    """

    draws_suffice: ClassVar[tuple[str, ...]] = ()

    def __init__(self, opponent: str | Opponent = "random", first: str = "random", depth: int | None = None) -> None:
        if not (callable(opponent) or opponent in ("random", "minimax")):
            raise ValueError(f"opponent must be random, minimax or a function, not {opponent!r}")
        if first not in ("agent", "opponent", "random") or (depth is not None and depth < 1):
            raise ValueError(f"first must be agent, opponent or random, not {first!r}; depth at least 1, not {depth}")
        self.opponent, self.first, self.depth = opponent, first, depth

    # What a game defines.
    def moves(self, taken: int) -> dict[str, int]:
        """Returns the legal actions and the cell that each one takes, as a bit."""
        raise NotImplementedError

    def won(self, cells: int) -> bool:
        """Whether a player with these cells has won."""
        raise NotImplementedError

    def board(self, x: int, o: int) -> str:
        """Returns the board as text."""
        raise NotImplementedError

    def heuristic(self, own: int, other: int) -> int:
        """Returns the value of an unfinished position for the player who moves, where the search ends."""
        return 0

    # The episode.
    def start(self, options: dict[str, Any]) -> str:
        self.position = (0, 0)
        self.mark = {"agent": 0, "opponent": 1}.get(self.first, int(self.random.integers(2)))
        self.outcome: str | None = None
        if self.mark == 1:
            self._move(self._opponent_action())
        return self.text(self.mark)

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        if self._move(action) is None and self._move(self._opponent_action()) is None:
            return self.text(self.mark), None
        said = {"win": "you win", "draw": "draw", "loss": "you lose", "illegal": "illegal move you lose"}[self.outcome]
        kind = self.opponent if isinstance(self.opponent, str) else "function"
        success = self.outcome == "win" or (self.outcome == "draw" and kind in self.draws_suffice)
        reward = OUTCOMES.get(self.outcome, -1.0)
        return f"{said} {self.board(*self._by_mark())}", (reward, success)

    def step(self, action: str) -> Any:
        text, reward, terminated, truncated, info = super().step(action)
        return text, reward, terminated, truncated, info | ({"outcome": self.outcome} if terminated else {})

    def text(self, mark: int) -> str:
        """Returns what a player sees."""
        return f"you are {MARKS[mark]} board {self.board(*self._by_mark())}"

    def to_move(self) -> int:
        """Returns the mark that moves next, 0 or 1."""
        own, other = self.position
        return int(own.bit_count() != other.bit_count())

    def _by_mark(self) -> tuple[int, int]:
        return self.position[::-1] if self.to_move() else self.position

    def _move(self, action: str) -> str | None:
        """Plays an action of the player who moves next. Returns the agent's outcome if the game ends, else None."""
        mine, (own, other) = self.to_move() == self.mark, self.position
        cell = self.moves(own | other).get(action)
        if cell is None:
            self.outcome = "illegal" if mine else "win"
            return self.outcome
        self.position = (other, own | cell)
        if self.won(own | cell):
            self.outcome = "win" if mine else "loss"
        elif not self.moves(own | other | cell):
            self.outcome = "draw"
        return self.outcome

    def _opponent_action(self) -> str:
        if callable(self.opponent):
            return " ".join(self.opponent(self.text(self.to_move())).lower().split())
        if self.opponent == "random":
            return pick(self.random, tuple(self.moves(self.position[0] | self.position[1])))
        return pick(self.random, self.best_actions())

    # Alpha-beta search.
    def best_actions(self) -> tuple[str, ...]:
        """Returns all actions of the greatest value for the player who moves next, `depth` moves deep."""
        own, other = self.position
        best, found = -2 * WON, []
        depth = 10**6 if self.depth is None else self.depth
        for action, cell in self.moves(own | other).items():
            # The window begins below the best value, so that a move of the same value is told from a worse one.
            value = -self.search(other, own | cell, depth - 1, -2 * WON, -(best - 1))
            if value >= best:
                found = [*(found if value == best else []), action]
                best = value
        return tuple(found)

    def search(self, own: int, other: int, depth: int, alpha: int, beta: int) -> int:
        """Returns the value of a position for the player who moves next (negamax with alpha-beta, fail-hard)."""
        taken = own | other
        if self.won(other):
            return max(alpha, min(beta, taken.bit_count() - WON))  # a later loss is better
        moves = self.moves(taken)
        if not moves or depth == 0:
            return max(alpha, min(beta, self.heuristic(own, other) if moves else 0))
        for cell in moves.values():
            alpha = max(alpha, -self.search(other, own | cell, depth - 1, -beta, -alpha))
            if alpha >= beta:
                break
        return alpha


def demonstrator(knows: float) -> Callable[[BoardGame, Random], str]:
    """Returns a player of legal moves, of which the share `knows` is the best."""

    def act(env: BoardGame, rng: Random) -> str:
        legal = tuple(env.moves(env.position[0] | env.position[1]))
        return pick(rng, env.best_actions() if rng.random() < knows else legal)

    return act
