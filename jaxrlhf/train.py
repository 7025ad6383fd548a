"""python -m jaxrlhf.train --config FILE [key.path=value ...]: runs the stages that the config names."""

import argparse
import sys

from jaxrlhf.command import main_of
from jaxrlhf.runtime.stopping import StopSignals


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from jaxrlhf.config_io import settings_help

    parser = argparse.ArgumentParser(
        prog="python -m jaxrlhf.train",
        description="Runs the stages that a config names (sft, reward_model, ppo). The same command continues a run.",
        epilog="settings:\n\n" + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace, stop: StopSignals) -> None:
    from jaxrlhf.config_io import load_config

    config = load_config(arguments.config, arguments.overrides)
    stop.grace = config.checkpoints.grace
    from jaxrlhf.stages.run import run_stages

    run_stages(config, stop)


def main(arguments: list[str] | None = None) -> int:
    afterwards = "; the same command goes on from the last checkpoint, if there is one"
    with StopSignals() as stop:
        return main_of(lambda: train(parse(arguments), stop), afterwards)


if __name__ == "__main__":
    sys.exit(main())
