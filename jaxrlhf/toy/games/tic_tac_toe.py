"""Tic-tac-toe as text. Against perfect play the best result is a draw.

The demonstrations play against perfect play and take the best move in a third of their turns.
"""

from functools import cache
from typing import ClassVar

from jaxrlhf.toy.games.board_game import SAID, BoardGame, demonstrator
from jaxrlhf.toy.games.game import demonstrations

LINES = tuple(
    sum(1 << cell for cell in line)
    for line in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
)
KNOWS = 0.35  # share of the moves of a demonstration that are the best


class TicTacToe(BoardGame):
    """An environment: three in a row. An action is the number of a free cell, 1 to 9. See `BoardGame` for arguments.

    The board has the number of each free cell: `1 2 3 / 4 x 6 / 7 8 o`. Minimax searches the whole game, so it never
    loses, and a draw against it is a success.
    """

    draws_suffice: ClassVar[tuple[str, ...]] = ("minimax",)

    def moves(self, taken: int) -> dict[str, int]:
        return {str(cell + 1): 1 << cell for cell in range(9) if not taken >> cell & 1}

    def won(self, cells: int) -> bool:
        return any(cells & line == line for line in LINES)

    def board(self, x: int, o: int) -> str:
        cells = ["x" if x >> i & 1 else "o" if o >> i & 1 else str(i + 1) for i in range(9)]
        return " / ".join(" ".join(cells[row : row + 3]) for row in (0, 3, 6))

    def best_actions(self) -> tuple[str, ...]:
        return _best_actions(*self.position) if self.depth is None else super().best_actions()


@cache
def _best_actions(own: int, other: int) -> tuple[str, ...]:
    game = TicTacToe()
    game.position = (own, other)
    return BoardGame.best_actions(game)


TASK = demonstrations(
    lambda: TicTacToe("minimax"),
    {demonstrator(KNOWS): 1.0},
    (*SAID, "/", *(str(cell) for cell in range(1, 10))),
    {"train": 2000, "validation": 200, "test": 500},
)
