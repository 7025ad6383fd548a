"""`data sample`: completions of a model for people to score, and the pairs that come of it."""

import json
from pathlib import Path

import pytest

from jaxrlhf.__main__ import main
from jaxrlhf.stages import generating

MODEL = str(Path(__file__).parents[1] / "data" / "files" / "stories260K")
PROMPTS = [{"prompt": "Once upon a time", "topic": 1}, {"prompt": [{"role": "user", "content": "Hi"}], "topic": 2}]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sampled(tmp_path, monkeypatch, rows, *options):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "sample", "a.jsonl", "--out", "b.jsonl", "--model", MODEL, *options]) == 0
    return lines("b.jsonl")


def test_rows_have_their_own_completions_and_scores_make_pairs(tmp_path, monkeypatch, capsys):
    asked = []

    def complete_prompts(arguments):
        for number, row in enumerate(lines(arguments.prompts)):
            asked.append(row["prompt"])
            yield {"prompt": row["prompt"], "answers": {"sft": f"s{number}", "policy": "same"}}

    monkeypatch.setattr(generating, "complete_prompts", complete_prompts)
    rows = sampled(tmp_path, monkeypatch, PROMPTS, "--count", "2")
    assert asked == [row["prompt"] for row in PROMPTS for _ in range(2)]
    for number, (row, given) in enumerate(zip(rows, PROMPTS)):
        assert {name: row[name] for name in given} == given
        texts = {(item["role"], item["response"]) for item in row["completions"]}
        assert texts == {("sft", f"s{2 * number}"), ("sft", f"s{2 * number + 1}"), ("policy", "same")}
        assert [item["score"] for item in row["completions"]] == [None] * 3
        for item in row["completions"]:
            item["score"] = {"same": 0.5, f"s{2 * number}": 1}.get(item["response"], -1)
    assert "6 completions of 2 prompts" in capsys.readouterr().out
    Path("c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "convert", "c.jsonl", "--from", "scored", "--out", "d.jsonl"]) == 0
    text, chat = lines("d.jsonl")
    assert text == {"prompt": "Once upon a time", "chosen": "s0", "rejected": "s1", "margin": 2.0}
    assert chat["chosen"] == [{"role": "assistant", "content": "s2"}] and chat["prompt"] == PROMPTS[1]["prompt"]


@pytest.mark.slow
def test_a_model_writes_the_completions(tmp_path, monkeypatch):
    options = ("--count", "3", "--max-new-tokens", "6", "--seed", "1")
    first, second = (sampled(tmp_path, monkeypatch, PROMPTS[:1], *options, *more) for more in ((), ("--overwrite",)))
    assert first == second and len({item["response"] for item in first[0]["completions"]}) == 3
