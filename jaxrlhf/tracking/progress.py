"""The progress of a stage on stderr: a live display on a terminal, else a line every 30 seconds."""

import collections
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxrlhf.distributed import processes

if TYPE_CHECKING:
    from rich.text import Text

EVERY = 30.0  # seconds between lines if stderr is not a terminal
LONG_COMPILE = 5.0  # a compilation that takes at least this number of seconds gets a line
RECENT = 50  # number of last steps from which speed and time left are computed
MOST_KEPT = 256  # largest number of values in the history of a figure; more values are averaged in pairs


class Progress:
    """The progress of a stage. Only process 0 shows it.

    The time of compilations is left out when the time left and the tokens per second are computed.
    """

    def __init__(self, stage: str, total: int, done: int = 0):
        self.stage, self.total, self.done = stage, total, done
        self.values: dict[str, float] = {}
        self.alarms: Sequence[str] = ()
        self._history: dict[str, list[float]] = {}
        self._stride = self._seen = 0
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=RECENT)  # seconds, tokens
        self._compiling: tuple[str, float] | None = None  # program, start
        self._left_out = 0.0  # seconds since the last step that are left out of the speed
        self._began = self._last = self._printed = time.perf_counter()
        self._first = done
        self._display = None
        self._shown = False

    def open(self) -> None:
        """Starts to show the progress."""
        self._began = self._last = time.perf_counter()
        self._shown = processes.is_first() and sys.stderr is not None
        if self._shown:
            from jaxrlhf.tracking import display

            self._display = display.Display(self._drawn) if display.fits_terminal() else None

    def close(self) -> None:
        """Ends the display, or prints a last line."""
        shown, self._shown = self._shown, False
        if self._display is not None:
            self._display.close()
            self._display = None
        elif shown and self.done > self._first and self._printed != self._last:
            self._print(self._line())

    def say(self, text: str) -> None:
        """Prints a line above the display at the next drawing. Never waits for a lock."""
        if self._display is not None:
            self._display.say(text)

    @property
    def live(self) -> bool:
        """Whether there is a live display. The cursor is then at the end of the display's last line."""
        return self._display is not None

    def compiling(self, program: str | None) -> None:
        """Says that `program` begins to compile, or, if it is None, that the compilation has ended."""
        now = time.perf_counter()
        before, self._compiling = self._compiling, program and (program, now)
        if before is not None:
            self._left_out += now - before[1]
            if self._shown and self._display is None and now - before[1] >= LONG_COMPILE:
                self._print(f"{self.stage}: compiled {before[0]} in {duration(now - before[1])}")

    def leave_out(self, seconds: float) -> None:
        """Leaves `seconds` out of the speed: the time of an evaluation or a pause since the last step."""
        self._left_out += seconds

    def update(self, values: Mapping[str, float], tokens: int = 0, alarms: Sequence[str] = ()) -> None:
        """Counts a step. `values` are the key figures by label. `alarms` are the names of the active alarms."""
        now = time.perf_counter()
        seconds, self._left_out = now - self._last - self._left_out, 0.0
        self._last = now
        if seconds > 0:  # 0 or less if a compilation was part of an evaluation, and its time was left out twice
            self._recent.append((seconds, tokens))
        self.done, self.values, self.alarms = self.done + 1, dict(values), alarms
        self._remember()
        if self._shown and self._display is None and (self.done == self._first + 1 or now - self._printed >= EVERY):
            self._printed = now
            self._print(self._line())

    def _remember(self) -> None:
        self._seen += 1
        if self._seen % (1 << self._stride):
            return
        longest = 0
        for label, value in self.values.items():
            history = self._history.setdefault(label, [])
            history.append(value)
            longest = max(longest, len(history))
        if longest > MOST_KEPT:
            self._stride += 1
            self._history = {
                label: [(a + b) / 2 for a, b in zip(history[::2], history[1::2])]
                for label, history in self._history.items()
            }

    def speed(self) -> tuple[float | None, float | None]:
        """Returns (seconds until the stage ends, tokens per second), from recent steps.

        Both are None before the first step.
        """
        recent = list(self._recent)
        if not recent:
            return None, None
        seconds, tokens = sum(s for s, _ in recent), sum(t for _, t in recent)
        return seconds / len(recent) * (self.total - self.done), tokens / seconds if tokens else None

    # ---------------------------------------------------------------- if stderr is not a terminal

    def _line(self) -> str:
        left, tokens = self.speed()
        facts = [f"{self.stage}: step {self.done:,} of {self.total:,}"]
        if self.values:
            facts.append(", ".join(f"{label} {value:.3g}" for label, value in self.values.items()))
        if tokens is not None:
            facts.append(f"{tokens:,.0f} tokens/s")
        facts.append(f"{duration(left)} left" if self.done < self.total else f"took {duration(self._took())}")
        return "; ".join(facts)

    def _took(self) -> float:
        return self._last - self._began

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- on a terminal

    def _drawn(self, width: int, unicode: bool) -> list["Text"]:
        """Returns the lines of the display. No line is longer than `width`."""
        from rich.text import Text

        from jaxrlhf.tracking.display import bar, packed, sparkline

        compiling, (left, tokens) = self._compiling, self.speed()
        count = Text(f"{self.done:,}/{self.total:,}")
        if compiling is not None:
            state = Text(f"compiling {compiling[0]} {duration(time.perf_counter() - compiling[1])}", "yellow")
        elif self.done >= self.total:
            state = Text(f"took {duration(self._took())}")
        else:
            state = Text("first step" if left is None else f"{duration(left)} left")
        head = [Text(self.stage, "bold"), count, state]
        if tokens is not None:
            head.append(Text(f"{tokens:,.0f} tokens/s"))
        free = width - sum(part.cell_len + 2 for part in head)
        if free >= 8:
            head.insert(1, bar(self.done / max(self.total, 1), min(free, 40), unicode))
        size = 16 if width >= 100 else 10 if width >= 60 else 6
        figures = []
        for label, value in list(self.values.items()):
            line = sparkline(self._history.get(label, ()), size, unicode)
            figures.append(Text.assemble((label, "cyan"), f" {value:<6.3g} ", (line, "cyan"), " " * (size - len(line))))
        lines = packed(head, width, 2) + packed(figures, width, 2)
        if self.alarms:
            lines += packed([Text(f"alarm: {', '.join(self.alarms)}", "bold red")], width, 2)
        return lines


def duration(seconds: float) -> str:
    """Returns a duration as text, such as 0:42, 1:02:03 or 2 d 3 h."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
