"""jaxrlhf export --run DIR --to DIR --format merged|peft|reward: a run's model for other programs."""

import argparse

from jaxrlhf.cli.exits import main_of


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf export",
        description="Writes a role of a run as a folder that transformers, PEFT and serving engines open.",
    )
    parser.add_argument("--run", metavar="DIR", required=True, help="directory of a run")
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to write; an older export there is replaced")
    parser.add_argument(
        "--format",
        choices=("merged", "peft", "reward"),
        required=True,
        help="merged: a whole language model; peft: its LoRA adapter; reward: a sequence classifier with one label",
    )
    parser.add_argument(
        "--role",
        choices=("policy", "sft", "average", "reward", "value"),
        default=None,
        help="default: policy, else sft; of the format reward: reward, else value",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="of the weights written (default: the one they have in the run)",
    )
    parser.add_argument(
        "--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="of a file of weights (default: 5e9)"
    )
    return parser.parse_args(arguments)


def export(arguments: argparse.Namespace) -> None:
    from jaxrlhf.stages.exporting import export_role

    for line in export_role(arguments):
        print(line)


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda: export(parse(arguments)))
