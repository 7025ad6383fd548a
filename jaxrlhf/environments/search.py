"""A search over a folder of texts, for language models: BM25 (Robertson and Zaragoza 2009) in numpy."""

import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxrlhf.errors import UserError, one_line

SUFFIXES = (".txt", ".md", ".rst")
MAX_PASSAGES = 1_000_000
_WORD = re.compile(r"\w+")
_lock = threading.Lock()  # environments in threads make their tools at the same time
_shared: dict[tuple[Path, float, float], tuple[list[tuple[Path, int, int]], "TextSearch"]] = {}


class TextSearch:
    """An index of the paragraphs of a folder's texts (.txt, .md, .rst, also in folders below it).

    The score of a passage is the sum, over the words of the query, of idf x tf (k1 + 1) / (tf + k1 (1 - b + b length /
    mean length)) with idf = log(1 + (N - n + 0.5) / (n + 0.5)), as in Lucene.

    Args:
      folder: the folder. Raises UserError if it has no text.
      k1, b: parameters of BM25.
    """

    def __init__(self, folder: str | Path, k1: float = 1.5, b: float = 0.75) -> None:
        root = Path(folder)
        files = _files(root)
        self.passages: list[tuple[str, str]] = []  # (file, text)
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
            name = path.relative_to(root).as_posix()
            self.passages += [(name, " ".join(part.split())) for part in re.split(r"\n\s*\n", text) if part.strip()]
        if not self.passages:
            raise UserError(f"{root}: there is no text to search; it needs files {', '.join(SUFFIXES)}")
        if len(self.passages) > MAX_PASSAGES:
            raise UserError(f"{root}: {len(self.passages):,} paragraphs are too many; at most {MAX_PASSAGES:,} fit")
        counts = [Counter(words_of(text)) for _, text in self.passages]
        lengths = np.array([count.total() for count in counts], float)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        postings: dict[str, list[tuple[int, int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                postings.setdefault(word, []).append((number, times))
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # word -> (passages, weight in each)
        for word, found in postings.items():
            numbers, times = (np.array(column) for column in zip(*found))
            idf = np.log(1 + (len(counts) - len(found) + 0.5) / (len(found) + 0.5))
            self._weights[word] = numbers, idf * times * (k1 + 1) / (times + norm[numbers])

    def scores(self, query: str) -> np.ndarray:
        """Returns the score of each passage, f64[passages]."""
        total = np.zeros(len(self.passages))
        for word in words_of(query):
            if word in self._weights:
                numbers, weights = self._weights[word]
                total[numbers] += weights
        return total

    def best(self, query: str, count: int) -> list[tuple[str, str, float]]:
        """Returns (file, passage, score) of the best passages with a score above 0; earlier passages first if equal."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        return [(*self.passages[i], float(scores[i])) for i in order if scores[i] > 0]


def shared_search(folder: str | Path, k1: float = 1.5, b: float = 0.75) -> TextSearch:
    """Returns the `TextSearch` of a folder. A process has one for all its environments, until a file changes."""
    root = Path(folder).resolve()
    with _lock:
        state = [(path, found.st_mtime_ns, found.st_size) for path in _files(root) if (found := path.stat())]
        if (root, k1, b) not in _shared or _shared[root, k1, b][0] != state:
            _shared[root, k1, b] = state, TextSearch(folder, k1, b)
        return _shared[root, k1, b][1]


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def search_tool(folder: str | Path, results: int = 3, max_chars: int = 500) -> Callable[[str], str]:
    """Returns the tool `search`, which returns the best passages of a folder's texts.

    Args:
      folder: see `TextSearch`.
      results: number of passages.
      max_chars: longest part of a passage.
    """
    index = shared_search(folder)

    def search(query: str) -> str:
        """
        Searches the texts and returns the best passages.

        Args:
            query: The words to search for.
        """
        found = index.best(query, results)
        return "\n".join(f"[{name}] {text[:max_chars]}" for name, text, _ in found) or "nothing found"

    return search


def words_of(text: str) -> list[str]:
    """Returns the words of a text, lower case."""
    return _WORD.findall(text.lower())
