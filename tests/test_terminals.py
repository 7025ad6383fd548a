"""Commands whose outputs are closed, full, broken or ASCII, and Ctrl-C before they have done anything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrlhf.cli import train
from jaxrlhf.cli.streams import OutputLost

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
PRINTS = "import sys; from jaxrlhf.cli.exits import main_of; sys.exit(main_of(lambda stop: {work}))"
HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
LIST = ["-m", "jaxrlhf"]
FULL = "error: standard output cannot be written: No space left on device\n"
CLOSED = "error: standard output cannot be written: it is closed\n"


def shell(redirection, *command, **environment):
    """The finished process of `python COMMAND REDIRECTION` in a shell."""
    line = f'exec "$0" "$@" {redirection}'
    return subprocess.run(["bash", "-c", line, sys.executable, *command], capture_output=True, env=HERE | environment)


@pytest.mark.parametrize("command", [LIST, ["-m", "jaxrlhf", "generate", "--help"], ["-m", "jaxrlhf", "--version"]])
@pytest.mark.parametrize(("redirection", "error"), [(">/dev/full", FULL), (">&-", CLOSED)])
def test_an_output_that_cannot_be_written_is_one_line_and_status_1(redirection, error, command):
    done = shell(redirection, *command)
    assert (done.returncode, done.stderr.decode()) == (1, error)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_messages_that_cannot_be_written_change_nothing(redirection):
    work = "(print('to nobody', file=sys.stderr, flush=True), print('result'))"
    done = shell(redirection, "-c", PRINTS.format(work=work))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"result\n", b"")
    assert shell(redirection, *LIST, "trian").returncode == 2


@pytest.mark.parametrize("command", [LIST, ["-m", "jaxrlhf.train", "--help"]])
def test_a_reader_that_has_ended_ends_the_command_quietly(command):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, *command], stdout=writing, stderr=subprocess.PIPE, env=HERE)
    os.close(writing)
    assert (process.communicate()[1], process.returncode) == (b"", 141)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    work = f"[open({str(tmp_path / 'file')!r}, 'w'), print('x', flush=True)]"
    assert shell("<&- >&- 2>&-", "-c", PRINTS.format(work=work)).returncode == 1
    assert (tmp_path / "file").read_bytes() == b""


def test_characters_that_an_output_lacks_are_replaced():
    work = "(print('caf\\xe9 \\udce9'), print('caf\\xe9', file=sys.stderr))"
    done = shell("", "-c", PRINTS.format(work=work), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf? ?\n", b"caf\\xe9\n")
    done = shell("", "-c", PRINTS.format(work=work), PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, b"caf\xc3\xa9 ?\n")


def test_the_results_of_a_run_are_named_where_its_table_is_lost(monkeypatch, capsys):
    import jaxrlhf.stages.run

    def lost(*arguments):
        raise OutputLost(BrokenPipeError(32, "Broken pipe"))

    monkeypatch.setattr(jaxrlhf.stages.run, "run_stages", lost)
    monkeypatch.setattr("jaxrlhf.cli.exits.discard_output", lambda: None)
    assert train.main(["--config", QUICKSTART, "run_dir=/tmp/there"]) == 1
    error = "error: standard output cannot be written: Broken pipe; the results are in /tmp/there\n"
    assert capsys.readouterr().err == error


# Runs a module as `python -m` does, and stays a while where it imports the first argument.
IMPORTS = """
import runpy, sys, time
slow, module, *sys.argv[1:] = sys.argv[1:]
class Watch:
    def find_spec(name, path=None, target=None):
        if name == slow:
            print("importing", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Watch)
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize("command", [["jaxrlhf.train"], ["jaxrlhf", "bench"]], ids=lambda command: command[-1])
@pytest.mark.parametrize("slow", ["jaxrlhf.cli", "pydantic", "jax"])
def test_ctrl_c_before_anything_is_done_is_one_line(command, slow, processes, tmp_path):
    started = processes.start("-c", IMPORTS, slow, *command, "--config", QUICKSTART, f"run_dir={tmp_path / 'run'}")
    started.wait_until(lambda: "importing" in started.output)
    started.send(signal.SIGINT)
    assert started.wait(20) == 130, started.errors
    assert re.fullmatch(r"interrupted.*\n", started.errors) and not (tmp_path / "run").exists()


ENDING = """
import atexit, os, signal, sys
from jaxrlhf.distributed.interrupt import exit_on_interrupt
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
atexit.register(interrupt if sys.argv[1] == "after" else str)  # runs last
exit_on_interrupt()
atexit.register(interrupt if sys.argv[1] == "before" else str)
sys.exit(3)
"""


@pytest.mark.parametrize(("when", "status", "error"), [("before", 130, b"interrupted\n"), ("after", 3, b"")])
def test_ctrl_c_while_python_ends_is_one_line_or_nothing(when, status, error):
    done = subprocess.run([sys.executable, "-c", ENDING, when], capture_output=True, env=HERE)
    assert (done.returncode, done.stderr) == (status, error)


def test_processes_of_a_reward_print_no_warning_of_jax():
    work = "__import__('jax') and __import__('os').fork() == 0 and __import__('os')._exit(0)"
    done = subprocess.run([sys.executable, "-c", PRINTS.format(work=work)], capture_output=True, env=HERE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_the_locale_cannot_read_names_the_variable_to_set():
    here = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["--config", "caf\xe9.yaml"], ["--config", QUICKSTART, "run_dir=caf\xe9"]):
        done = shell("", "-m", "jaxrlhf", "train", *arguments, **here)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert b"the text was read as ascii, the encoding of this locale: set PYTHONUTF8=1" in done.stderr
    done = shell("", "-m", "jaxrlhf", "train", "--config", os.fsdecode(b"caf\xe9.yaml"), PYTHONUTF8="1")
    assert done.returncode == 2 and b"not UTF-8" in done.stderr
