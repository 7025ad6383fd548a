"""Measures the gain of submitting an SFT step before reading the metrics of the previous one.

    python benchmarks/host_loop.py [--blocks 20] [key.path=value ...]

Runs the quickstart's SFT in a temporary folder, in blocks of ten steps that alternately read metrics at once or late.
Prints the time per step of each, and the median ratio of neighbouring blocks. The first block of each is left out,
because it compiles.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from jaxrlhf.config.reading import load_config
from jaxrlhf.stages import training
from jaxrlhf.stages.loop import Loop
from jaxrlhf.stages.run import run_stages

BLOCK = 10  # steps
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Finished(Exception):
    """Enough blocks have been timed."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    times: dict[bool, list[float]] = {False: [], True: []}  # seconds per block, by whether metrics were read late

    class Alternating(Loop):
        def submitted(self, step: int, *rest, **named) -> None:
            block = step // BLOCK
            if step % BLOCK == 0:
                self.began = time.perf_counter()
            super().submitted(step, *rest, **named)
            if block % 2 == 0 or step % BLOCK == BLOCK - 1:
                self._read()
            if step % BLOCK == BLOCK - 1:
                times[block % 2 == 1].append(time.perf_counter() - self.began)
                if block + 1 == given.blocks:
                    raise Finished

    training.Loop = Alternating
    with tempfile.TemporaryDirectory() as folder:
        always = [f"run_dir={folder}", "stages=[sft]", "sft.epochs=100", "sft.save_every=1000000"]
        with contextlib.suppress(Finished):
            run_stages(load_config(str(QUICKSTART), [*always, *given.overrides]))
    waited, ahead = times[False][1:], times[True][1:]
    for name, found in (("read at once", waited), ("read late", ahead)):
        print(f"{name}: {1e3 * statistics.median(found) / BLOCK:.2f} ms a step (median of {len(found)} blocks)")
    ratios = [a / w for w, a in zip(waited, ahead)]
    print(f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
