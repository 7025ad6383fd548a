"""jaxrlhf evaluate --run DIR|--model DIR: metrics of each role on held-out prompts and text, with intervals."""

import argparse

from jaxrlhf.cli.arguments import Parser, add_origin, add_sampling, finite, model_path, output_file, path, text, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import ascii_only
from jaxrlhf.errors import UserError, printable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf evaluate",
        description="Evaluates roles of a run, or a model folder, on held-out prompts and text: reward, KL, length, "
        "win rates, perplexity and task metrics, each with a bootstrap confidence interval. The defaults are the run's "
        "own settings.",
    )
    roles = "roles of a run to evaluate, such as base,sft,policy; DIR:ROLE is a role of another run with the same model"
    add_origin(parser, f"{roles} (default: all roles of the run)")
    source = parser.add_argument_group("data")
    prompts = "held-out prompts (default: ppo.evaluation.data of the run)"
    source.add_argument("--data", type=model_path, metavar="FILE", help=prompts)
    held_out = "held-out text for the perplexity: demonstrations or plain text (default: those of the run's sft stage)"
    source.add_argument("--text", type=model_path, metavar="FILE", help=held_out)
    source.add_argument(
        "--prompt-field", type=text, help="column of --data with the prompts (default: prompt, messages or text)"
    )
    source.add_argument("--split", type=text, help="split of a hub id, folder or builtin data set (default: train)")
    source.add_argument("--limit", type=whole(1), help="use only this number of rows, from the start (default: all)")
    source.add_argument("--max-length", type=whole(2), help="longest text, in tokens (default: the run's, else 1024)")
    judges = parser.add_argument_group("rewards and judges")
    reward = "module:function, or settings as in a config: '{kind: http, url: ...}' (default: ppo.reward of the run)"
    judges.add_argument("--reward", type=text, metavar="REWARD", help=reward)
    judges.add_argument("--gold", type=text, metavar="FUNCTION", help="a second reward function (default: ppo.gold)")
    judge = "module:function that chooses the better of two completions, in both orders; adds win rates by this judge"
    judges.add_argument("--judge", type=text, metavar="FUNCTION", help=judge)
    tasks = parser.add_argument_group("task metrics")
    names = "classification, entities, tags, rouge, bleu, chrf, exact_match, numeric, multiple_choice; may be repeated"
    tasks.add_argument("--task", type=text, metavar="NAME[:COLUMN]", action="append", help=names)
    calibrate = "labelled prompts from which a temperature per role is fitted, which calibrates choices' probabilities"
    tasks.add_argument("--calibrate", type=model_path, metavar="FILE", help=calibrate)
    tasks.add_argument("--calibrate-split", type=text, help="split of --calibrate (default: train)")
    tasks.add_argument("--labels", type=text, metavar="A,B,...", help="labels to look for (classification)")
    pick = "label that counts if a completion has several (default: first)"
    tasks.add_argument("--pick", choices=("first", "last", "only"), default="first", help=pick)
    tasks.add_argument(
        "--ignore-case", action="store_true", help="ignore upper and lower case in the texts of entities"
    )
    normal = ("none", "strip", "lower", "squad")
    tasks.add_argument(
        "--normalize", choices=normal, default="strip", help="normalisation of texts for exact_match (default: strip)"
    )
    tasks.add_argument("--tokenize", type=text, default="13a", help="tokenizer of sacrebleu for bleu (default: 13a)")
    add_sampling(parser)
    group = "number of completions of each prompt; the bootstrap resamples whole prompts (default: 1)"
    parser.add_argument("--samples-per-prompt", type=whole(1, 10_000), default=1, help=group)
    parser.add_argument("--batch-size", type=whole(1), help="prompts per batch (default: the run's, else 32)")
    intervals = parser.add_argument_group("intervals")
    resamples = "number of bootstrap resamples (default: 2000)"
    intervals.add_argument("--resamples", type=whole(1, 1_000_000), default=2000, help=resamples)
    intervals.add_argument("--confidence", type=finite, default=95.0, help="confidence level in percent (default: 95)")
    intervals.add_argument("--interval", choices=("bca", "percentile"), default="bca", help="method (default: bca)")
    report = "writes the report as JSON; - prints JSON instead of the table"
    parser.add_argument("--json", type=output_file, metavar="FILE", help=report)
    samples = "writes every prompt with its completions and scores as JSON Lines"
    parser.add_argument("--samples", type=path, metavar="FILE", help=samples)
    parsed = parser.parse_args(arguments)
    if not 50 <= parsed.confidence < 100:
        raise UserError(f"--confidence: must be percent from 50 to below 100, such as 95, not {parsed.confidence:g}")
    return parsed


def evaluate(arguments: argparse.Namespace) -> None:
    import json

    from jaxrlhf.evaluation.table import table
    from jaxrlhf.stages.evaluating import check_files, write_files
    from jaxrlhf.stages.evaluating import evaluate as evaluate_roles

    check_files(arguments)
    report, samples = evaluate_roles(arguments)
    if arguments.json == "-":
        print(json.dumps(report, indent=1, ensure_ascii=ascii_only()))
    else:
        print(printable(table(report)), end="")
    files = {"--json": (arguments.json, json.dumps(report, indent=1) + "\n"), "--samples": (arguments.samples, samples)}
    write_files({option: file for option, file in files.items() if file[0] not in (None, "-")})


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: evaluate(parse(arguments)))
