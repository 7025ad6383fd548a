"""jaxrlhf COMMAND, or python -m jaxrlhf COMMAND: runs a command. Without COMMAND, lists all commands."""

import importlib
import sys

from jaxrlhf import __version__
from jaxrlhf.distributed.interrupt import exit_on_interrupt
from jaxrlhf.errors import UserError

COMMANDS = {
    "train": "run the stages of a config: sft, reward_model, ppo",
    "generate": "complete prompts with the base, SFT and PPO policy of a run, or with a model folder",
    "evaluate": "measure roles of a run or a model: reward, KL, win rates, perplexity, task metrics, with intervals",
    "data": "check data files and prepare them: duplicates, leaks, splits, other formats",
    "export": "write a trained model as a folder: merged, PEFT adapter, or reward model",
    "report": "write an HTML report of runs: curves, answers, tokens, settings",
    "plan": "estimate memory, arithmetic, communication and time of a run on N GPUs, without GPUs or weights",
    "bench": "time each compiled program of a run against the limits of this machine",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(f"jaxrlhf.cli.{name}").main(rest)
    from jaxrlhf.cli.exits import main_of

    if name in ("-h", "--help", "help") and rest[:1] and rest[0] in COMMANDS:
        return main([rest[0], "--help", *rest[1:]])
    return main_of(lambda stop: _without_command(name, rest))


def _without_command(name: str, rest: list[str]) -> None:
    if rest and name in ("-h", "--help", "help", "--version"):
        raise UserError(f"{name}: unknown argument {rest[0]!r}; commands: {', '.join(COMMANDS)}")
    if name in ("-h", "--help", "help"):
        print("jaxrlhf aligns language models with human preferences. Commands:\n")
        for command, description in COMMANDS.items():
            print(f"  jaxrlhf {command:10} {description}")
        print("\njaxrlhf COMMAND --help lists the options of a command; jaxrlhf --version prints the version.")
    elif name == "--version":
        from importlib.metadata import version

        print(f"jaxrlhf {__version__} (jax {version('jax')}, Python {sys.version.split()[0]})")
    else:
        import difflib

        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name}; {hint}")


def program() -> None:
    """The command `jaxrlhf`: runs a command and exits with its status."""
    exit_on_interrupt()
    sys.exit(main())


if __name__ == "__main__":
    program()
