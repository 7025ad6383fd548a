"""jaxrlhf data check|split|clean|augment|sample|convert FILE: checks data files and prepares them."""

import argparse
import json
from collections.abc import Callable

from jaxrlhf.cli.arguments import Parser, add_origin, add_sampling, finite, model_path, path, text, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.cli.streams import ascii_only
from jaxrlhf.errors import Fault, UserError, printable

KINDS = ("preferences", "demonstrations", "classification", "chats", "prompts", "text")
FORMATS = ("hh-rlhf", "ultrafeedback", "scored", "alpaca", "sharegpt", "conll", "csv")


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"jaxrlhf data {name}", description=description)
    parser.set_defaults(call=globals()[name])
    return parser


def _share(value: str) -> float:
    """Returns a number from 0 to 1."""
    number = finite(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, not {value[:40]}")
    return number


def _add_source(parser: Parser, kinds: bool = True) -> None:
    add = parser.add_argument
    add("file", type=model_path, metavar="FILE", help="JSON, JSON Lines, CSV or Parquet, a folder, or a hub id")
    settings = "settings of the source, as in sft.data: prompt_field=question limit=1000; also label_field"
    add("settings", nargs="*", type=text, metavar="SETTING=VALUE", help=settings)
    if kinds:
        add("--kind", choices=KINDS, help="kind of data (default: the kind whose fields most of the first rows have)")


def _add_similarity(parser: Parser) -> None:
    similarity = "share of word triples, from 0 to 1, from which on two texts are near-duplicates (default: 0.8)"
    parser.add_argument("--similarity", type=_share, default=0.8, metavar="S", help=similarity)


def _add_out(parser: Parser, what: str = "FILE", about: str = "the file to write, as JSON Lines") -> None:
    parser.add_argument("--out", type=path, required=True, metavar=what, help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; it may be the input")


def _add_seed(parser: Parser) -> None:
    help = "the same seed writes the same bytes (default: 0)"
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help=help)


def check_parser() -> Parser:
    parser = _parser(
        "check", "Says what a data file holds and which rows are faulty. Exit status 1 if there are faulty rows."
    )
    _add_source(parser)
    add = parser.add_argument
    add("--tokenizer", type=model_path, metavar="DIR", help="model folder or hub id whose tokenizer counts tokens")
    add("--max-tokens", type=whole(1), metavar="N", help="rows of more tokens are faults; needs --tokenizer")
    against = "another part of the data, such as the test set: prompts that are in both are faults; may be repeated"
    add("--against", type=model_path, action="append", default=[], metavar="FILE", help=against)
    _add_similarity(parser)
    add("--json", action="store_true", help="print JSON")
    return parser


def check(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.check import check

    if arguments.max_tokens is not None and arguments.tokenizer is None:
        raise UserError("--max-tokens: needs --tokenizer, the model folder whose tokenizer counts the tokens")
    report = check(
        arguments.file,
        kind=arguments.kind,
        settings=arguments.settings,
        tokenizer=_tokenizer(arguments.tokenizer),
        max_tokens=arguments.max_tokens,
        against=arguments.against,
        similarity=arguments.similarity,
    )
    shown = json.dumps(report.as_json(), ensure_ascii=ascii_only(), indent=1) if arguments.json else str(report)
    print(printable(shown), flush=True)
    if report.faults:
        raise Fault(f"{arguments.file}: faults found: {', '.join(report.faults)}")


def _tokenizer(folder: str | None):
    if folder is None:
        return None
    from jaxrlhf.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"--tokenizer: {folder} has no tokenizer files; give a folder with a tokenizer.json")
    return tokenizer


def split_parser() -> Parser:
    parser = _parser(
        "split", "Splits a data file into parts, each of which is a file. Rows of a group go to one part."
    )
    _add_source(parser)
    _add_out(parser, "FOLDER", "the folder of the files NAME.jsonl")
    add = parser.add_argument
    parts = "names and shares of the parts (default: train=0.8,validation=0.1,test=0.1)"
    add("--parts", type=text, default="train=0.8,validation=0.1,test=0.1", metavar="NAME=SHARE,...", help=parts)
    add("--stratify", type=text, metavar="COLUMN", help="column whose values have the same shares in all parts")
    add("--group", type=text, metavar="COLUMN", help="rows with the same value in this column go to one part")
    add("--near", action="store_true", help="rows with equal or nearly equal prompts go to one part")
    _add_similarity(parser)
    _add_seed(parser)
    return parser


def split(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.split import parse_parts, split

    parts = split(
        arguments.file,
        arguments.out,
        parts=parse_parts(arguments.parts),
        stratify=arguments.stratify,
        group=arguments.group,
        near=arguments.near,
        similarity=arguments.similarity,
        seed=arguments.seed,
        kind=arguments.kind,
        settings=arguments.settings,
        overwrite=arguments.overwrite,
    )
    for part in parts:
        labels = ", ".join(f"{label} {count:,}" for label, count in part.labels.items())
        print(printable(f"{part.path}: {part.rows:,} rows" + (f" ({labels})" if labels else "")))
        if missing := sorted({label for other in parts for label in other.labels} - set(part.labels)):
            print(printable(f"  no row of {', '.join(missing)}: too few rows for all parts"))


def clean_parser() -> Parser:
    parser = _parser(
        "clean",
        "Writes the usable rows: no duplicates, no pairs of equal responses, texts in Unicode NFC with \\n as line "
        "end and without control characters. Says how many rows were dropped, by reason.",
    )
    _add_source(parser)
    _add_out(parser)
    parser.add_argument("--near", action="store_true", help="also drop near-duplicates of earlier rows")
    _add_similarity(parser)
    parser.add_argument("--tokenizer", type=model_path, metavar="DIR", help="model folder or hub id that counts tokens")
    for unit in ("tokens", "chars"):
        for limit, bound in (("min", "fewer"), ("max", "more")):
            help = f"drop rows of {bound} {'characters' if unit == 'chars' else 'tokens'}"
            parser.add_argument(f"--{limit}-{unit}", type=whole(0), metavar="N", help=help)
    return parser


def clean(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.clean import clean

    if arguments.tokenizer is None and (arguments.min_tokens is not None or arguments.max_tokens is not None):
        raise UserError("--min-tokens and --max-tokens need --tokenizer, the model folder that counts the tokens")
    result = clean(
        arguments.file,
        arguments.out,
        near=arguments.near,
        similarity=arguments.similarity,
        tokenizer=_tokenizer(arguments.tokenizer),
        tokens=(arguments.min_tokens or 0, arguments.max_tokens),
        chars=(arguments.min_chars or 0, arguments.max_chars),
        kind=arguments.kind,
        settings=arguments.settings,
        overwrite=arguments.overwrite,
    )
    print(printable(str(result)))


def augment_parser() -> Parser:
    parser = _parser(
        "augment",
        "Writes each row and changed copies of it. The prompt changes; of a chat its last turn of the user; of other "
        "rows the text. split --group source keeps a row and its copies together.",
    )
    _add_source(parser)
    _add_out(parser)
    _add_seed(parser)
    add = parser.add_argument
    add("--copies", type=whole(1, 1000), default=1, metavar="N", help="copies per row (default: 1)")
    column = "column that names the row from which a copy was made; a value that is there stays (default: source)"
    add("--column", type=text, default="source", metavar="COLUMN", help=column)
    add("--dropout", type=_share, default=0.0, metavar="P", help="share of words that are left out")
    add("--swap", type=_share, default=0.0, metavar="P", help="share of words that change places with the next word")
    synonyms = "file of synonyms; a line holds words with the same meaning, separated by commas"
    add("--synonyms", type=path, metavar="FILE", help=synonyms)
    share = "share of the words with synonyms that are replaced (default: 0.2)"
    add("--synonym-share", type=_share, default=0.2, metavar="P", help=share)
    template = "jinja template around the text, such as 'Q: {{ text }}'; of several, each copy has a random one"
    add("--template", type=text, action="append", default=[], metavar="TEXT", help=template)
    add("--rewrite", choices=("paraphrase", "translate"), help="have a model write the text anew, or there and back")
    add("--language", type=text, default="German", help="with --rewrite translate, the language between (German)")
    add("--server", type=text, metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--model", type=model_path, metavar="NAME", help="the server's model; without --server a folder or hub id")
    add("--token-env", type=text, metavar="NAME", help="environment variable with the server's token")
    add("--temperature", type=finite, default=1.0, help="of the model (default: 1.0)")
    add("--max-new-tokens", type=whole(1), default=512, help="of the model, per text (default: 512)")
    return parser


def augment(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.augment import Methods, augment, compiled_template, read_synonyms

    methods = Methods(
        rewrite=_rewrite(arguments),
        rewrite_at_once=arguments.rewrite is not None and arguments.server is None,
        synonyms=None if arguments.synonyms is None else read_synonyms(arguments.synonyms),
        synonym_share=arguments.synonym_share,
        swap=arguments.swap,
        dropout=arguments.dropout,
        templates=[compiled_template(template) for template in arguments.template],
    )
    if methods.synonyms is not None and not methods.synonyms:
        raise UserError(f"--synonyms: {arguments.synonyms} has no line with two words; a line must be like: big, large")
    if not (methods.rewrite or methods.synonyms or methods.swap or methods.dropout or methods.templates):
        raise UserError("give --dropout, --swap, --synonyms, --template or --rewrite, which say what changes")
    rows, copies = augment(
        arguments.file,
        arguments.out,
        methods,
        copies=arguments.copies,
        column=arguments.column,
        seed=arguments.seed,
        kind=arguments.kind,
        settings=arguments.settings,
        overwrite=arguments.overwrite,
    )
    print(printable(f"{arguments.out}: {rows:,} rows and {copies:,} changed copies"))


def _rewrite(arguments: argparse.Namespace):
    if arguments.rewrite is None:
        return None
    from jaxrlhf.curation import rewriting

    if arguments.model is None:
        raise UserError("--rewrite: needs --model; give a folder or a hub id, or with --server the model's name there")
    sampling = {"temperature": arguments.temperature, "max_tokens": arguments.max_new_tokens}
    if arguments.server is None:
        ask = rewriting.LocalModel(arguments.model, **sampling)
    else:
        ask = rewriting.ChatServer(arguments.server, arguments.model, token_env=arguments.token_env, **sampling)
    if arguments.rewrite == "paraphrase":
        return rewriting.paraphrase(ask)
    return rewriting.back_translation(ask, arguments.language)


def sample_parser() -> Parser:
    parser = _parser(
        "sample",
        "Writes completions of a model for the prompts of a file, with empty scores for people to fill in. "
        "convert --from scored then writes preference pairs.",
    )
    _add_source(parser, kinds=False)
    _add_out(parser)
    count = "completions of each role per prompt (default: 2)"
    parser.add_argument("--count", type=whole(1, 1000), default=2, metavar="N", help=count)
    add_origin(parser, "roles of a run to compare, such as sft,policy (default: the role trained last)")
    add_sampling(parser)
    return parser


def sample(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.sample import sample

    rows, completions = sample(
        arguments.file,
        arguments.out,
        arguments,
        count=arguments.count,
        settings=arguments.settings,
        overwrite=arguments.overwrite,
    )
    print(printable(f"{arguments.out}: {completions:,} completions of {rows:,} prompts"))


def convert_parser() -> Parser:
    parser = _parser("convert", "Writes the rows of another project's format as JSON Lines that the stages read.")
    _add_source(parser, kinds=False)
    parser.add_argument("--from", dest="form", choices=FORMATS, required=True, help="format of the file")
    _add_out(parser)
    column = "for csv: a new name for a column, such as prompt=question; may be repeated"
    parser.add_argument("--column", type=text, action="append", default=[], metavar="NEW=OLD", help=column)
    parser.add_argument("--drop", action="store_true", help="drop rows that cannot be converted, instead of stopping")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    from jaxrlhf.curation.convert import convert

    columns = {}
    for column in arguments.column:
        new, equals, old = column.partition("=")
        if not equals or not new or arguments.form != "csv":
            raise UserError(f"--column {column!r}: must have the form NEW=OLD, and needs --from csv")
        columns[new] = old
    report = convert(
        arguments.file,
        arguments.out,
        arguments.form,
        columns=columns,
        drop=arguments.drop,
        settings=arguments.settings,
        overwrite=arguments.overwrite,
    )
    print(printable(str(report)))


PARSERS: dict[str, Callable[[], Parser]] = {
    "check": check_parser,
    "split": split_parser,
    "clean": clean_parser,
    "augment": augment_parser,
    "sample": sample_parser,
    "convert": convert_parser,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    name, *rest = arguments or ["--help"]
    if name in PARSERS:
        return PARSERS[name]().parse_intermixed_args(rest)
    parser = Parser(
        prog="jaxrlhf data",
        usage="jaxrlhf data COMMAND FILE ...",
        description="Checks data files and prepares them. jaxrlhf data COMMAND --help lists the options.",
        epilog="check: faulty rows, duplicates, leaks, labels. split: training, validation and test files. clean: "
        "drops faulty rows and odd characters. augment: adds changed copies of rows. sample: completions of a "
        "model for people to score. convert: reads other formats.",
    )
    parser.add_argument("command", choices=PARSERS)
    return parser.parse_args([name])


def main(arguments: list[str] | None = None) -> int:
    def run(stop: object) -> None:
        parsed = parse(arguments)
        parsed.call(parsed)

    return main_of(run)
