"""Connect-Four as text. The player who moves first can always win (Allis 1988, "A Knowledge-based Approach").

Minimax looks `depth` moves ahead and then counts the lines that each player can still fill, so it can be beaten. The
demonstrations play against the search of one move and take the best move in a quarter of their turns.
"""

from jaxrlhf.toy.games.board_game import SAID, BoardGame, Opponent, demonstrator
from jaxrlhf.toy.games.game import demonstrations

COLUMNS, ROWS = 7, 6
# A column has one bit more than cells, so that no line goes from the top of a column into the next one.
BOTTOMS = tuple(1 << column * (ROWS + 1) for column in range(COLUMNS))
FULL = sum(((1 << ROWS) - 1) * bottom for bottom in BOTTOMS)
STEPS = (1, ROWS + 1, ROWS, ROWS + 2)  # up, right, right and down, right and up
ORDER = (3, 2, 4, 1, 5, 0, 6)  # the middle first: more cuts in the search
LINES = tuple(
    line
    for cell in range(COLUMNS * (ROWS + 1))
    for step in STEPS
    if (line := sum(1 << cell + i * step for i in range(4))) & FULL == line
)
WORTH = (0, 1, 5, 25)  # of a line with so many cells of one player and none of the other
KNOWS = 0.25  # share of the moves of a demonstration that are the best


class ConnectFour(BoardGame):
    """An environment: four in a line. An action is a column, 1 to 7. See `BoardGame` for arguments.

    The board has its rows from the top down, with `.` in each empty cell.
    """

    def __init__(self, opponent: str | Opponent = "random", first: str = "random", depth: int = 4) -> None:
        super().__init__(opponent, first, depth)

    def moves(self, taken: int) -> dict[str, int]:
        cells = ((column, (taken + BOTTOMS[column]) & (FULL & 63 * BOTTOMS[column])) for column in ORDER)
        return {str(column + 1): cell for column, cell in cells if cell}

    def won(self, cells: int) -> bool:
        return any((pairs := cells & cells >> step) & pairs >> 2 * step for step in STEPS)

    def board(self, x: int, o: int) -> str:
        def cell(row: int, bottom: int) -> str:
            return "x" if x & bottom << row else "o" if o & bottom << row else "."

        return " / ".join(" ".join(cell(row, bottom) for bottom in BOTTOMS) for row in reversed(range(ROWS)))

    def heuristic(self, own: int, other: int) -> int:
        value = 0
        for line in LINES:
            mine, theirs = (own & line).bit_count(), (other & line).bit_count()
            if not (mine and theirs):
                value += WORTH[mine] - WORTH[theirs]
        return value


TASK = demonstrations(
    lambda: ConnectFour("minimax", depth=1),
    {demonstrator(KNOWS): 1.0},
    (*SAID, "/ .", *(str(column) for column in range(1, COLUMNS + 1))),
    {"train": 1000, "validation": 100, "test": 200},
)
