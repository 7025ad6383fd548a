"""Writes prompts and responses of rows with jinja templates from the settings, with solved examples (few-shot).

These templates read the columns of a row. They are not the chat templates of a tokenizer, see `chats.py`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import ChatSourceConfig, DemonstrationsSourceConfig, RunConfig
from jaxrlhf.data.sources import Row, read_rows
from jaxrlhf.data.time_limit import within
from jaxrlhf.errors import SharedFault, UserError, one_line

SHOTS = "shots"  # the variable of a template that holds the solved examples
BLOCK, TIME_LIMIT = 256, 10.0  # rows that are written together, and the seconds that this may take

Template = Callable[[dict[str, Any]], Any]


def template_writer(config: ChatSourceConfig, drop: bool = False) -> Callable[..., list[Row]]:
    """Returns a function of (rows, first=0) that returns the rows with the fields that the config's templates write.

    `template` or `messages_template` writes the field `prompt_field`. `response_template` writes `response_field`.
    Without a template, the rows are unchanged. `first` is the number of the first of the rows in their source. If a
    template fails on a row, for example because the row lacks a column, UserError is raised. If `drop` is set, the row
    gets a `fault` instead; UserError is raised if every row of the first call has a fault. Raises UserError if a
    template is not valid jinja. The examples of `shots` are read once.
    """
    templates = _templates(config)
    shots = _shots(config) if templates else None
    began = False

    def write(rows: list[Row], first: int = 0) -> list[Row]:
        nonlocal began
        if not templates:
            return rows
        written: list[Row] = []
        numbered = list(enumerate(rows, first))
        for start in range(0, len(rows), BLOCK):
            block = numbered[start : start + BLOCK]
            try:
                written += within(TIME_LIMIT, functools.partial(_write_block, block, templates, shots, drop))
            except TimeoutError:
                raise SharedFault(
                    f"{block[0][1].where}: the template took more than {TIME_LIMIT:g} seconds for {len(block)} rows "
                    "from this row on; correct its loops"
                ) from None
        if not began and all(row.fault is not None for row in written):
            raise UserError(written[0].fault)
        began = True
        return written

    return write


def _write_block(block: list[tuple[int, Row]], templates: dict[str, Template], shots, drop: bool) -> list[Row]:
    return [_written(row, templates, shots(n, row), drop) for n, row in block]


def _templates(config: ChatSourceConfig) -> dict[str, Template]:
    """Returns the config's templates by the name of the field that they write."""
    templates: dict[str, Template] = {}
    if config.template is not None:
        templates[config.prompt_field] = compiled(config.template, f"{config.path}: template")
    if config.messages_template is not None:
        templates[config.prompt_field] = _messages(config.messages_template, f"{config.path}: messages_template")
    if isinstance(config, DemonstrationsSourceConfig) and config.response_template is not None:
        templates[config.response_field] = compiled(config.response_template, f"{config.path}: response_template")
    return templates


def _messages(messages: Sequence[dict[str, str]], what: str) -> Template:
    renders = [
        (message["role"], compiled(message["content"], f"{what}, message {number}"))
        for number, message in enumerate(messages, 1)
    ]
    return lambda columns: [{"role": role, "content": render(columns)} for role, render in renders]


def compiled(template: str, what: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(template).render
    except TemplateSyntaxError as error:
        raise UserError(f"{what}, line {error.lineno}: not valid jinja ({error.message})") from None


@functools.cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def _written(row: Row, templates: dict[str, Template], shots: dict[str, Any], drop: bool) -> Row:
    values = dict(row.values)
    for name, render in templates.items():
        try:
            values[name] = render(row.values | shots)  # both templates read the columns of the file
        except Exception as error:  # jinja, or an operator or a filter on a value of a wrong type
            columns = ", ".join(row.values) or "none"
            fault = f"{row.where}: the template of field {name!r} fails: {one_line(error)}; the row has: {columns}"
            if not drop:
                raise UserError(fault) from None
            return dataclasses.replace(row, fault=fault)
    return dataclasses.replace(row, values=values)


def _shots(config: ChatSourceConfig) -> Callable[[int, Row], dict[str, Any]]:
    """Returns a function that returns the variables of the solved examples for row number n."""
    shots = config.shots
    if shots is None:
        return lambda n, row: {}
    examples = [example.values for example in read_rows(shots)]

    def of_row(n: int, row: Row) -> dict[str, Any]:
        if SHOTS in row.values:
            raise UserError(
                f"{row.where}: the column {SHOTS!r} has the name that templates use for the solved examples; "
                "rename the column"
            )
        order = range(len(examples))
        if shots.choose == "random":
            order = np.random.default_rng([shots.seed, n]).permutation(len(examples))
        others = (examples[i] for i in order if examples[i] != row.values)
        chosen = list(itertools.islice(others, shots.count))
        if len(chosen) < shots.count:
            raise UserError(
                f"{shots.path}: shots.count is {shots.count}, but the source has only {len(chosen)} examples that "
                f"differ from the row {row.where}; give more examples, or lower count"
            )
        return {SHOTS: chosen}

    return of_row


def data_of(config: RunConfig | None) -> ChatSourceConfig | None:
    """Returns the data of the run's ppo stage, else of its sft stage, else None."""
    stages = () if config is None else (config.ppo, config.sft)
    return next((stage.data for stage in stages if stage is not None and stage.data is not None), None)


def format_of(source: ChatSourceConfig, prompt_field: str | None) -> dict[str, Any]:
    """Returns the settings that decide how prompts are written, so that rows of another source are written alike.

    If `prompt_field` is given, the rows have finished prompts in this field, and the source's templates are left out.
    """
    names = ["tools", "chat_template_kwargs"]
    if prompt_field is None:
        names += ["template", "messages_template", "shots"]
    given = {name: getattr(source, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
