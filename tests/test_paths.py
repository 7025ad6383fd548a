"""Paths of settings and commands: expanded once, absolute at once, refused in one line; files beside a reward file."""

import os
import sys
from pathlib import Path

import pytest

from jaxrlhf.cli import bench, export, generate, plan, train
from jaxrlhf.config import RunConfig
from jaxrlhf.config.paths import absolute_path, source_path
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.rewards.functions import load_function

TEXT = """\
run_dir: runs/a
model: {path: models/base, tokenizer: org/tokenizer}
stages: [ppo]
ppo: {data: {path: "builtin:assistant-prompts"}, reward: {kind: function, function: "rewards/r.py:score"}}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current directory, with a home folder and a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WHERE", "there")
    (tmp_path / "run.yaml").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "place"),
    [("~/a", "home/a"), ("~", "home"), ("$HOME/a", "home/a"), ("${WHERE}/$WHERE", "there/there"), ("a/./b", "a/b"),
     ("./~/a", "~/a"), ("a~", "a~"), ("a$", "a$"), ("../x", "../x")],
)  # fmt: skip
def test_a_path_is_expanded_and_absolute_and_stays_so(home, text, place):
    assert absolute_path(text) == f"{home}/{place}"
    if "$" not in place:
        assert absolute_path(absolute_path(text)) == absolute_path(text)


def test_what_a_variable_holds_is_not_expanded_again(home, monkeypatch):
    monkeypatch.setenv("ODD", "$WHERE")
    assert absolute_path("$ODD/a") == f"{home}/$WHERE/a"
    (home / "$WHERE").mkdir()
    assert absolute_path(f"{home}/$WHERE") == f"{home}/$WHERE", "an absolute path that exists is taken as written"


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "empty"), ("  ", "empty"), ("a\0b", "control"), ("a\nb", "control"), ("a\x1b[2J", "control"),
     ("\ud800", "UTF-8"), ("n" * 300, "300 bytes"), ("é" * 200, "400 bytes"), ("a/" * 3000, "3500"),
     ("$NOTSET/a", "$NOTSET is not set"), ("${NOT SET}", "is not set"), ("~nobody-at-all/a", "home folder")],
)  # fmt: skip
def test_an_unusable_path_is_refused_everywhere(home, text, word, capsys):
    for check in (absolute_path, source_path):
        with pytest.raises(ValueError, match=word.replace("$", r"\$")):
            check(text)
    commands = [
        (generate, ["--prompt", "a", "--run", text]), (generate, ["--prompt", "a", "--model", text]),
        (generate, ["--model", "m", "--prompts", text]), (export, ["--to", "e", "--format", "peft", "--run", text]),
        (export, ["--run", "r", "--format", "peft", "--to", text]), (train, ["--config", text]),
        (plan, ["--devices", "1", "--config", text]), (bench, ["--config", "run.yaml", "--json", text]),
        (bench, ["--config", "run.yaml", "--profile", text]),
    ]  # fmt: skip
    for command, arguments in commands:
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error and arguments[-2] in error, (arguments, error)
    assert sorted(os.listdir(home)) == ["run.yaml"]


@pytest.mark.parametrize("key", [
    "run_dir", "model.path", "model.run", "model.tokenizer", "ppo.data.path", "ppo.evaluation.data.path", "ppo.policy",
    "ppo.reference", "ppo.gold", "ppo.reward.function", "compilation_cache",
])  # fmt: skip
@pytest.mark.parametrize(("value", "word"), [
    (r'"a\0b"', "control character"), (r'"\ud800"', "UTF-8"), ("n" * 300, "bytes; a name may"), ('" "', "empty"),
    ("$NOTSET/a", "NOTSET is not set"),
])  # fmt: skip
def test_each_path_of_a_config_is_checked_and_nothing_is_written(home, key, value, word, capsys):
    if key in ("ppo.gold", "ppo.reward.function") and word != "empty":
        value = f'{value[:-1]}.py:f"' if value.endswith('"') else f"{value}.py:f"
    assert train.main(["--config", "run.yaml", f"{key}={value}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and key.split(".")[-1] in lines[0] and word in lines[0], lines
    assert sorted(os.listdir(home)) == ["run.yaml"]


def test_every_path_is_absolute_and_the_rest_passes_through(home):
    (home / "models" / "base").mkdir(parents=True)
    more = ["ppo.policy=~/p", "compilation_cache=$WHERE", "ppo.gold='g.py:f'", "ppo.evaluation.data={path: org/rows}"]
    config = load_config("run.yaml", more)
    assert config.run_dir == f"{home}/runs/a" and config.model.path == f"{home}/models/base"
    assert config.ppo.reward.function == f"{home}/rewards/r.py:score" and config.ppo.gold == f"{home}/g.py:f"
    assert config.ppo.policy == f"{home}/home/p" and config.compilation_cache == f"{home}/there"
    assert config.model.tokenizer == "org/tokenizer" and config.ppo.evaluation.data.path == "org/rows"
    assert config.ppo.data.path == "builtin:assistant-prompts"
    assert load_config("run.yaml").compilation_cache == "auto"
    assert load_config("run.yaml", ["ppo.gold='module:f'"]).ppo.gold == "module:f"
    (home / "stored.yaml").write_text(dump_config(config))
    os.chdir(home / "models")
    assert load_config(home / "stored.yaml") == config, "read from another directory"


def test_values_that_are_no_utf8_text_are_refused_wherever_they_are(home, capsys):
    for override in (r'ppo.reward.options={a: "\ud800"}', "run_dir=caf\udce9", "ppo.data.prompt_field=caf\udce9"):
        assert train.main(["--config", "run.yaml", override]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and override.split("=")[0] in error
    assert sorted(os.listdir(home)) == ["run.yaml"]


def test_a_reward_may_import_the_files_beside_it_also_later(home, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (home / "rewards").mkdir()
    (home / "rewards" / "beside_now.py").write_text("A = 1\n")
    (home / "rewards" / "beside_later.py").write_text("B = 2\n")
    (home / "rewards" / "json.py").write_text("raise ImportError('hides the library')\n")
    (home / "rewards" / "r.py").write_text(
        "import json\nfrom beside_now import A\n\ndef score(completions, **_):\n"
        "    from beside_later import B\n    return [A + B for _ in completions]\n"
    )
    score = load_function(RunConfig.model_validate({
        "run_dir": "r", "model": {"path": "m"}, "stages": ["ppo"],
        "ppo": {"data": {"path": "d"}, "reward": {"kind": "function", "function": "rewards/r.py:score"}},
    }).ppo.reward.function, "ppo.reward.function")  # fmt: skip
    os.chdir("/")
    assert score(completions=["x"]) == [3]
    assert sys.path[-1] == str(home / "rewards") and Path(sys.modules["json"].__file__).parent.name == "json"


def test_an_unreadable_config_of_a_run_is_one_line(home, monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    (home / "runs" / "a").mkdir(parents=True)
    (home / "runs" / "a" / "config.yaml").touch()
    assert generate.main(["--run", "runs/a", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.yaml: the file cannot be read: Permission denied" in error


def test_a_folder_without_permission_is_one_line(home, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert generate.main(["--run", "runs/a", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/a/config.yaml: Permission denied" in error
