"""Memory and speed of streamed data: python benchmarks/streaming.py [--megabytes 300] [--folder DIR]

Writes a JSON Lines file of demonstrations. Reads all batches of a pass in a process of its own, streamed and in memory,
and prints the peak memory above that of a process that has only imported the package. No model takes part.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH, BATCH, BUFFER = 512, 16, 10_000
WORDS = [f"word{i}" for i in range(2000)]
SIDES = {"imports": None, "streamed": True, "in memory": False}


def write(path: Path, megabytes: int) -> int:
    """Writes rows of about 800 bytes. Returns the number of rows."""
    draw, rows = np.random.default_rng(0), 0
    texts = [" ".join(WORDS[i] for i in draw.integers(0, len(WORDS), 45)) for _ in range(1000)]
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            for first, second in draw.integers(0, len(texts), (1000, 2)):
                file.write(json.dumps({"prompt": texts[first], "response": texts[second], "number": rows}) + "\n")
                rows += 1
    return rows


def read(path: str, streaming: bool | None) -> dict[str, float]:
    """Reads a pass. Returns seconds, batches and the peak memory of this process in bytes."""
    from jaxrlhf.config import DemonstrationsConfig
    from jaxrlhf.data.sft import SFTData, demonstrations_reader, load_demonstrations
    from jaxrlhf.data.streamed import StreamedBatches
    from jaxrlhf.data.streams import Stream
    from jaxrlhf.data.tokenizers import build_word_tokenizer

    tokenizer, start, step = build_word_tokenizer(WORDS), time.perf_counter(), 0

    def data(examples, bounds=None):
        return SFTData(examples, BATCH, LENGTH, 0, pad_id=0, bounds=bounds)

    if streaming:
        config = DemonstrationsConfig(path=path, streaming=True, shuffle_buffer=BUFFER)
        stream = Stream(config, lambda source: demonstrations_reader(source, tokenizer, LENGTH, "cut"), print)
        batches = StreamedBatches(stream, data, LENGTH, 1)
        while batches.total(step) != step:
            batches.batch(step)
            step += 1
    elif streaming is not None:
        batches = data(load_demonstrations(DemonstrationsConfig(path=path), tokenizer, LENGTH, "cut")[0])
        for step in range(1, len(batches) + 1):
            batches.batch(step - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "batches": step, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(read(str(arguments.folder / "rows.jsonl"), SIDES[arguments.side])))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "rows.jsonl")
        rows = write(path, arguments.megabytes)
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:.0f} MB")
        base = 0.0
        for side in SIDES:
            command = [sys.executable, __file__, "--folder", folder, "--side", side]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(result.stdout.splitlines()[-1])
            base = base or found["peak"]
            peak, above = found["peak"] / 1e6, (found["peak"] - base) / 1e6
            work = f"{found['seconds']:.1f} s, {found['batches']} batches"
            print(f"{side}: peak {peak:.0f} MB, {above:.0f} MB above imports; {work}")


if __name__ == "__main__":
    main()
