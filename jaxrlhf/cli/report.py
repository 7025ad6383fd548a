"""jaxrlhf report --run DIR ... [--to FILE]: writes an HTML report of one or several runs."""

import argparse
import sys
from pathlib import Path

from jaxrlhf.cli.arguments import Parser, path
from jaxrlhf.cli.exits import main_of
from jaxrlhf.errors import printable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf report",
        description="Writes one HTML file with the curves, answers, tokens and settings of runs. It needs no network.",
    )
    runs = "run directories; several runs share each plot, and runs that differ only by seed are shown as a mean"
    parser.add_argument("--run", type=path, metavar="DIR", nargs="+", required=True, help=runs)
    parser.add_argument(
        "--to", type=path, metavar="FILE", help="file to write (default: report.html in DIR, or in the current folder "
        "for several runs)"
    )
    return parser.parse_args(arguments)


def report(arguments: argparse.Namespace) -> None:
    from jaxrlhf.report.page import write_report
    from jaxrlhf.report.refresh import FILE

    folders = [Path(folder) for folder in dict.fromkeys(arguments.run)]
    default = folders[0] / FILE if len(folders) == 1 else Path(FILE).absolute()
    target = default if arguments.to is None else Path(arguments.to)
    for text in write_report(folders, target):
        print(printable(text), file=sys.stderr)
    print(target)


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: report(parse(arguments)))
