"""jaxrlhf train --config FILE [key.path=value ...]: runs the stages of a config."""

import argparse
import math
import os
import sys

from jaxrlhf.cli.arguments import MOST_PROCESSES, Parser, path, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import OutputLost
from jaxrlhf.config.base import SECONDS_LIMIT
from jaxrlhf.distributed.stopping import StopSignals
from jaxrlhf.errors import UserError


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS_LIMIT:
        bounds = f"above 0 and at most {SECONDS_LIMIT:g}"
        raise argparse.ArgumentTypeError(f"must be a number of seconds {bounds}, not {text[:40]!r}")
    return seconds


class _Help(argparse.Action):
    """`--help` prints the options and every setting. `--help NAME ...` prints only these settings or sections."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, names: list[str], option: object) -> None:
        from jaxrlhf.config.table import settings_help

        if not names:
            parser.epilog = "settings:\n\n" + settings_help()
            parser.print_help()
        try:
            shown = [settings_help(name.split("=")[0].strip()) for name in names]
        except ValueError as error:
            raise UserError(f"--help: {error}") from None
        print("\n".join(shown), end="\n" if shown else "")
        parser.exit()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf train",
        description="Runs the stages of a config: sft, reward_model, ppo. The same command resumes an interrupted run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    one = "prints this help and every setting; after names such as ppo.kl, prints only these settings or sections"
    parser.add_argument("-h", "--help", action=_Help, nargs="*", metavar="SETTING", help=one)
    parser.add_argument("--config", type=path, required=True, metavar="FILE", help="YAML file of settings")
    dry = "checks settings, model, rows and rewards, and prints what would run; writes nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    several = parser.add_argument_group(
        "several processes",
        "Run the same command on each host; only --process differs. Without these flags the values come from "
        "JAXRLHF_COORDINATOR, JAXRLHF_PROCESSES and JAXRLHF_PROCESS, else from SLURM, Open MPI, a TPU host or an "
        "indexed Kubernetes job; see launch/README.md.",
    )
    for flag, kind, metavar, text in (
        ("coordinator", str, "HOST:PORT", "address of process 0"),
        ("processes", whole(1, MOST_PROCESSES), "N", "number of processes; 1 means no coordination"),
        ("process", whole(0, MOST_PROCESSES), "I", "index of this process, from 0"),
    ):
        variable = os.environ.get(f"JAXRLHF_{flag.upper()}") or None
        several.add_argument(f"--{flag}", type=kind, default=variable, metavar=metavar, help=text)
    several.add_argument(
        "--start-timeout", type=_seconds, default=300, metavar="SECONDS", help="longest wait until all processes have "
        "started (default: 300)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the file"
    )
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace, stop: StopSignals) -> None:
    from jaxrlhf.config.reading import load_config
    from jaxrlhf.distributed import processes

    if not arguments.dry_run:
        stop.afterwards = "; the same command continues from the last checkpoint, if any"
    spec = processes.find_process_spec(arguments.coordinator, arguments.processes, arguments.process)
    with processes.joined(spec, arguments.start_timeout):
        if not processes.alone():
            stop.share()
        config = processes.agreed(lambda: load_config(arguments.config, arguments.overrides))
        stop.grace = config.checkpoints.grace
        processes.check_alike("settings", config.model_dump(mode="json"), "start all with the same command and file")
        from jaxrlhf.stages.run import run_stages

        try:
            run_stages(config, stop, arguments.dry_run)
            sys.stdout.flush()
        except OutputLost as lost:
            lost.kept = f"; the results are in {config.run_dir}"
            raise


def main(arguments: list[str] | None = None) -> int:
    status = main_of(lambda stop: train(parse(arguments), stop))
    from jaxrlhf.distributed import processes

    return processes.exit_status(status)
