"""The builtin data sets and vocabularies, by name."""

from importlib import import_module

from jaxrlhf.errors import UserError
from jaxrlhf.toy import world
from jaxrlhf.toy.language import SPLITS
from jaxrlhf.toy.tasks import task

# Each name is a module of jaxrlhf/toy/tasks with a constant TASK.
TASKS = (
    "arithmetic",
    "calculator",
    "code",
    "customer_service",
    "detoxification",
    "dialogue",
    "helpful_assistant",
    "intent",
    "named_entities",
    "news_sentiment",
    "question_answering",
    "recommendation",
    "summarisation",
    "text_classification",
    "translation",
)
# Each name is a module of jaxrlhf/toy/games with a constant TASK: demonstrations of a text environment.
GAMES = (
    "connect_four",
    "grid_world",
    "number_guessing",
    "table_booking",
    "tic_tac_toe",
    "translation_feedback",
    "twenty_questions",
)


def _task(name: str) -> task.Task:
    return import_module(f"jaxrlhf.toy.{'games' if name in GAMES else 'tasks'}.{name}").TASK


def splits(name: str) -> tuple[str, ...]:
    """Returns the names of a set's splits. Raises `UserError` if there is no such set."""
    if name in TASKS + GAMES:
        return task.SPLITS
    if name in world.BUILTIN:
        return SPLITS
    raise UserError(
        f"builtin:{name}: no such builtin set; the builtin sets are "
        + ", ".join(f"builtin:{known}" for known in (*world.BUILTIN, *TASKS, *GAMES))
    )


def load(name: str, split: str, limit: int | None) -> list[dict]:
    """Returns the first `limit` rows of a split (None: the usual number). Every call returns the same rows."""
    return _task(name).load(split, limit) if name in TASKS + GAMES else world.BUILTIN[name](split, limit)


def vocabulary(name: str) -> tuple[tuple[str, ...], str | None]:
    """Returns (words, chat template or None) of a vocabulary: `assistant`, or the name of a task or game.

    Raises `UserError` if there is no such vocabulary.
    """
    if name == "assistant":
        return world.VOCABULARY, None
    if name in TASKS + GAMES:
        found = _task(name)
        return found.words, found.chat_template
    known = ", ".join(("assistant", *TASKS, *GAMES))
    raise UserError(f"model.new.vocabulary: no vocabulary {name!r}; the vocabularies are {known}")
