"""The builtin data sets and vocabularies, by name."""

from importlib import import_module

from jaxrlhf.errors import UserError
from jaxrlhf.toy import world
from jaxrlhf.toy.language import SPLITS
from jaxrlhf.toy.tasks import task

# Each name is a module of jaxrlhf/toy/tasks with a constant TASK.
TASKS = (
    "customer_service",
    "dialogue",
    "intent",
    "named_entities",
    "news_sentiment",
    "question_answering",
    "summarisation",
    "text_classification",
    "translation",
)


def _task(name: str) -> task.Task:
    return import_module(f"jaxrlhf.toy.tasks.{name}").TASK


def splits(name: str) -> tuple[str, ...]:
    """Returns the names of a set's splits. Raises `UserError` if there is no such set."""
    if name in TASKS:
        return task.SPLITS
    if name in world.BUILTIN:
        return SPLITS
    raise UserError(
        f"builtin:{name}: no such builtin set; the builtin sets are "
        + ", ".join(f"builtin:{known}" for known in (*world.BUILTIN, *TASKS))
    )


def load(name: str, split: str, limit: int | None) -> list[dict]:
    """Returns the first rows of a split; `limit` null returns the usual number. Every call returns the same rows."""
    return _task(name).load(split, limit) if name in TASKS else world.BUILTIN[name](split, limit)


def vocabulary(name: str) -> tuple[tuple[str, ...], str | None]:
    """Returns (words, chat template or None) of a vocabulary: `assistant` or the name of a task.

    Raises `UserError` if there is no such vocabulary.
    """
    if name == "assistant":
        return world.VOCABULARY, None
    if name in TASKS:
        found = _task(name)
        return found.words, found.chat_template
    known = ", ".join(("assistant", *TASKS))
    raise UserError(f"model.new.vocabulary: no vocabulary {name!r}; the vocabularies are {known}")
