"""Text of data, models and servers reaches a terminal without what would control it."""

import json

import numpy as np
import pytest

from jaxrlhf.cli import generate, train
from jaxrlhf.cli.exits import main_of
from jaxrlhf.errors import Fault, UserError, printable
from jaxrlhf.stages.evaluation import Evaluation, comparison
from jaxrlhf.tracking.notices import notice

CONTROLS = ["\x1b[2J", "\x07", "\x9b31m", "\x7f", "\r", "\u202e", "\u2066", "\u200f", "\u2028", "\x00", "\udc80"]


@pytest.mark.parametrize("text", CONTROLS)
def test_a_control_character_is_written_as_its_number(text):
    shown = printable(f"a{text}b")
    assert shown.isprintable() and f"\\u{ord(text[0]):04x}" in shown
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text, "JSON stays the same text"


def test_other_text_stays_as_it_is():
    text = "é 漢字 😀 עברית\tand\nlines \\ \u200d"
    assert printable(text) == text


@pytest.mark.parametrize("kind", [UserError, Fault, ValueError])
def test_errors_are_printed_without_control_characters(kind, capsys):
    def fail():
        raise kind("prompts.jsonl:1: \x1b]0;title\x07 \u202e")

    main_of(lambda *_: fail())
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\x07" not in error and "\\u001b]0;title\\u0007 \\u202e" in error


def test_notices_and_the_final_table(capsys):
    notice("odd \x1b[31m name")
    assert capsys.readouterr().err == "note: odd \\u001b[31m name\n"
    sample = {"prompt": "p\x1b[2J", "completion": "c\u202e\x9b", "score": np.float32(1)}
    table = comparison({name: Evaluation({"kl/k1": -1e-5}, [sample], [1.0]) for name in ("before", "after")})
    assert "\\u001b[2J" in table and "\\u202e\\u009b" in table
    assert all(line.isprintable() for line in table.splitlines())
    assert "-0.000" not in table and "0.000" in table


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_generate_prints_completions_without_control_characters(form, capsys, monkeypatch):
    record = {"prompt": "p\x1b[2J", "answers": {"policy": "a\x9b\u202e"}}
    monkeypatch.setattr("jaxrlhf.stages.generating.complete_prompts", lambda arguments: [record])
    assert generate.main(["--run", "r", "--prompt", "p", *form]) == 0
    shown = capsys.readouterr().out
    assert "\\u001b[2J" in shown and "\\u009b\\u202e" in shown and shown.replace("\n", "").isprintable()
    if form:
        assert json.loads(shown) == record


@pytest.mark.parametrize("key", ["ppo.x\x1b[2J", "\u202eseed"])
def test_an_unknown_setting_is_named_without_control_characters(key, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("run_dir: r\nmodel: {new: {}}\nstages: [ppo]\nppo: {data: {path: d}}\n")
    assert train.main(["--config", str(tmp_path / "run.yaml"), f"{key}=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.strip().isprintable()
