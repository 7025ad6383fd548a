"""jaxrlhf generate --run DIR|--model DIR --prompt TEXT|--prompts FILE: answers, role by role."""

import argparse
import json

from jaxrlhf.cli.exits import main_of


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jaxrlhf generate", description="Answers prompts with the roles of a run, or with a model."
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run", metavar="DIR", help="directory of a run")
    origin.add_argument("--model", metavar="DIR", help="Hugging Face folder or hub id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    asked.add_argument("--prompts", metavar="FILE", help="rows with a prompt: JSON, JSON Lines or Parquet")
    parser.add_argument(
        "--roles",
        metavar="NAMES",
        default=None,
        help="of a run: base, sft, policy, average, by commas; side by side (default: the last one that was trained)",
    )
    parser.add_argument("--prompt-field", default=None, help="column of --prompts (default: prompt, messages or text)")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default: the run's, else 64")
    parser.add_argument("--temperature", type=float, default=None, help="0: greedy (default: the run's, else 1.0)")
    parser.add_argument("--top-k", type=int, default=None, help="keep the k likeliest (default: the run's, else off)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=None,
        help="keep the likeliest tokens that together have at most p (default: the run's, else off)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    return parser.parse_args(arguments)


def generate(arguments: argparse.Namespace) -> None:
    from jaxrlhf.stages.generating import answer_prompts

    for record in answer_prompts(arguments):
        if arguments.json:
            print(json.dumps(record, ensure_ascii=False))
            continue
        print(f"prompt: {record['prompt']}")
        for role, text in record["answers"].items():
            print(f"{role:>7}: {text.strip()}")
        print()


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda: generate(parse(arguments)))
