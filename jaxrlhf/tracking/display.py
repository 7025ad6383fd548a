"""The live display of a stage on a terminal, drawn with rich."""

import collections
import contextlib
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

PERIOD = 0.25  # seconds between drawings
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_streams: list[tuple[object, object]] = []  # the real stdout and stderr, while a display replaces them


def _restore_in_child() -> None:
    """Lets a forked child process print without the display.

    A thread of the parent may hold the display's lock forever.
    """
    if _streams:
        sys.stdout, sys.stderr = _streams[-1]


os.register_at_fork(after_in_child=_restore_in_child)


def fits_terminal() -> bool:
    """Whether stderr is a terminal that can redraw lines."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Display:
    """Redraws `lines(width, unicode)` on stderr until `close`.

    Other lines that are printed appear above this drawing.
    """

    def __init__(self, lines: Callable[[int, bool], list[Text]]):
        self._lines, self._later = lines, collections.deque()
        self._unicode = _writes_unicode()
        self._console = Console(file=sys.stderr, force_terminal=True, soft_wrap=True, highlight=False, markup=False)
        # stdout is not replaced if it goes to a file, because its lines must not appear on the terminal.
        same = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=self._console, auto_refresh=False, get_renderable=self._drawn, redirect_stdout=same,
            vertical_overflow="crop",
        )  # fmt: skip
        _streams.append((sys.stdout, sys.stderr))
        self._live.start()
        self._console.show_cursor(True)  # the cursor stays visible, because a killed process could not show it again
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._redraw, name="display", daemon=True)
        self._thread.start()

    def _drawn(self) -> Group:
        return Group(*self._lines(self._console.width - 1, self._unicode))

    def _redraw(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal has closed
            while not self._ended.wait(PERIOD):
                self._print_later()
                self._live.refresh()

    def _print_later(self) -> None:
        while self._later:
            self._console.print(Text(self._later.popleft()))

    def say(self, text: str) -> None:
        """Prints a line at the next drawing. Takes no lock, so any thread may call this method at any moment."""
        self._later.append(text)

    def close(self) -> None:
        """Draws a last time. This drawing stays on the terminal."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):
            self._print_later()
            self._live.refresh()
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()
        _streams.pop()


def _writes_unicode() -> bool:
    try:
        (BARS + "━─").encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def bar(share: float, width: int, unicode: bool) -> Text:
    """Returns a bar of `width` characters. The part `share` (0 to 1) of the bar is filled."""
    filled = round(share * width)
    full, empty = ("━", "─") if unicode else ("#", "-")
    return Text(full * filled, "green") + Text(empty * (width - filled), "bright_black" if unicode else "")


def sparkline(values: Sequence[float], width: int, unicode: bool) -> str:
    """Returns the history of a figure as at most `width` characters.

    Each character shows the mean of an equal part of the values.
    """
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    bars = BARS if unicode else ASCII_BARS
    return "".join(bars[int((m - low) / (high - low) * (len(bars) - 1) + 0.5) if high > low else 0] for m in means)


def packed(parts: Sequence[Text], width: int, gap: int) -> list[Text]:
    """Returns the parts in as few lines as possible, without changing their order.

    A part longer than `width` is cut.
    """
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + gap + part.cell_len <= width:
            lines[-1].append(" " * gap).append_text(part)
        else:
            lines.append(Text().append_text(part))  # the line must not get the part's style
    for line in lines:
        line.truncate(width)
        line.no_wrap = True
    return lines
