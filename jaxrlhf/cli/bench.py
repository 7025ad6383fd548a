"""jaxrlhf bench --config FILE [key.path=value ...]: how fast a run's programs are, and could be, here."""

import argparse
import json
import sys
from pathlib import Path

from jaxrlhf.cli.exits import main_of
from jaxrlhf.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf bench",
        description="Times each program of a run's stages on this machine, with random weights, prompts and scores, "
        "and says what share that is of the least possible time: arithmetic at the rate of a large matrix product, or "
        "bytes at the rate of memory, both measured in the same run. Of model.path only config.json is read; no data "
        "is read and no reward function called. Then PPO's own iterations, with what the host does in them.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--lengths",
        choices=("full", "geometric"),
        default="full",
        help="answers: all of the full length (default), or of geometric lengths with a mean of about a quarter of it",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed calls of each program; default 5")
    parser.add_argument(
        "--iterations", type=int, default=5, metavar="N", help="iterations of PPO as a whole; default 5, 0: none"
    )
    parser.add_argument(
        "--only",
        metavar="PROGRAM,...",
        default="",
        help="times these programs alone, such as rollout,update; no iterations",
    )
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="writes a trace of jax.profiler for each program there, and prints the kernels that took most",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="writes JSON after each program; -: to standard output, without the table"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    return parser.parse_intermixed_args(arguments)


def bench(arguments: argparse.Namespace) -> None:
    from jaxrlhf.config.reading import load_config

    for name, least in (("repeats", 1), ("iterations", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: must be at least {least}, not {getattr(arguments, name)}")
    config = load_config(arguments.config, arguments.overrides)
    _check_targets(arguments)
    from jaxrlhf.bench.measure import Options, measure

    only = tuple(name.strip() for name in arguments.only.split(",") if name.strip())
    options = Options(arguments.lengths, arguments.repeats, arguments.iterations, only, arguments.profile)
    for found, text in measure(config, options, lambda text: print(text, file=sys.stderr, flush=True)):
        document = json.dumps(found, indent=1)
        if arguments.json != "-":
            print(text, flush=True)
            if arguments.json is not None:
                Path(arguments.json).write_text(document + "\n", encoding="utf-8")
    if arguments.json == "-":
        print(document)


def _check_targets(arguments: argparse.Namespace) -> None:
    """`UserError` where a file or folder cannot be written: better said before measuring than after."""
    option, target = "--profile", arguments.profile
    try:
        if target is not None:
            Path(target).mkdir(parents=True, exist_ok=True)
        option, target = "--json", arguments.json
        if target not in (None, "-"):
            existed = Path(target).exists()
            with open(target, "a", encoding="utf-8"):
                pass
            if not existed:
                Path(target).unlink()
    except OSError as error:
        raise UserError(f"{option}: {target!r} cannot be written: {error.strerror}; name another place") from None


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda: bench(parse(arguments)))
