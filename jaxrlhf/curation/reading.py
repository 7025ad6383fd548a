"""Reads rows as the stages read them, and finds out which kind of data a file holds."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from jaxrlhf.config.data import DemonstrationsSourceConfig, PreferencesSourceConfig, PromptsSourceConfig
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.curation.similarity import digest
from jaxrlhf.data import preferences, prompts, sft
from jaxrlhf.data.chats import Chat, Prompt, Response, content_text
from jaxrlhf.data.fields import has_field, number_field, text_field
from jaxrlhf.data.sources import Row, Skip, describe, stream_rows
from jaxrlhf.data.templates import template_writer
from jaxrlhf.errors import UserError, short

HEAD = 200  # rows that decide about the kind
OPTIONAL = ("margin_field", "tools_field", "chat_template_kwargs_field")  # settings of fields that only some rows have
_IS_ID = re.compile(r"(.*_)?(id|idx|index|uid|uuid|source)", re.IGNORECASE)


class Fields(DemonstrationsSourceConfig, PreferencesSourceConfig, PromptsSourceConfig):
    """A source of any kind: the names of all fields that a stage reads, and of the label."""

    label_field: str = Field("label", description="column with the class of a text: text or a number")


@dataclass(frozen=True)
class Content:
    """The content of a row. Only `pairs` holds chats as chats; the other fields hold them as plain text."""

    prompt: str  # "" if the row has no prompt
    responses: tuple[str, ...]  # the response; or chosen and rejected; or nothing
    label: str | int | float | None
    pairs: tuple[tuple[Prompt, Response | None], ...]  # None: no response
    others: str = ""  # of prompts: the other columns, which rewards read; a prompt with another answer is another task

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt, *self.responses)

    @property
    def key(self) -> int:
        """A hash that is the same for equal rows."""
        return digest(*self.texts, repr(self.label), self.others)

    @property
    def subject(self) -> str:
        """The text that must not be in two parts of a data set: the prompt, else the whole text."""
        return self.prompt or self.responses[0]


@dataclass(frozen=True)
class Source:
    """The rows of a file. `read` returns the content of a row, or raises UserError with its place."""

    path: str
    kind: str
    fields: Fields
    rows: Iterator[Row]
    read: Callable[[Row], Content]


def parse_fields(path: str, settings: Sequence[str]) -> Fields:
    """Returns the settings of a source from texts such as `prompt_field=question`."""
    given: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if key == "path" or not equals or key not in Fields.model_fields:
            known = ", ".join(name for name in Fields.model_fields if name != "path")
            raise UserError(f"{short(text)}: must have the form SETTING=VALUE; the settings of a source are: {known}")
        given[key] = parse_yaml(value, f"setting {short(text)}")
    try:
        return Fields(path=path, **given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def open_source(path: str, kind: str | None = None, settings: Sequence[str] = (), skip: Skip | None = None) -> Source:
    """Opens a file. `kind` is one of `KINDS`; None means that the fields of the first rows decide.

    `skip` receives the errors of lines that hold no row. Raises UserError if the file cannot be read, if it has no
    rows, or if its rows have the fields of no kind.
    """
    fields = parse_fields(path, settings)
    unreadable: list[UserError] = []  # the first of them

    def noted(error: UserError) -> None:
        if not unreadable:
            unreadable.append(error)
        skip(error)

    stream = stream_rows(fields, None if skip is None else noted)
    if fields.template or fields.messages_template or fields.response_template:  # these need all rows
        stream = iter(template_writer(fields, drop=True)(list(stream)))
    head = list(itertools.islice(stream, HEAD))
    if not head and unreadable:
        raise UserError(f"{unreadable[0]}; no row of the file can be read")
    if not head:
        raise UserError(f"{path}: the file has no rows; it must have at least one")
    _check_named(head, fields)
    kind = kind or _kind_of(head, fields)
    reader = KINDS[kind](fields, head)

    def read(row: Row) -> Content:
        if row.fault is not None:
            raise UserError(row.fault)
        return reader(row, fields)

    return Source(path, kind, fields, itertools.chain(head, stream), read)


def _check_named(rows: Sequence[Row], fields: Fields) -> None:
    """Raises UserError if a setting names a field that no row has."""
    for setting in sorted(name for name in fields.model_fields_set if name.endswith("_field")):
        name = getattr(fields, setting)
        if name and setting not in OPTIONAL and not any(name in row.values for row in rows):
            raise UserError(
                f"{setting}: none of the first {len(rows)} rows has the field {name!r}; the fields are: "
                f"{', '.join(rows[0].values)}"
            )


def _kind_of(rows: Sequence[Row], fields: Fields) -> str:
    """Returns the first kind of `needed` whose fields half of the rows have, else the kind that fits most rows."""
    prompt, text, label = fields.prompt_field, fields.text_field, fields.label_field
    needed = {
        "preferences": [{fields.chosen_field, fields.rejected_field}],
        "demonstrations": [{prompt, fields.response_field}, {prompt, sft.COMPLETION}],
        "classification": [{prompt, label}, {text, label}],
        "chats": [{fields.messages_field}],
        "prompts": [{prompt}],
        "text": [{text}],
    }
    present = [{name for name in row.values if has_field(row, name)} for row in rows]
    counts = {kind: sum(any(form <= names for form in forms) for names in present) for kind, forms in needed.items()}
    best = next((kind for kind, count in counts.items() if 2 * count >= len(rows)), max(counts, key=counts.get))
    if not counts[best]:
        raise UserError(
            f"{rows[0].where}: the row has the fields of no kind of data; its fields are: "
            f"{', '.join(rows[0].values) or 'none'}; name the fields, such as prompt_field=question "
            "response_field=answer"
        )
    return best


Reader = Callable[[Row, Fields], Content]


def _preferences(fields: Fields, head: Sequence[Row]) -> Reader:
    def read(row: Row, fields: Fields) -> Content:
        number_field(row, fields.margin_field, 0.0)
        prompt, chosen, rejected = preferences.split_pair(row, fields)
        return Content(flat(prompt), (flat(chosen), flat(rejected)), None, ((prompt, chosen), (prompt, rejected)))

    return read


def _with_response(form: sft.Form) -> Reader:
    def read(row: Row, fields: Fields) -> Content:
        prompt, response = form(row, fields)
        return Content(flat(prompt), (flat(response),), None, ((prompt, response),))

    return read


def _demonstrations(fields: Fields, head: Sequence[Row]) -> Reader:
    named = "response_field" in fields.model_fields_set
    usual = sum(has_field(row, fields.response_field) for row in head)
    other = 0 if named else sum(has_field(row, sft.COMPLETION) for row in head)
    return _with_response(sft.prompt_and(sft.COMPLETION if other > usual else fields.response_field))


def _classification(fields: Fields, head: Sequence[Row]) -> Reader:
    names = (fields.prompt_field, fields.text_field)
    name = max(names, key=lambda name: sum(has_field(row, name) for row in head))

    def read(row: Row, fields: Fields) -> Content:
        text, label = text_field(row, name), row.values.get(fields.label_field)
        if not isinstance(label, str | int | float) or not str(label).strip():
            raise UserError(
                f"{row.where}: field {fields.label_field!r} must be a label, which is text or a number, not "
                f"{describe(label)}"
            )
        return Content(text, (), label, ((text, None),))

    return read


def _prompts(fields: Fields, head: Sequence[Row]) -> Reader:
    _, form = prompts.form_of(fields, head)

    def read(row: Row, fields: Fields) -> Content:
        prompt = form(row, fields)
        return Content(flat(prompt), (), None, ((prompt, None),), _other_columns(row, fields))

    return read


def _other_columns(row: Row, fields: Fields) -> str:
    """Returns the columns beside the prompt, as one text. Columns that identify a row, such as id, are left out."""
    prompt = (fields.prompt_field, fields.messages_field, fields.text_field)
    others = {name: value for name, value in row.values.items() if name not in prompt and not _IS_ID.fullmatch(name)}
    return repr(sorted(item for item in others.items() if item[1] is not None)) if others else ""


KINDS: dict[str, Callable[[Fields, Sequence[Row]], Reader]] = {
    "preferences": _preferences,
    "demonstrations": _demonstrations,
    "classification": _classification,
    "chats": lambda fields, head: _with_response(sft.read_chat),
    "prompts": _prompts,
    "text": lambda fields, head: _with_response(sft.read_text),
}


def flat(value: Prompt | Response) -> str:
    """Returns a text unchanged, and a chat as lines "role: content"."""
    if isinstance(value, str):
        return value
    messages = value.messages if isinstance(value, Chat) else [value] if isinstance(value, dict) else value
    return "\n".join(_turn(message) for message in messages)


def _turn(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return f"{message['role']}: {content_text(message)}" + (json.dumps(calls, sort_keys=True) if calls else "")
