"""jaxrlhf generate --run DIR|--model DIR --prompt TEXT|--prompts FILE: completes prompts with each role."""

import argparse
import json

from jaxrlhf.cli.arguments import Parser, add_origin, add_sampling, model_path, text
from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import ascii_only
from jaxrlhf.errors import printable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf generate", description="Completes prompts with roles of a run, or with a model folder."
    )
    add_origin(parser, "roles of a run to compare, such as base,sft,policy,average (default: the role trained last)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=text, metavar="TEXT", action="append", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts", type=model_path, metavar="FILE", help="file of prompts: JSON, JSON Lines, CSV or Parquet"
    )
    parser.add_argument(
        "--prompt-field", type=text, help="column of --prompts with the prompts (default: prompt, messages or text)"
    )
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    return parser.parse_args(arguments)


def generate(arguments: argparse.Namespace) -> None:
    from jaxrlhf.stages.generating import complete_prompts

    for record in complete_prompts(arguments):
        if arguments.json:
            print(printable(json.dumps(record, ensure_ascii=ascii_only())), flush=True)
            continue
        print(printable(f"prompt: {record['prompt']}"))
        for role, answer in record["answers"].items():
            print(printable(f"{role:>7}: {answer.strip()}"))
        print(flush=True)


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: generate(parse(arguments)))
