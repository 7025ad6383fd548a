"""jaxrlhf COMMAND, also python -m jaxrlhf COMMAND: runs a command, or lists them."""

import difflib
import importlib
import sys

COMMANDS = {
    "train": "run the stages that a config names: sft, reward_model, ppo",
    "generate": "answer prompts with a run's base, SFT and PPO policy, or with a model folder",
    "export": "write a run's model as a folder: merged, PEFT adapter, or reward model",
    "plan": "memory, work, exchange and least time of a run on N cards, without cards or weights",
    "bench": "time each program of a run against the limits of this machine",
}


def main(arguments: list[str] | None = None) -> int:
    """The status that the command ends with."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(f"jaxrlhf.cli.{name}").main(rest)
    if name in ("-h", "--help", "help"):
        print("jaxrlhf aligns language models with human preferences. Commands:\n")
        for command, what in COMMANDS.items():
            print(f"  jaxrlhf {command:10} {what}")
        print("\nEach explains itself with --help.")
        return 0
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
    print(f"error: no command {name}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
