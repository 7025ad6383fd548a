"""docs/tasks: the commands of each page, on small files of the task and a tiny model.

The commands of `data`, the dry run, and the functions run for every page. One page trains and evaluates; with
TASK_PAGES=all in the environment all pages do.
"""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import jax
import pytest
from repository_files import blocks

import jaxrlhf
from jaxrlhf.__main__ import main
from jaxrlhf.cli import evaluate, generate
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder

PAGES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "docs" / "tasks").glob("*.md"))}
WHOLE = ["arithmetic"]
CONVERTED = ("assistant", "named-entities")  # these pages show the row that `data convert` writes
TINY = [
    "model.dtype=float32", "compilation_cache=null", "report=false", "adapter.rank=2",
    "adapter.target_modules=[q_proj, down_proj]", "ppo.iterations=1", "ppo.batch_size=4", "ppo.evaluation.prompts=2",
    "ppo.max_prompt_tokens=400", "ppo.sampling.max_new_tokens=16",
    "compiler_options={all: {xla_backend_optimization_level: 0, xla_llvm_disable_expensive_passes: true}}",
]  # fmt: skip
SMALL = ["batch_size=4", "max_length=500", "epochs=1"]
CHATS = (  # a chat template; the model's own tokenizer has none
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
STARTS, ENDS = ("Ka", "Lo", "Mi", "Nu", "Pe", "Ra"), ("bo", "den", "fi", "gul", "hat")
NAMES = [start + end for start in STARTS for end in ENDS]


def text(row):
    return json.dumps(row) + "\n"


def table(rows):
    header = list(rows[0])
    lines = [header, *([row[name] for name in header] for row in rows)]
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + "\n"


def lines(make):
    return "".join(text(make(i, name)) for i, name in enumerate(NAMES))


def rows(make):
    return table([make(i, name) for i, name in enumerate(NAMES)])


LABELS = ("negative", "neutral", "positive")
# Page -> the user's files, by name.
FILES = {
    "arithmetic": {
        "problems.jsonl": lines(
            lambda i, name: {"question": f"{name} has {i} and 2. How many?", "answer": f"{i} + 2\n#### {i + 2}"}
        )
    },
    "assistant": {
        "dialogues.jsonl": lines(
            lambda i, name: {
                "chosen": f"\n\nHuman: Who is {name}?\n\nAssistant: A friend.",
                "rejected": f"\n\nHuman: Who is {name}?\n\nAssistant: No idea {i}.",
            }
        )
    },
    "classification": {"reviews.csv": rows(lambda i, name: {"text": f"{name} is a film", "label": LABELS[i % 2 * 2]})},
    "code": {
        "tasks.jsonl": lines(lambda i, name: {"prompt": f"Write {name}(n).", "tests": [f"assert {name}(2) == {i}"]})
    },
    "customer-service": {
        "tickets.jsonl": lines(
            lambda i, name: {
                "question": f"When do you open {name}?",
                "passages": ["We ship.", "At 9."],
                "answer": f"At 9, for {name} [2].",
                "topic": ("hours", "shops")[i % 2],
            }
        )
    },
    "detoxification": {
        "prompts.jsonl": lines(lambda i, name: {"prompt": f"{name} was loud, and"}),
        "heldout.jsonl": lines(lambda i, name: {"text": f"{name} went to the park."}),
    },
    "named-entities": {
        "ner.conll": "".join(f"{name} B-PER\nlived O\nin O\nOslo{i} B-LOC\n\n" for i, name in enumerate(NAMES))
    },
    "news-sentiment": {
        "news.csv": rows(
            lambda i, name: {
                "date": f"2024-03-{1 + i:02}",
                "company": f"Acme{i % 4}",
                "headline": f"{name} cuts its forecast",
                "label": LABELS[i % 3],
            }
        )
    },
    "question-answering": {
        "questions.jsonl": lines(
            lambda i, name: {
                "context": f"{name} flows into lake {i}.",
                "question": f"Where does {name} end?",
                "answers": [f"lake {i}"],
            }
        )
    },
    "recommendation": {
        "clicks.jsonl": lines(
            lambda i, name: {
                "user": f"u{i // 2}",
                "history": [name, "Rain"],
                "candidates": ["Cup", "Sun", "Fog"],
                "answer": i % 3,
            }
        )
    },
    "summarisation": {
        "articles.jsonl": lines(
            lambda i, name: {"article": f"{name} voted for bridge {i} on Monday.", "summary": f"{name} has a bridge."}
        ),
        "pairs.jsonl": lines(
            lambda i, name: {"prompt": f"{name} met.\nTL;DR:", "chosen": f" {name} met.", "rejected": f" No {i}."}
        ),
    },
    "translation": {"pairs.csv": rows(lambda i, name: {"en": f"{name} is closed", "de": f"{name} ist zu"})},
}  # fmt: skip


def commands(page):
    found = blocks(PAGES[page], "sh")
    return [shlex.split(line) for block in found for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A folder of a random text classifier with the labels neutral and toxic."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="classifiers are torch models")
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names, folder = {0: "neutral", 1: "toxic"}, tmp_path_factory.mktemp("classifier")
    config = transformers.BertConfig(
        vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory, stories260k):
    """A folder of one random layer, with the tokenizer of stories260K and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(str(stories260k))
    config = DecoderConfig(tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 640, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    jaxrlhf.save_pretrained(folder, Decoder(config, jax.random.key(0)), tokenizer=tokenizer)
    (folder / "chat_template.jinja").write_text(CHATS)
    return folder


@pytest.fixture
def desk(request, tmp_path, monkeypatch, model):
    """`desk(page)`: a working directory with the user's files, task.yaml and the page's functions; the overrides."""

    def make(page):
        monkeypatch.chdir(tmp_path)
        for name, content in FILES[page].items():
            Path(name).write_text(content)
        given = [f"model.path={model}"]
        (config,) = [block for block in blocks(PAGES[page], "yaml") if "run_dir:" in block]
        Path("task.yaml").write_text(config)
        for name, block in zip(re.findall(r"\"(\w+\.py):\w+\"", config), blocks(PAGES[page], "python"), strict=False):
            Path(name).write_text(block)
        if "kind: classifier" in config:
            given.append(f"ppo.reward.path={request.getfixturevalue('classifier')}")
        stages = set(load_config("task.yaml").stages) - {"ppo"}
        return [*given, *TINY, *(f"{stage}.{setting}" for stage in stages for setting in SMALL)]

    return make


@pytest.mark.parametrize("page", PAGES)
def test_data_commands_and_dry_run(page, desk, capsys):
    overrides, ran = desk(page), 0
    for name, *words in commands(page):
        assert name == "jaxrlhf"
        if words[0] == "data":
            assert main(words) == 0, (words, capsys.readouterr())
            ran += 1
        elif words[:2] == ["train", "--dry-run"]:
            assert main([*words, *overrides]) == 0, capsys.readouterr()
            ran += 1
        elif words[0] == "evaluate":
            assert str(Path(evaluate.parse(words[1:]).run).resolve()) == load_config("task.yaml").run_dir
        elif words[0] == "generate":
            generate.parse(words[1:])
    assert ran >= 3


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CONVERTED])
def test_the_row_of_a_page_has_the_columns_of_its_file(page):
    shown = {tuple(sorted(json.loads(line))) for block in blocks(PAGES[page], "json") for line in block.splitlines()}
    given = set()
    for name, content in FILES[page].items():
        if name.endswith(".csv"):
            given.add(tuple(sorted(next(csv.reader(content.splitlines())))))
        elif name.endswith(".jsonl"):
            given.add(tuple(sorted(json.loads(content.splitlines()[0]))))
    assert shown <= given


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES if os.environ.get("TASK_PAGES") == "all" else WHOLE)
def test_every_command_of_a_page(page, desk, capsys):
    overrides = desk(page)
    for _, *words in commands(page):
        more = overrides if words[0] == "train" else ["--resamples", "20"] if words[0] == "evaluate" else []
        assert main([*words, *more]) == 0, (words, capsys.readouterr())
    roles = Path(load_config("task.yaml").run_dir, "roles")
    assert (roles / "policy").is_dir()


def test_functions_of_pages_score(classifier):
    def function(page, name):
        names = {}
        (block,) = blocks(PAGES[page], "python")
        exec(compile(block.replace("CLASSIFIER", str(classifier)), page, "exec"), names)
        return names[name]

    cites = function("customer-service", "cites_right")
    assert cites(completions=["At 9 [2].", "At 9 [1].", "I do not know."], answer=["[2]", "[2]", "No."]) == [1, 0, 1]
    ordered = function("news-sentiment", "ordered")
    assert ordered(completions=[" positive", " neutral", " negative"], label=["positive"] * 3) == [1, 0, -1]
    (score,) = function("detoxification", "harmless")(completions=["hello"])
    assert 0 < score < 1
