"""python -m jaxrlhf.bench --config FILE [key.path=value ...]: how fast a run's programs are, and could be, here."""

import argparse
import json
import sys
from pathlib import Path

from jaxrlhf.command import main_of
from jaxrlhf.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxrlhf.bench",
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
    parser.add_argument("--only", metavar="PROGRAM,...", help="times these programs alone, such as rollout,update")
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="writes a trace of jax.profiler for each program there, and prints the kernels that took most",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="writes JSON after each program; -: to standard output, without the tables"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    return parser.parse_intermixed_args(arguments)


def bench(arguments: argparse.Namespace) -> None:
    from jaxrlhf.config.reading import load_config

    for name, least in (("repeats", 1), ("iterations", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: must be at least {least}, not {getattr(arguments, name)}")
    if arguments.json not in (None, "-"):
        _check_target(arguments.json)
    config = load_config(arguments.config, arguments.overrides)
    from jaxrlhf.bench.measure import measure
    from jaxrlhf.bench.report import as_json, as_text, opening, program_line
    from jaxrlhf.bench.running import Options

    only = tuple(name.strip() for name in (arguments.only or "").split(",") if name.strip())
    options = Options(arguments.lengths, arguments.repeats, arguments.iterations, only, arguments.profile)
    quiet, known = arguments.json == "-", -1
    for found in measure(config, options, lambda text: print(text, file=sys.stderr, flush=True)):
        programs = [(stage.stage, p) for stage in found.stages for p in stage.programs]
        if not quiet and found.after is None:
            if known < 0:
                print(opening(found), flush=True)
            for stage, program in programs[max(known, 0) :]:
                print(program_line(stage, program, found.rates), flush=True)
        known = len(programs)
        if arguments.json is not None and not quiet:
            Path(arguments.json).write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(as_json(found), indent=1) if quiet else f"\n{as_text(found)}")


def _check_target(file: str) -> None:
    """`UserError` where the file cannot be written: better said before measuring than after."""
    if not file or Path(file).is_dir():
        raise UserError(f"--json: {file or 'nothing'} is {'a folder' if file else 'given'}; name a file")
    if not Path(file).absolute().parent.is_dir():
        raise UserError(f"--json: no folder {Path(file).parent} to write in")
    existed = Path(file).exists()
    try:
        with open(file, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--json: {file} cannot be written: {error.strerror}; name another file") from None
    if not existed:
        Path(file).unlink()


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda: bench(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
