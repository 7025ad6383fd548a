"""README and docs: snippets run as printed, configs load, commands parse, and what is named is there."""

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import jax
import pytest
from repository_files import blocks
from ruamel.yaml import YAML

import jaxrlhf
from jaxrlhf.__main__ import COMMANDS
from jaxrlhf.config.reading import load_config
from jaxrlhf.config.table import find_setting
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.stages.run import run_stages
from jaxrlhf.toy.world import VOCABULARY

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TASKS = sorted((ROOT / "docs" / "tasks").glob("*.md"))
ENVIRONMENTS = sorted((ROOT / "docs" / "environments").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *TASKS, *ENVIRONMENTS]


def spans(page):
    """Inline code of a page, without its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def parser_of(name):
    """The function that parses a command's arguments."""
    return importlib.import_module(f"jaxrlhf.cli.{name}").parse


@pytest.fixture(scope="module")
def flags():
    """Every flag of every command, from their help pages."""
    text = io.StringIO()
    for name in COMMANDS:
        for words in ([], *([word] for word in getattr(importlib.import_module(f"jaxrlhf.cli.{name}"), "PARSERS", ()))):
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                parser_of(name)([*words, "--help"])
    return set(re.findall(r"--[a-z-]+", text.getvalue())) | {"--serve", "--version"}


def each(language, pages=PAGES):
    found = [(page, block) for page in pages for block in blocks(page, language)]
    return pytest.mark.parametrize(
        ("page", "block"), found, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(found)]
    )


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A working directory where the page's model folder holds a small model of the assistant world."""
    tokenizer = build_word_tokenizer(VOCABULARY)
    config = DecoderConfig(tokenizer.vocab_size, 32, 64, 1, 4, 2, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    base = Decoder(config, jax.random.key(0))
    jaxrlhf.save_pretrained(tmp_path / "runs/quickstart/roles/base", base, tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_library_page_runs_as_printed(run_folder, capsys):
    """The README's snippet, which the page repeats, and then the page's own."""
    names = {}
    for page in (README, ROOT / "docs" / "library.md"):
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert names["advantages"].shape == names["samples"].response_mask.shape
    for path, leaves in names["loaded"].items():
        for leaf, value in leaves.items():
            assert (value == names["state"].policy[path][leaf]).all(), (path, leaf)
    merged, _ = jaxrlhf.load_pretrained(run_folder / "my-policy")
    prompts = names["prompts"]
    assert abs(merged(prompts.tokens, prompts.mask) - names["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["your-own", "rewards"])
def test_reward_functions_score_as_printed(name):
    block, *others = blocks(ROOT / "docs" / f"{name}.md", "python")
    names = {}
    exec(compile(block, name, "exec"), names)
    for other in others:
        exec(compile(other, name, "exec"), names)
        steps = [["2 + 2 = 4\n", "so 4"], ["no"]]
        assert names["score_steps"](prompts=["a", "b"], completions=["", ""], steps=steps) == [[1, 0], [0]]
    assert names["score"](prompts=["a", "b"], completions=["yes please", "no"], answer=["1", "2"]) == [1.0, 0.0]


def test_evaluate_page_runs_as_printed():
    pytest.importorskip("sacrebleu", reason="needs the extra jaxrlhf[rewards]")
    judge, metrics = blocks(ROOT / "docs" / "evaluate.md", "python")
    names = {}
    exec(compile(judge, "evaluate", "exec"), names)
    assert names["longest"](prompts=["a", "b"], completions=[["x", "yy"], ["x", "y"]]) == [1, None]
    exec(compile(metrics, "evaluate", "exec"), names)
    assert names["length"]["words"].value == 6


def test_choices_page_runs_as_printed():
    (block,) = blocks(ROOT / "docs" / "choices.md", "python")
    names = {}
    exec(compile(block, "choices", "exec"), names)
    assert {tuple(row[:2].tolist()) for row in names["samples"].tokens[:, 2:]} <= {(5, 2), (6, 7), (6, 2)}


@pytest.mark.parametrize("page", [*ENVIRONMENTS, ROOT / "docs" / "tools.md"], ids=lambda page: page.stem)
def test_environment_pages_print_what_they_show(page, capsys):
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    assert "".join(blocks(page, "text")[:1]) == capsys.readouterr().out


def test_control_page_runs_as_printed(tmp_path, monkeypatch):
    """The second block needs no Gymnasium; the first trains for fewer timesteps here."""
    monkeypatch.chdir(tmp_path)
    first, second = blocks(ROOT / "docs" / "control.md", "python")
    names = {}
    exec(compile(second, "control", "exec"), names)
    assert names["terminated"] and names["obs"][0] == 10  # the corridor is learnt
    pytest.importorskip("gymnasium")
    exec(compile(first.replace("100_000", "256"), "control", "exec"), names)


def test_environments_page_runs_as_printed(tmp_path, monkeypatch):
    """The example plays and learns for two iterations, with a small model that knows its words."""
    game, check = blocks(ROOT / "docs" / "environments.md", "python")
    (settings,) = blocks(ROOT / "docs" / "environments.md", "yaml")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(game, "guess", "exec"), names)
    exec(compile(check, "environments", "exec"), names)
    (tmp_path / "guess.py").write_text(game)
    tokenizer = build_word_tokenizer(["guess", "a", "digit", ":", "no", "higher", "lower", *map(str, range(10))])
    config = DecoderConfig(tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    jaxrlhf.save_pretrained("model", Decoder(config, jax.random.key(0)), tokenizer=tokenizer)
    (tmp_path / "config.yaml").write_text("run_dir: run\nmodel: {path: model}\n" + settings)
    few = ["ppo.iterations=2", "ppo.batch_size=8", "ppo.evaluation.prompts=8", "adapter.target_modules=[q_proj]"]
    run_stages(load_config(tmp_path / "config.yaml", few))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["environment/failed"] == 0 and 1 < last["environment/turns"] <= 4


@each("yaml")
def test_config_loads(page, block, tmp_path):
    """Each block is a config, or a part of one that lacks only run_dir, model and data."""
    given = YAML(typ="safe").load(block)
    stages = [stage for stage in ("sft", "reward_model", "ppo") if stage in given] or ["ppo"]
    for stage in stages:
        given.setdefault(stage, {}).setdefault("data", {}).setdefault("path", "rows.jsonl")
    whole = {"run_dir": "runs/x", "stages": stages, "model": {"path": "model"}} | given
    (tmp_path / "config.yaml").write_text(json.dumps(whole))
    config = load_config(tmp_path / "config.yaml")
    if config.ppo is not None:
        check_algorithm(config.ppo)


@each("sh", [page for page in PAGES if page not in TASKS])  # test_task_pages.py runs those of tasks
def test_commands_parse(page, block, monkeypatch):
    """Modules and scripts are there, their flags are known, and configs load with the overrides as printed."""
    monkeypatch.chdir(ROOT)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = ["configs/quickstart.yaml" if word == "FILE" else word for word in words]
        if "--config" in words:
            at = words.index("--config") + 1
            load_config(words[at], [word for word in words[at + 1 :] if re.match(r"[\w.]+=", word)])
        for script in [word for word in words if re.fullmatch(r"[\w/]+\.(py|sbatch)", word)]:
            assert (ROOT / script).is_file(), script
        if "-m" in words and (name := words[words.index("-m") + 1]).startswith("jaxrlhf."):
            parser_of(name.removeprefix("jaxrlhf."))(words[words.index("-m") + 2 :])


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_what_a_page_names_is_there(page, flags):
    """Key paths of settings, files of the repository, flags, and modules that are run."""
    for span in spans(page):
        for flag in re.findall(r"(?<!\S)(--[a-z-]+)", span):
            assert flag in flags, f"{page.name}: no command has {flag}"
        for path in re.findall(r"(?<![\w/.-])(?:ppo|sft|reward_model|mesh|checkpoints|health)\.[\w.]+", span):
            assert find_setting(path.split(".")), f"{page.name}: there is no setting {path}"
        for file in re.findall(r"^(?:tests|benchmarks|jaxrlhf|configs|launch|docs)/[\w./-]+", span):
            assert (ROOT / file.rstrip(".")).exists(), f"{page.name}: there is no {file}"
        for module in re.findall(r"-m (jaxrlhf\.\w+)", span):
            importlib.import_module(module)


def test_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.encode()) <= 10_000
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).is_file()] == []
    assert "<!-- test command -->\n```sh\n" in text  # what .ci/run reads


def test_every_config_is_named():
    page = (ROOT / "docs" / "your-own.md").read_text()
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if f"configs/{path.name}" not in page] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    assert load_config(path).stages
