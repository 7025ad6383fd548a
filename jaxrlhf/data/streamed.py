"""Batches and prompts of streams. They have the methods of data sets in memory, and also save their position."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from jaxrlhf.data.order import epoch_order
from jaxrlhf.data.preferences import PreferenceData
from jaxrlhf.data.prompts import LoadedPrompt, PromptSet, left_pad
from jaxrlhf.data.sft import SFTData
from jaxrlhf.data.streams import Stream, Window
from jaxrlhf.records import PreferenceBatch, Prompts, SFTBatch

T = TypeVar("T")
Batches = SFTData | PreferenceData


class StreamedBatches(Generic[T]):
    """The batches of a stream, in order: those of the first window, of the second one, and so on.

    When a window begins, the next one is read too, because it must be known which window is the last. So two
    windows are in memory. Padded lengths are the same in all windows, so that a new window needs no new compilation.
    """

    def __init__(self, stream: Stream[T], make: Callable[[list[T], Any], Batches], max_length: int, passes: int):
        """`make(items, bounds)` returns the batches of a window. If bounds is None, the items set the lengths."""
        bounds = make(stream.first.items, None).bounds
        if not stream.first.ends_pass:  # later windows may have longer rows
            bounds = np.unique(np.append(bounds, max_length))
        self.stream, self._passes = stream, passes
        self._make: Callable[[list[T]], Batches] = lambda items: make(items, bounds)
        self._window, self._data = stream.first, self._make(stream.first.items)
        self._first = 0  # number of the first batch of the window
        self._next: tuple[Window[T], Batches] | None = None
        self._looked = False  # whether `_next` was read

    def batch(self, step: int) -> SFTBatch | PreferenceBatch:
        """Returns the batch at a step, as numpy arrays. The step must not be before the current window."""
        self._reach(step)
        if step >= self._first + len(self._data):
            raise IndexError(f"the stream has {self._first + len(self._data)} batches, but step {step} is requested")
        # The number of the window shuffles the window, as the number of the epoch shuffles data in memory.
        return self._data.batch(self._window.number * len(self._data) + step - self._first)

    def total(self, step: int) -> int | None:
        """Returns the number of all batches if the batch at `step` is in the last window or after it, else None."""
        self._reach(step)
        return self._first + len(self._data) if self._following() is None else None

    def checksum(self) -> str:
        """Returns a hash of the rows that are read before the first step."""
        return self.stream.checksum()

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the window of the last batch."""
        return self._window.metrics()

    def notes(self, step: int) -> dict[str, Any]:
        """Returns the position for a checkpoint after `step` batches, as JSON values."""
        return self._window.notes(self._first)

    def resume(self, notes: dict[str, Any]) -> None:
        """Continues from the notes of a checkpoint. Raises UserError if the rows have changed."""
        self._window, self._first = self.stream.again(notes), notes["first"]
        self._data, self._next, self._looked = self._make(self._window.items), None, False

    def _reach(self, step: int) -> None:
        while step >= self._first + len(self._data) and (following := self._following()) is not None:
            self._first += len(self._data)
            self.stream.forget_first()
            (self._window, self._data), self._looked = following, False

    def _following(self) -> tuple[Window[T], Batches] | None:
        if not self._looked:
            self._next = self.stream.following(self._window.end, self._make, self._passes)
            self._looked = True
        return self._next


class StreamedPrompts:
    """An endless sequence of prompts. Prompts are numbered consecutively over all windows.

    Windows are kept until `release`, because an iteration may draw prompts from several windows.
    """

    success = None  # the curriculum by success needs all prompts

    def __init__(self, stream: Stream[LoadedPrompt], make: Callable[[list[LoadedPrompt]], PromptSet], batch_size: int):
        """`make` returns the prompts of a window. `batch_size` is the number of prompts of a draw."""
        self.stream, self._make, self._batch_size = stream, make, batch_size
        self.first_window = make(stream.first.items)
        self._windows: list[tuple[int, Window[LoadedPrompt], PromptSet]] = [(0, stream.first, self.first_window)]
        self.ids, self.texts = _ByNumber(self, "ids"), _ByNumber(self, "texts")
        self.chats, self.columns = _ByNumber(self, "chats"), _ByNumber(self, "columns")

    def rows(self, seed: int, draw: int, batch_size: int) -> np.ndarray:
        """Returns the prompt numbers, i64[batch_size], of a draw. Each pass has each prompt once."""
        positions = range(draw * batch_size, (draw + 1) * batch_size)
        while positions[-1] >= (end := self._end()):
            window, prompts = self.stream.following(self._windows[-1][1].end, self._make)
            self._windows.append((end, window, prompts))
        return np.array([self._number(seed, position) for position in positions], np.int64)

    def padded(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        """Returns the prompts with these numbers as numpy Prompts [len(rows), max_prompt_tokens]."""
        first = self.first_window
        return left_pad([self.ids[i] for i in rows], first.max_prompt_tokens, first.pad_id)

    def find(self, number: int) -> tuple[int, Window[LoadedPrompt], PromptSet]:
        """Returns (number of the first prompt, window, prompts) of the window that holds a prompt."""
        return next(entry for entry in reversed(self._windows) if entry[0] <= number)

    def release(self, draw: int) -> None:
        """Forgets the windows that draw number `draw` and later draws do not need."""
        while len(self._windows) > 1 and self._windows[1][0] <= draw * self._batch_size:
            del self._windows[0]

    def checksum(self) -> str:
        """Returns a hash of the rows that are read before the first iteration."""
        return self.stream.checksum()

    def metrics(self, draw: int) -> dict[str, float]:
        """Returns the metrics of the window that holds the last prompt before draw number `draw`."""
        return self.find(draw * self._batch_size - 1)[1].metrics()

    def notes(self, draw: int) -> dict[str, Any]:
        """Returns the position for a checkpoint after `draw` draws, as JSON values."""
        first, window, _ = self.find(draw * self._batch_size)
        return window.notes(first)

    def resume(self, notes: dict[str, Any]) -> None:
        """Continues from the notes of a checkpoint. Raises UserError if the rows have changed."""
        window = self.stream.again(notes)
        self._windows = [(notes["first"], window, self._make(window.items))]

    def _end(self) -> int:
        first, _, prompts = self._windows[-1]
        return first + len(prompts)

    def _number(self, seed: int, position: int) -> int:
        first, window, prompts = self.find(position)
        return first + int(epoch_order(seed, window.number, len(prompts))[position - first])


class _ByNumber:
    """One of the lists in `PromptSet`, over all windows. Its index is the prompt number."""

    def __init__(self, prompts: StreamedPrompts, name: str):
        self._prompts, self._name = prompts, name

    def __getitem__(self, number: int) -> Any:
        first, _, prompts = self._prompts.find(number)
        return getattr(prompts, self._name)[number - first]


PromptSource = PromptSet | StreamedPrompts
"""The prompts of the ppo stage, in memory or streamed."""
