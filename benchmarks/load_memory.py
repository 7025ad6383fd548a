"""Measures the host memory that loading a folder takes beyond the parameters themselves.

    python benchmarks/load_memory.py [--gigabytes 2] [--dtype bfloat16] [--stored bfloat16] [--folder DIR]

Without --folder it writes a random sharded Llama of that size to a temporary folder first. It reports the peak resident
memory, minus that before loading, minus the parameters, which on a CPU are in host memory too. The bound is the largest
tensor plus 1 GiB; exit status 1 above it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

LOAD = """
import json, resource, sys
import jax
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.decoder import named_parameters
jax.block_until_ready(jax.numpy.ones(3) + 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, _ = load_pretrained(sys.argv[1], sys.argv[2])
leaves = jax.block_until_ready(list(named_parameters(model).values()))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": after - before, "parameters": sum(leaf.nbytes for leaf in leaves),
                  "largest": max(leaf.nbytes for leaf in leaves)}))
"""


def write_random_llama(folder: Path, size: float, stored: str) -> None:
    """Writes a sharded Llama of about `size` bytes, tensor by tensor."""
    from jaxrlhf.hf.families import address_of, config_document
    from jaxrlhf.hf.tensor_files import Pending, write_checkpoint, write_json
    from jaxrlhf.models.decoder import DecoderConfig, abstract_decoder, named_parameters

    dtype = np.dtype(getattr(ml_dtypes, stored) if stored == "bfloat16" else stored)
    hidden, per_layer = 2048, 12 * 2048**2
    layers = max(1, round((size / dtype.itemsize - 2 * 32000 * hidden) / per_layer))
    config = DecoderConfig(32000, hidden, 4 * hidden // 3 * 2, layers, 16, 16, 128, 2048)
    tensors = {}
    for name, leaf in named_parameters(abstract_decoder(config)).items():
        where = address_of(config, name)
        shape = leaf.shape[::-1] if where.transposed else leaf.shape
        tensors[where.tensor] = Pending(dtype, shape, lambda shape=shape: np.full(shape, 0.01, dtype))
    write_checkpoint(folder, tensors, max_shard_bytes=500_000_000)
    write_json(folder / "config.json", config_document(config, stored))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16", help="in memory")
    parser.add_argument("--stored", default="bfloat16", help="on disk")
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        if arguments.folder is None:
            write_random_llama(folder, arguments.gigabytes * 1e9, arguments.stored)
        command = [sys.executable, "-c", LOAD, str(folder), arguments.dtype]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    beyond, bound = figures["peak"] - figures["parameters"], figures["largest"] + math.pow(2, 30)
    print(f"parameters {figures['parameters'] / 1e9:.2f} GB, largest tensor {figures['largest'] / 1e9:.2f} GB")
    print(f"beyond the parameters at the peak: {beyond / 1e9:.2f} GB (bound {bound / 1e9:.2f} GB)")
    sys.exit(beyond > bound)


if __name__ == "__main__":
    main()
