"""How tasks read completions and columns, and what they say of a column or option that cannot be used."""

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.evaluation.tasks import TASKS, Task

OPTIONS = {"labels": None, "pick": "first", "ignore_case": False, "normalize": "strip", "tokenize": "13a"}


def estimates(spec, rows, texts, **options):
    return Task(spec, rows, OPTIONS | options)(texts).estimates()


def test_labels_are_whole_texts_or_words_in_them():
    rows = [{"label": "Spam"}, {"label": "ham"}, {"label": "ham"}, {"label": None}]
    texts = [" spam.", "It is ham", "HAM", "spam"]
    whole = estimates("classification", rows, texts)
    assert whole["classification/accuracy"] == pytest.approx(2 / 3), "a row without a label does not count"
    assert whole["classification/recall/ham"] == 0.5 and whole["classification/precision/ham"] == 1
    named = estimates("classification", rows, texts, labels=["Ham", "Spam"])
    assert named["classification/accuracy"] == 1 and named["classification/f1_macro"] == 1


def test_the_confusion_matrix_has_a_column_for_no_label():
    task = Task("classification:kind", [{"kind": "a"}, {"kind": "b"}, {"kind": "b"}], OPTIONS)
    table = task.confusion(["a", "a", "who knows"])
    assert table == {"labels": ["a", "b"], "counts": [[1, 0, 0], [1, 0, 1]]}


def test_entities_are_json_or_lines():
    rows = [{"entities": [["PER", "Ada"], ["LOC", "Bath"]]}, {"entities": "LOC: York"}]
    found = estimates("entities", rows, ['[{"type": "per", "text": "Ada"}]', "- LOC: York\n- PER: Ada"])
    assert found["entities/precision_micro"] == pytest.approx(2 / 3)
    assert found["entities/recall_micro"] == pytest.approx(2 / 3)
    assert found["entities/f1/loc"] == pytest.approx(2 / 3)


def test_tags_are_filled_up_and_cut():
    rows = [{"tags": "O B-PER I-PER O"}, {"tags": ["B-LOC", "O"]}]
    found = estimates("tags", rows, ["O B-PER I-PER", "B-LOC O B-PER what"])
    assert found["tags/f1_micro"] == 1
    assert estimates("tags", rows, ["O B-PER", "nothing"])["tags/f1_micro"] == 0


def test_tasks_by_reference():
    pytest.importorskip("rouge_score", reason="needs the extra jaxrlhf[rewards]")
    pytest.importorskip("sacrebleu", reason="needs the extra jaxrlhf[rewards]")
    rows = [{"reference": ["the cat sat on the mat"], "answer": "#### 4", "letter": "B"}] * 2
    same = ["the cat sat on the mat", ""]
    assert estimates("rouge", rows, same)["rouge/rougeL"] == 0.5
    assert estimates("bleu", rows, same[:1] * 2)["bleu/bleu"] == pytest.approx(100)
    assert 0 < estimates("chrf", rows, same)["chrf/chrf"] < 100
    assert estimates("exact_match:reference", rows, same)["exact_match/exact_match"] == 0.5
    assert estimates("numeric", rows, ["it is 4", "5"])["numeric/accuracy"] == 0.5
    assert estimates("multiple_choice:letter", rows, ["(B)", "A"])["multiple_choice/accuracy"] == 0.5


@pytest.mark.parametrize(
    ("spec", "rows", "options", "message"),
    [
        ("rogue", [{}], {}, "--task rogue: must be one of classification"),
        ("rouge", [{"answer": "x"}], {}, r"--task rouge: the data has no column reference; it has answer"),
        ("numeric:x", [{"x": "four"}], {}, "--task numeric: column x, row 0 .*four"),
        ("tags", [{"tags": [1]}], {}, r"--task tags: column tags, row 0 must be a list of tags"),
        ("classification", [{"label": "x"}], {"labels": ["a", "b"]}, "--task classification: column label, row 0"),
        ("bleu", [{"reference": "x"}], {"tokenize": "latin"}, "--task bleu: tokenize .*latin"),
    ],
)
def test_what_cannot_be_used_is_one_line(spec, rows, options, message):
    with pytest.raises(UserError, match=rf"\A{message}[^\n]*\Z"):
        Task(spec, rows, OPTIONS | options)


def test_every_task_has_its_default_column():
    assert all(column.isidentifier() for column, _ in TASKS.values())
