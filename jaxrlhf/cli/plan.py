"""jaxrlhf plan --config FILE --devices N [key.path=value ...]: estimates a run without GPUs or weights."""

import argparse
import json
import os
import sys

from jaxrlhf.cli.arguments import MOST_PROCESSES, Parser, path, whole
from jaxrlhf.cli.exits import main_of
from jaxrlhf.plan.cards import CARDS, find_card, parse_memory, usable_share
from jaxrlhf.plan.quiet import without_driver_warnings

# These are set before jax is imported. Local GPUs are then unused, and each plan compiles anew without a cache.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="jaxrlhf plan",
        description="Estimates memory, arithmetic, communication and least time of each program of a run on N GPUs. "
        "Needs neither GPUs nor weights, only config.json of model.path. XLA compiles the programs for these GPUs; "
        "deep models are extrapolated from a few layers. Without XLA's GPU compiler the figures come from closed "
        "formulas, and a line says what to install.",
    )
    add = parser.add_argument
    add("--config", type=path, required=True, metavar="FILE", help="YAML file of settings")
    add("--devices", required=True, type=whole(1, MOST_PROCESSES), metavar="N", help="number of GPUs, such as 8 or 512")
    add("--card", default="h100", help=f"{', '.join(CARDS)}; default h100")
    add("--memory", metavar="SIZE", help="memory of each GPU, such as 80GiB (default: the memory of the card)")
    add(
        "--per-host", type=whole(1, MOST_PROCESSES), default=8, metavar="N", help="number of GPUs per host (default: 8)"
    )
    add("--json", action="store_true", help="print JSON")
    add("overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)


def plan(arguments: argparse.Namespace) -> None:
    if "jax" not in sys.modules:
        os.environ.update(_ENVIRONMENT)
    from jaxrlhf.config.reading import load_config

    config = load_config(arguments.config, arguments.overrides)
    with without_driver_warnings():
        from jaxrlhf.plan.planner import Options, make_plan
        from jaxrlhf.plan.report import as_json, as_text

    card = find_card(arguments.card)
    memory = parse_memory(arguments.memory) if arguments.memory else card.memory
    options = Options(arguments.devices, card, memory * usable_share(), arguments.per_host)
    result = make_plan(config, options, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(as_json(result), indent=1) if arguments.json else as_text(result))


def main(arguments: list[str] | None = None) -> int:
    return main_of(lambda stop: plan(parse(arguments)))
