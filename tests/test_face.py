"""The package as it is imported, and its command."""

import re
import sys

import pytest

import jaxrlhf
from jaxrlhf.__main__ import COMMANDS, main

SCRIPT = """
import sys
import jaxrlhf
heavy = {"jax", "flax", "numpy", "pydantic", "transformers"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
import jaxrlhf.steps.annotate  # loads the room rollout/, which has a function's name
import jaxrlhf.rollout.decode
assert jaxrlhf.rollout is sys.modules["jaxrlhf.rollout.decode"].rollout
from jaxrlhf.rollout.sampling import truncates
"""


def test_importing_it_loads_nothing_heavy(processes):
    processes.run("-c", SCRIPT)


def test_every_name_is_there_once():
    assert len(set(jaxrlhf.__all__)) == len(jaxrlhf.__all__)
    for name in jaxrlhf.__all__:
        assert getattr(jaxrlhf, name).__name__ == name
    assert {*jaxrlhf.__all__} <= {*dir(jaxrlhf)}
    with pytest.raises(AttributeError, match="no attribute"):
        jaxrlhf.ppo  # noqa: B018


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_all_are_listed(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxrlhf"])
    assert main(arguments or None) == 0
    out = capsys.readouterr().out
    assert all(f"jaxrlhf {name}" in out for name in COMMANDS)


def test_the_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    version = re.escape(jaxrlhf.__version__)
    assert re.fullmatch(rf"jaxrlhf {version} \(jax \d.*, Python 3.*\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"jaxrlhf {name}" in capsys.readouterr().out


def test_a_misspelt_command_is_one_line(capsys):
    assert main(["trian", "--config", "x"]) == 2
    assert capsys.readouterr().err == "error: unknown command trian; did you mean train?\n"
    assert main(["generate", "--run", "nowhere", "--prompt", "x"]) == 2


def test_help_of_a_command_and_arguments_that_nothing_reads(capsys):
    with pytest.raises(SystemExit):
        main(["help", "export"])
    assert capsys.readouterr().out.startswith("usage: jaxrlhf export")
    assert main(["--version", "train"]) == 2 and main(["--help", "trian"]) == 2
    errors = "error: --version: unknown argument 'train'; commands: .*\nerror: --help: unknown argument 'trian'; .*\n"
    assert re.fullmatch(errors, capsys.readouterr().err)
