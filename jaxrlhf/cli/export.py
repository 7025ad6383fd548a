"""jaxrlhf export --run DIR --to DIR --format merged|peft|reward: exports a trained model for other programs."""

import argparse

from jaxrlhf.cli.arguments import Parser, path, whole
from jaxrlhf.cli.exits import main_of


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf export",
        description="Exports a role of a run as a folder that transformers, PEFT or a serving engine can load.",
    )
    parser.add_argument("--run", type=path, metavar="DIR", required=True, help="run directory")
    step = "use this checkpoint of the unfinished stage: latest, best (by checkpoints.best) or a step number"
    parser.add_argument("--step", metavar="latest|best|N", help=f"{step} (default: only roles of finished stages)")
    parser.add_argument(
        "--to", type=path, metavar="DIR", required=True, help="output folder; an older export there is replaced"
    )
    formats = "merged: a full language model; peft: a LoRA adapter; reward: a sequence classifier with one label"
    parser.add_argument("--format", choices=("merged", "peft", "reward"), required=True, help=formats)
    roles = ("policy", "sft", "average", "reward", "value")
    role = "role to export (default: policy, else sft; with --format reward: reward)"
    parser.add_argument("--role", choices=roles, help=role)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the exported weights (default: as in the run)")
    size = "largest number of bytes of a weight file (default: 5e9)"
    parser.add_argument("--max-shard-bytes", type=whole(1, 2**63 - 1), default=5_000_000_000, metavar="N", help=size)
    return parser.parse_args(arguments)


def export(arguments: argparse.Namespace) -> None:
    from jaxrlhf.stages.exporting import export_role

    for line in export_role(arguments):
        print(line)


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: export(parse(arguments)))
