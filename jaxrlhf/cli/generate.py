"""jaxrlhf generate --run DIR|--model DIR --prompt TEXT|--prompts FILE: completes prompts with each role."""

import argparse
import json

from jaxrlhf.cli.arguments import Parser, finite, model_path, path, text, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import ascii_only
from jaxrlhf.errors import printable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf generate", description="Completes prompts with roles of a run, or with a model folder."
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", type=path, metavar="DIR", help="run directory")
    origin.add_argument("--model", type=model_path, metavar="DIR", help="Hugging Face folder or hub id")
    step = "roles of a checkpoint of the stage under way: latest, best (by the run's checkpoints.best) or a step number"
    parser.add_argument("--step", metavar="latest|best|N", help=f"{step} (default: those of finished stages)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=text, metavar="TEXT", action="append", help="a prompt; may be repeated")
    source.add_argument("--prompts", type=model_path, metavar="FILE", help="prompts: JSON, JSON Lines or Parquet")
    roles = "roles of a run to compare, such as base,sft,policy,average (default: the one trained last)"
    parser.add_argument("--roles", metavar="NAMES", help=roles)
    parser.add_argument("--prompt-field", type=text, help="column of --prompts (default: prompt, messages or text)")
    parser.add_argument("--max-new-tokens", type=whole(1), help="default: the run's, else 64")
    parser.add_argument("--temperature", type=finite, help="0: greedy (default: the run's, else 1.0)")
    parser.add_argument("--top-k", type=whole(0), help="sample from the k likeliest (default: the run's, else off)")
    top_p = "sample from the likeliest tokens with total probability p (default: the run's, else off)"
    parser.add_argument("--top-p", type=finite, help=top_p)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default: 0")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
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
