"""Times scoring and update with padded and with packed rows, in turn in one process.

    python benchmarks/packed.py [--lengths geometric] [--repeats 3] [--config configs/bench.yaml] [key.path=value ...]

For each program: seconds to compile, seconds of a call, and processor seconds of a call, summed over threads. Both
kinds get the same completions.
"""

import argparse
import statistics

import numpy as np

from jaxrlhf.bench.filling import Filler
from jaxrlhf.bench.measure import with_lengths
from jaxrlhf.bench.timing import Timed
from jaxrlhf.config.reading import load_config
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

NEEDED, TIMED = ("rollout", "annotate", "experience", "update"), ("annotate", "update")


def programs(packed: bool, given: argparse.Namespace):
    """Yields the compiled programs in the order of an iteration. Each gets the results of those before it."""
    config = load_config(given.config, [*given.overrides, f"ppo.update.packed={str(packed).lower()}"])
    model, mesh = read_model(config.model), make_mesh(config.mesh)
    config = resolved(with_lengths(config, given.lengths, model.vocab_size))
    filler = Filler(model, config.seed)
    for call in calls_of("ppo", Shapes(config, mesh, model)):
        if call.name not in NEEDED:
            continue
        program = Timed(call, filler.fill(call.args), filler.fill(call.kwargs))
        result = program.again()
        if call.result is not None:
            filler.give(call.result, result[: len(call.result)] if isinstance(call.result, tuple) else result)
        if call.name == "rollout" and not packed:
            rows = result[0] if isinstance(result, tuple) else result
            lengths = np.asarray(rows.response_mask).sum(1)
            print(f"{len(lengths)} completions, {lengths.mean():.1f} tokens on average", flush=True)
        yield program


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", choices=("full", "geometric"), default="geometric")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default="configs/bench.yaml")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    for pair in zip(programs(False, given), programs(True, given)):
        if pair[0].name not in TIMED:
            continue
        for program in pair * given.repeats:
            program.again()
        seconds = [statistics.median(program.seconds[-given.repeats :]) for program in pair]
        busy = [statistics.median(program.cpu_seconds[-given.repeats :]) for program in pair]
        padded, packed = (f"{program.memory()['temporaries'] / 2**20:.0f} MiB" for program in pair)
        print(
            f"{pair[0].name}: padded {seconds[0]:.3f} s, packed {seconds[1]:.3f} s ({seconds[1] / seconds[0]:.2f}); "
            f"processor {busy[0]:.3f} s, {busy[1]:.3f} s ({busy[1] / busy[0]:.2f}); compiled in "
            f"{pair[0].compile_seconds:.1f} s, {pair[1].compile_seconds:.1f} s; temporaries {padded}, {packed}",
            flush=True,
        )


if __name__ == "__main__":
    main()
