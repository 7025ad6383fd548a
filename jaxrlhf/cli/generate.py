"""jaxrlhf generate --run DIR|--model DIR --prompt TEXT|--prompts FILE: completes prompts with each role."""

import argparse
import json

from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import ascii_only


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf generate", description="Completes prompts with roles of a run, or with a model folder."
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", metavar="DIR", help="run directory")
    origin.add_argument("--model", metavar="DIR", help="Hugging Face folder or hub id")
    step = "roles of a checkpoint of the stage under way: latest, best (by the run's checkpoints.best) or a step number"
    parser.add_argument("--step", metavar="latest|best|N", help=f"{step} (default: those of finished stages)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be repeated")
    source.add_argument("--prompts", metavar="FILE", help="prompts from a JSON, JSON Lines or Parquet file")
    roles = "roles of a run to compare, such as base,sft,policy,average (default: the one trained last)"
    parser.add_argument("--roles", metavar="NAMES", help=roles)
    parser.add_argument("--prompt-field", help="column of --prompts (default: prompt, messages or text)")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's, else 64")
    parser.add_argument("--temperature", type=float, help="0: greedy (default: the run's, else 1.0)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: the run's, else off)")
    top_p = "sample from the likeliest tokens with total probability p (default: the run's, else off)"
    parser.add_argument("--top-p", type=float, help=top_p)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    return parser.parse_args(arguments)


def generate(arguments: argparse.Namespace) -> None:
    from jaxrlhf.stages.generating import complete_prompts

    for record in complete_prompts(arguments):
        if arguments.json:
            print(json.dumps(record, ensure_ascii=ascii_only()), flush=True)
            continue
        print(f"prompt: {record['prompt']}")
        for role, text in record["answers"].items():
            print(f"{role:>7}: {text.strip()}")
        print(flush=True)


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: generate(parse(arguments)))
