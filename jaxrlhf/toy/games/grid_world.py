"""Grid world: walk to a goal between walls. The best success is 1: a path exists, and `best_action` walks a shortest.

The demonstrations take a step of a shortest path in a fourteenth of the steps and else a random step.
"""

from collections import deque
from typing import Any

from jaxrlhf.toy.games.game import Game, demonstrations
from jaxrlhf.toy.tasks.task import Random, pick

MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
LARGEST = 9
KNOWS = 0.07  # share of the steps of a demonstration on a shortest path
Cell = tuple[int, int]


class GridWorld(Game):
    """An environment: reach the goal in a square grid of width `size` (2 to 9), in at most `steps` steps.

    An observation has the position (x y, from 1, north is up), the goal, and the ways that are free. An action is
    north, south, east or west. Walls, borders and unknown actions cost a step. `walls` is the share of cells that are
    walls; a wall that would cut off a cell, or put the goal out of reach in `steps`, is left out. The reward of success
    is 1. `steps` null means 2 x size.
    """

    def __init__(self, size: int = 5, walls: float = 0.2, steps: int | None = None) -> None:
        if not 2 <= size <= LARGEST or not 0 <= walls < 1:
            raise ValueError(f"size must be 2 to {LARGEST} and walls 0 to 1, not {size} and {walls}")
        if steps is not None and steps < 2 * (size - 1):
            raise ValueError(f"steps must be at least {2 * (size - 1)} for the size {size}, not {steps}")
        self.size, self.share, self.steps = size, walls, 2 * size if steps is None else steps

    def start(self, options: dict[str, Any]) -> str:
        cells = [(x, y) for x in range(1, self.size + 1) for y in range(1, self.size + 1)]
        order = [cells[i] for i in self.random.permutation(len(cells))]
        self.at, self.goal = order[:2]
        self.walls: set[Cell] = set()
        for cell in order[2:]:
            if len(self.walls) < round(self.share * len(cells)):
                self.walls.add(cell)
                found = self.distances()
                if len(found) + len(self.walls) < len(cells) or found[self.at] > self.steps:
                    self.walls.discard(cell)
        self.left, self.shortest = self.steps, self.distances()[self.at]
        return f"goal {self.goal[0]} {self.goal[1]} " + self._view()

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        self.left -= 1
        said = ""
        if action in self.free():
            self.at = self._beside(self.at, action)
        else:
            said = "no way " if action in MOVES else "say a direction "
        if self.at == self.goal:
            return "you are there", (1.0, True)
        return said + self._view(), None if self.left > 0 else (0.0, False)

    def free(self) -> list[str]:
        """Returns the moves that are possible."""
        return [move for move in MOVES if self._open(self._beside(self.at, move))]

    def distances(self) -> dict[Cell, int]:
        """Returns the number of steps to the goal from each cell that can reach it (breadth-first search)."""
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            cell = queue.popleft()
            for move in MOVES:
                beside = self._beside(cell, move)
                if self._open(beside) and beside not in found:
                    found[beside] = found[cell] + 1
                    queue.append(beside)
        return found

    def best_action(self) -> str:
        """Returns the first move on a shortest path."""
        found = self.distances()
        return min(self.free(), key=lambda move: found[self._beside(self.at, move)])

    def _view(self) -> str:
        return f"you are at {self.at[0]} {self.at[1]} ways {' '.join(self.free())}"

    def _open(self, cell: Cell) -> bool:
        return cell not in self.walls and all(1 <= place <= self.size for place in cell)

    def _beside(self, cell: Cell, move: str) -> Cell:
        return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def demonstrator(env: GridWorld, rng: Random) -> str:
    """Returns the action of an imperfect expert."""
    return env.best_action() if rng.random() < KNOWS else pick(rng, tuple(MOVES))


TASK = demonstrations(
    GridWorld,
    {demonstrator: 1.0},
    (*MOVES, "goal you are at ways no way say a direction there", *(str(n) for n in range(1, LARGEST + 1))),
    {"train": 2000, "validation": 200, "test": 500},
)
