"""Data files with one planted fault each, and clean files of the same kinds."""

# ruff: noqa: E501  (one planted fault a line)

import csv
import io
import json
import random
import re

WORDS = (  # noqa: SIM905
    "river stone market winter letter garden doctor bridge window silver captain forest island kitchen teacher "
    "village engine mirror summer harbour ladder painter bottle morning"
).split()


def sentence(rng, length=24):
    return " ".join(rng.choices(WORDS, k=length))


def preferences(count=60):
    rng = random.Random(1)
    return [{"prompt": sentence(rng), "chosen": sentence(rng, 12), "rejected": sentence(rng, 12)} for _ in range(count)]


def demonstrations(count=60):
    rng = random.Random(2)
    return [{"prompt": sentence(rng), "response": sentence(rng, 12)} for _ in range(count)]


def sums(count=60):
    """Short tasks that differ in their numbers alone: no near-duplicates."""
    start = "You are a patient teacher and you answer with the number alone and nothing else at all please. What is"
    return [{"prompt": f"{start} {i} + {i // 7} ?", "answer": i + i // 7} for i in range(count)]


def classification(count=60):
    rng = random.Random(3)
    return [{"text": sentence(rng), "label": ("good", "bad", "neither")[i % 3]} for i in range(count)]


def chats(count=60):
    rng = random.Random(4)
    return [
        {"messages": [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng, 9)}]}
        for _ in range(count)
    ]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


CLEAN = {
    "preferences.jsonl": jsonl(preferences()),
    "demonstrations.json": json.dumps(demonstrations()).encode(),
    "classification.csv": table(classification()),
    "chats.jsonl": jsonl(chats()),
    "prompts.jsonl": jsonl(sums()),
    "windows.jsonl": jsonl(demonstrations()).replace(b"\n", b"\r\n"),
    "languages.jsonl": jsonl(
        [
            {"prompt": text, "response": f"{i} {text[::-1]}"}
            for i, text in enumerate(("Où est l’été « déjà » ?", "AMANHÃ” NÃO", "你好，世界。", "שלום\u200f!", "Привет…", "👩‍👩‍👧 ok"))
        ]
    ),
    # One prompt with several answers, and one instruction before every text, are no faults.
    "answers.jsonl": jsonl([row | {"prompt": "tell me of " + sentence(random.Random(i // 2))}
                            for i, row in enumerate(demonstrations())]),
    "instruction.jsonl": jsonl([row | {"text": sentence(random.Random(0), 90) + " " + row["text"][:40]}
                                for row in classification()]),
}  # fmt: skip


def _with(rows, **at):
    """The rows with other values in row 40, which is line 41."""
    rows[40] = rows[40] | at
    return rows


def _copied(rows, change=lambda row: row):
    """Row 40 becomes a changed copy of row 10, which is line 11."""
    rows[40] = rows[40] | change(dict(rows[10]))
    return rows


def _line(rows, line):
    lines = jsonl(rows).splitlines(keepends=True)
    lines[40] = line
    return b"".join(lines)


def one_word(text, word=20):
    words = text.split()
    return " ".join([*words[:word], "zebra", *words[word + 1 :]])


P, D, C, M = preferences, demonstrations, classification, chats
# file -> (code of the only fault, number of faulty rows, text in the first place)
BROKEN = {
    "no_json.jsonl": (_line(D(), b'{"prompt": "a", "response": \n'), "unreadable", 1, "no_json.jsonl:41: not JSON"),
    "no_object.jsonl": (_line(D(), b'["a", "b"]\n'), "unreadable", 1, ":41: a row must be a JSON object"),
    "latin1.jsonl": (_line(D(), '{"prompt": "é", "response": "a"}\n'.encode("latin-1")), "unreadable", 1, ":41: not UTF-8"),
    "cells.csv": (table(C()).replace(b",good", b",good,more", 1), "unreadable", 1, ":2: the row has 3 cells"),
    "bom.jsonl": (b"\xef\xbb\xbf" + jsonl(D()), "byte_order_mark", 1, "bom.jsonl:1"),
    "line_endings.jsonl": (jsonl(D()).replace(b"\n", b"\r\n", 3), "line_endings", 1, "3 of Windows, 57 of Unix"),
    "empty.jsonl": (jsonl(_with(D(), response="  ")), "empty", 1, ":41: field 'response' is empty"),
    "missing.jsonl": (jsonl([*D()[:40], {"prompt": "a"}, *D()[41:]]), "empty", 1, ":41: the row has no field 'response'"),
    "empty_cell.csv": (re.sub(rb",good", b",", table(C()), count=1), "unusable", 1, ":2: field 'label' must be a label"),
    "wrong_type.jsonl": (jsonl(_with(P(), chosen=3)), "unusable", 1, ":41: field 'chosen' must be text"),
    "key_twice.jsonl": (_line(D(), b'{"prompt": "a", "prompt": "b", "response": "c"}\n'), "unreadable", 1, ":41: not usable JSON (the key 'prompt' is given twice"),
    "surrogate.jsonl": (_line(D(), b'{"prompt": "a \\ud83d", "response": "b"}\n'), "unusable", 1, ":41: field 'prompt' contains half"),
    "no_assistant.jsonl": (jsonl(_with(M(), messages=[{"role": "user", "content": "a"}])), "unusable", 1, ":41: field 'messages' must have an assistant"),
    "no_role.jsonl": (jsonl(_with(M(), messages=[{"from": "human", "value": "a"}])), "empty", 1, ":41: field 'messages', message 1 has no role"),
    "no_prompt.jsonl": (jsonl(_with(D(), prompt="")), "empty_prompt", 1, ":41"),
    "control.jsonl": (jsonl(_with(D(), response="a\x00b")), "control_characters", 1, r":41: \x00"),
    "inner_mark.jsonl": (jsonl(_with(D(), response="a\ufeffb")), "invisible_marks", 1, r":41: \ufeff"),
    "replacement.jsonl": (jsonl(_with(D(), prompt="caf\ufffd")), "replacement_characters", 1, r":41: \ufffd"),
    "mojibake.jsonl": (jsonl(_with(D(), prompt="cafÃ© au lait")), "mojibake", 1, ":41"),
    "mixed_ends.jsonl": (jsonl(_with(_with(D(), prompt="a\r\nb"), response="c\nd")), "mixed_line_ends", 1, ":41"),
    "duplicate.jsonl": (jsonl(_copied(D())), "duplicate", 1, ":41: as duplicate.jsonl:11"),
    "other_case.jsonl": (jsonl(_copied(D(), lambda row: row | {"prompt": row["prompt"].title() + " ."})), "near_duplicate", 1, ":41: nearly as other_case.jsonl:11"),
    "one_word.jsonl": (jsonl(_copied(D(), lambda row: row | {"prompt": one_word(row["prompt"], 0)})), "near_duplicate", 1, ":41: nearly as one_word.jsonl:11"),
    "equal_sides.jsonl": (jsonl(_with(P(), chosen="yes", rejected=" yes")), "same_responses", 1, ":41"),
    "opposite.jsonl": (jsonl(_copied(P(), lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]})), "conflicting_preferences", 1, ":41: the opposite of opposite.jsonl:11"),
    "two_labels.jsonl": (jsonl(_copied(C(), lambda row: row | {"label": "good"})), "conflicting_labels", 1, ":41: 'good', but 'bad' in two_labels.jsonl:11"),
    "label_case.jsonl": (jsonl([row | ({"label": "Good "} if i in (0, 3, 6) else {}) for i, row in enumerate(C())]), "label_spelling", 1, "labels 'Good ', 'good'"),
    "one_label.jsonl": (jsonl([row | {"label": "good"} for row in C()]), "label_balance", 1, "label 'good': 60 of 60 rows"),
    "rare_label.jsonl": (jsonl(_with(C(), label="odd")), "label_balance", 1, "label 'odd': 1 of 60 rows"),
}  # fmt: skip
