"""jaxrlhf bench --config FILE [key.path=value ...]: times the programs of a run on this machine."""

import argparse
import json
import sys
from pathlib import Path

from jaxrlhf.cli.arguments import Parser, output_file, path, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf bench",
        description="Times each compiled program of a run on this machine, with random weights, prompts and scores. "
        "Compares each time with the least possible time: that of the arithmetic at the speed of a large matrix "
        "product, or of the bytes at memory bandwidth. Both speeds are measured on this machine. "
        "Then times whole PPO iterations, including the host's work. Reads only "
        "config.json of model.path, reads no data and calls no reward function.",
    )
    add = parser.add_argument
    add("--config", type=path, required=True, metavar="FILE", help="YAML file of settings")
    add("--lengths", choices=("full", "geometric"), default="full",
        help="completion lengths: full (default), or geometric: random, with a mean of about a quarter of full")
    add("--repeats", type=whole(1), default=5, metavar="N", help="number of timed calls of each program (default: 5)")
    iterations = "number of timed PPO iterations; may be 0 (default: 5)"
    add("--iterations", type=whole(0), default=5, metavar="N", help=iterations)
    add("--only", metavar="PROGRAM,...", default="",
        help="time only these programs, such as rollout,update, and no iterations")
    add("--profile", type=path, metavar="FOLDER",
        help="write a jax.profiler trace of each program into this folder, and print the slowest kernels")
    add("--json", type=output_file, metavar="FILE",
        help="write the results as JSON after each program; - prints JSON instead of the table")
    add("overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)


def bench(arguments: argparse.Namespace) -> None:
    from jaxrlhf.config.reading import load_config

    config = load_config(arguments.config, arguments.overrides)
    _check_writable(arguments)
    from jaxrlhf.bench.measure import Options, measure

    only = tuple(name.strip() for name in arguments.only.split(",") if name.strip())
    options = Options(arguments.lengths, arguments.repeats, arguments.iterations, only, arguments.profile)
    for results, text in measure(config, options, lambda text: print(text, file=sys.stderr, flush=True)):
        document = json.dumps(results, indent=1)
        if arguments.json != "-":
            print(text, flush=True)
            if arguments.json is not None:
                Path(arguments.json).write_text(document + "\n", encoding="utf-8")
    if arguments.json == "-":
        print(document)


def _check_writable(arguments: argparse.Namespace) -> None:
    """Raises `UserError`, before anything is measured, if a file or folder cannot be written."""
    option, target = "--profile", arguments.profile
    try:
        if target is not None:
            Path(target).mkdir(parents=True, exist_ok=True)
        option, target = "--json", arguments.json
        if target not in (None, "-"):
            existed = Path(target).exists()
            open(target, "a", encoding="utf-8").close()
            if not existed:
                Path(target).unlink()
    except OSError as error:
        raise UserError(f"{option}: {target!r} cannot be written: {error.strerror}; give another path") from None


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: bench(parse(arguments)))
