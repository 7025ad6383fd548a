"""Converts data sets of other projects to the rows that the stages read. This is the command `jaxrlhf data convert`.

`FORMATS` lists the formats. A row that cannot be converted stops the command with file and line, or is dropped.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxrlhf.config.base import LARGEST_FLOAT
from jaxrlhf.curation.reading import parse_fields
from jaxrlhf.curation.writing import check_output, jsonl_writer
from jaxrlhf.data.fields import has_field, messages_field, text_field, text_or_messages_field
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sources import Message, Row, describe, open_bytes, stream_rows
from jaxrlhf.errors import UserError

Values = dict[str, Any]

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "system": "system", "tool": "tool", "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
}  # fmt: skip


def convert(
    path: str,
    out: str,
    form: str,
    *,
    columns: dict[str, str] | None = None,
    drop: bool = False,
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> LoadReport:
    """Writes the rows of a file to `out` as JSON Lines and returns the counts.

    form      a key of `FORMATS`
    columns   for csv: new name -> name in the file; other columns keep their names
    drop      drops rows that cannot be converted; without it the first of them raises UserError
    settings  settings of the source, such as "split=test"
    """
    check_output(out, overwrite)
    report = LoadReport(path, 0)

    def refuse(error: UserError, where: str | None = None) -> None:
        if not drop:
            raise error
        where = where or str(error).split(": ")[0]
        report.drop(str(error).removeprefix(f"{where}: ").split("; ")[0], where)

    def skip(error: UserError) -> None:
        report.rows += 1
        refuse(error)

    rows = _conll(path) if form == "conll" else stream_rows(parse_fields(path, settings), skip)
    with jsonl_writer(out, overwrite) as write:
        for row in rows:
            report.rows += 1
            try:
                values = _renamed(row, columns or {}) if form == "csv" else FORMATS[form](row)
            except UserError as error:
                refuse(error, row.where)
                continue
            write(Row(values, row.where))
        if not report.rows:
            raise UserError(f"{path}: the file has no rows; it must have at least one")
        report.check()
    return report


def hh_rlhf(row: Row) -> Values:
    """Two dialogues. Each is one text, with turns "\\n\\nHuman: " and "\\n\\nAssistant: ", as in Anthropic/hh-rlhf."""
    chosen, rejected = (_dialogue(row, name) for name in ("chosen", "rejected"))
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if not common or chosen[:common] != rejected[:common] or len(chosen) != common + 1 or len(rejected) != common + 1:
        raise UserError(f"{row.where}: chosen and rejected must be the same dialogue up to the last turn")
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _dialogue(row: Row, name: str) -> list[Message]:
    start, *rest = _TURN.split("\n\n" + text_field(row, name).lstrip("\n"))
    turns = [{"role": _HH_ROLES[who], "content": said.strip()} for who, said in zip(rest[::2], rest[1::2])]
    if start.strip() or not turns or turns[-1]["role"] != "assistant":
        raise UserError(
            f"{row.where}: field {name!r} must be turns that begin with '\\n\\nHuman:' or '\\n\\nAssistant:', and the "
            "last must be the assistant's"
        )
    if not turns[-1]["content"]:
        raise UserError(f"{row.where}: field {name!r} ends with an empty turn; the response must have text")
    return turns


def ultrafeedback(row: Row) -> Values:
    """openbmb/UltraFeedback: best and worst of the scored `completions`; or pairs of chats `chosen` and `rejected`."""
    if not has_field(row, "completions"):
        chosen, rejected = (messages_field(row, name) for name in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise UserError(f"{row.where}: chosen and rejected must be the same chat up to the last turn")
        values = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        scores = [row.values.get(f"score_{name}") for name in ("chosen", "rejected")]
        return values | ({"margin": scores[0] - scores[1]} if all(map(_is_number, scores)) else {})
    prompt = [{"role": "user", "content": text_field(row, "instruction")}]
    return _best_and_worst(row, prompt, ("overall_score", "fine-grained_score"))


def scored(row: Row) -> Values:
    """Scored output of `data sample`: `prompt` and `completions` of {"response", "score"}. Keeps the best and worst."""
    return _best_and_worst(row, text_or_messages_field(row, "prompt"), ("score",))


def _best_and_worst(row: Row, prompt: str | list[Message], keys: Sequence[str]) -> Values:
    """Returns a preference pair. A completion's score is read from the first of `keys` that it has."""
    completions, found = row.values.get("completions"), []
    for number, answer in enumerate(completions if isinstance(completions, list) else [], 1):
        answer = answer if isinstance(answer, dict) else {}
        score = next((answer[key] for key in keys if answer.get(key) is not None), None)
        if not isinstance(answer.get("response"), str) or not answer["response"].strip() or not _is_number(score):
            raise UserError(f"{row.where}: completion {number} must have a `response` and a finite number `{keys[0]}`")
        found.append((float(score), answer["response"]))
    found.sort(key=lambda pair: pair[0])
    if len(found) < 2 or found[0][0] == found[-1][0]:
        raise UserError(f"{row.where}: the row must have two completions with different scores")
    (worst, rejected), (best, chosen) = found[0], found[-1]
    sides = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt, str):  # a chat's responses are turns
        sides = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"prompt": prompt, **sides, "margin": best - worst}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_FLOAT


def alpaca(row: Row) -> Values:
    """tatsu-lab/alpaca: `instruction`, an optional `input`, `output`, and optional `system` and `history`."""
    instruction = text_field(row, "instruction")
    given = text_field(row, "input", empty=True) if has_field(row, "input") else ""
    user = f"{instruction}\n\n{given}" if given.strip() else instruction
    turns = [{"role": "system", "content": text_field(row, "system")}] if row.values.get("system") else []
    for pair in row.values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{row.where}: field 'history' must be a list of [question, answer], not {describe(pair)}")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    answer = text_field(row, "output")
    return {"messages": [*turns, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def sharegpt(row: Row) -> Values:
    """ShareGPT: `conversations` of {"from": "human" or "gpt", "value"}. Turns after the last answer are left out."""
    turns = row.values.get("conversations", row.values.get("conversation"))
    if not isinstance(turns, list):
        raise UserError(f"{row.where}: field 'conversations' must be a list of turns, not {describe(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        role = _SHAREGPT_ROLES.get(str(turn.get("from")).lower()) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            found = f"the turn is {describe(turn)}"
            if isinstance(turn, dict):
                found = f"`from` is {describe(turn.get('from'))}, and `value` is {describe(turn.get('value'))}"
            raise UserError(
                f"{row.where}: turn {number} must have a text `value`, and `from` must be one of "
                f"{', '.join(_SHAREGPT_ROLES)}; {found}"
            )
        messages.append({"role": role, "content": turn["value"]})
    if isinstance(system := row.values.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{row.where}: the conversation has no answer to a turn of the user")
    if not messages[-1]["content"].strip():
        raise UserError(f"{row.where}: the last answer is empty; it must have text")
    return {"messages": messages}


def _conll(path: str) -> Iterator[Row]:
    """Yields a row per sentence. A line is a token and its columns, the last of which is the tag."""
    tokens: list[str] = []
    tags: list[str] = []
    begin = 1

    def sentence() -> Iterator[Row]:
        if tokens:
            yield Row({"tokens": list(tokens), "tags": list(tags)}, f"{path}:{begin}")
        tokens.clear()
        tags.clear()

    number = 0
    try:
        with open_bytes(path) as file:
            for number, data in enumerate(file, 1):
                line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not line or line.startswith("-DOCSTART-"):
                    yield from sentence()
                    begin = number + 1
                    continue
                columns = line.split("\t") if "\t" in line else line.split()
                if len(columns) < 2 or not re.fullmatch(r"O|[BIESLU]-\S+", columns[-1]):
                    raise UserError(f"{path}:{number}: must be a token and a tag such as O or B-PER, not {line[:60]!r}")
                tokens.append(columns[0])
                tags.append(columns[-1])
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from error
    yield from sentence()


def conll(row: Row) -> Values:
    """CoNLL-2003 and other files with a token and its tag per line. The tags are BIO, BIOES or BILOU.

    The response has a line "type: text" for each entity. The column `tags` has the tags as IOB2, which the rewards and
    metrics of entities read.
    """
    tokens, tags = row.values["tokens"], row.values["tags"]
    spans: list[tuple[str, list[str]]] = []
    iob2: list[str] = []
    inside = ""  # the type that an I tag continues
    for token, tag in zip(tokens, tags):
        mark, _, kind = tag.partition("-")
        if mark in "IEL" and kind == inside:
            spans[-1][1].append(token)
            iob2.append(f"I-{kind}")
        elif mark != "O":  # as in CoNLL's own evaluation, an I tag after another type begins an entity
            spans.append((kind, [token]))
            iob2.append(f"B-{kind}")
        else:
            iob2.append("O")
        inside = kind if mark in "BI" else ""
    entities = [{"type": kind, "text": " ".join(words)} for kind, words in spans]
    lines = "\n".join(f"{entity['type']}: {entity['text']}" for entity in entities)
    named = {"prompt": " ".join(tokens), "response": lines or "none", "entities": entities}
    return named | {"tokens": tokens, "tags": iob2}


def _renamed(row: Row, columns: dict[str, str]) -> Values:
    """Returns a row of a table, with new column names and without empty cells."""
    for name in columns.values():
        if name not in row.values:
            raise UserError(f"{row.where}: there is no column {name!r}; the columns are: {', '.join(row.values)}")
    new = {old: name for name, old in columns.items()}
    return {new.get(name, name): value for name, value in row.values.items() if value is not None}


FORMATS: dict[str, Callable[[Row], Values]] = {
    "hh-rlhf": hh_rlhf,
    "ultrafeedback": ultrafeedback,
    "scored": scored,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "conll": conll,
    "csv": lambda row: _renamed(row, {}),
}
