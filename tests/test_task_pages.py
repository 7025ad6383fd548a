"""docs/tasks: the commands of each page, on small files of the task and a tiny model.

The commands of `data` and the dry run run for every page. One page trains and evaluates; with
TASK_PAGES=all in the environment all pages do.
"""

import json
import os
import re
import shlex
from pathlib import Path

import jax
import pytest

import jaxrlhf
from jaxrlhf.__main__ import main
from jaxrlhf.cli import evaluate, generate
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder

PAGES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "docs" / "tasks").glob("*.md"))}
WHOLE = ["arithmetic"]
TINY = [
    "model.dtype=float32", "compilation_cache=null", "report=false", "adapter.rank=2",
    "adapter.target_modules=[q_proj, down_proj]", "ppo.iterations=1", "ppo.batch_size=4", "ppo.evaluation.prompts=2",
    "ppo.max_prompt_tokens=400", "ppo.sampling.max_new_tokens=8",
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


def lines(make):
    return "".join(text(make(i, name)) for i, name in enumerate(NAMES))


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
}  # fmt: skip


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    return [shlex.split(line) for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]


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
def desk(tmp_path, monkeypatch, model):
    """`desk(page)`: a working directory with the user's files, task.yaml; the overrides."""

    def make(page):
        monkeypatch.chdir(tmp_path)
        for name, content in FILES[page].items():
            Path(name).write_text(content)
        given = [f"model.path={model}"]
        (config,) = [block for block in blocks(page, "yaml") if "run_dir:" in block]
        Path("task.yaml").write_text(config)
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


@pytest.mark.parametrize("page", PAGES)
def test_the_row_of_a_page_has_the_columns_of_its_file(page):
    shown = {tuple(sorted(json.loads(line))) for block in blocks(page, "json") for line in block.splitlines()}
    given = set()
    for name, content in FILES[page].items():
        if name.endswith(".jsonl"):
            given.add(tuple(sorted(json.loads(content.splitlines()[0]))))
    converted = page in ("assistant", "named-entities")  # the page shows the row that `data convert` writes
    assert converted or shown <= given


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES if os.environ.get("TASK_PAGES") == "all" else WHOLE)
def test_every_command_of_a_page(page, desk, capsys):
    overrides = desk(page)
    for _, *words in commands(page):
        more = overrides if words[0] == "train" else ["--resamples", "20"] if words[0] == "evaluate" else []
        assert main([*words, *more]) == 0, (words, capsys.readouterr())
    roles = Path(load_config("task.yaml").run_dir, "roles")
    assert (roles / "policy").is_dir()
