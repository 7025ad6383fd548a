"""Counts the GPU kernels of one optimizer step in the program that XLA compiles; no GPU is needed.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION    (jaxlib's version; 180 MB)
    python benchmarks/kernels.py [--card h100] [--stage ppo|sft] [--layers 6]

`--card` names a description in jaxrlhf/plan/targets. The model is that of configs/bench with `--layers` layers and
LoRA of rank 8 on all linear layers; ppo has two adapters (policy and value). It counts the kernels of `optimizer_step`
and all copies around them, for ppo in the loop over minibatches, for sft in the full program.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
from pathlib import Path

os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", TF_CPP_MIN_LOG_LEVEL="3", JAX_PLATFORMS="")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig
from jaxrlhf.hf.families import read_config
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.decoder import abstract_decoder
from jaxrlhf.records import Experience, SFTBatch, TrainState
from jaxrlhf.steps.optimizer import init_optimizer
from jaxrlhf.steps.ppo import init_ppo, ppo_update
from jaxrlhf.steps.sft import sft_update

ROOT = Path(__file__).parents[1]
MODEL, TARGETS = ROOT / "configs" / "bench" / "config.json", ROOT / "jaxrlhf" / "plan" / "targets"
ROWS, PROMPT, RESPONSE = 32, 32, 64
LAUNCHED = "fusion|custom-call|copy|reduce|concatenate|slice|transpose|select|convert|broadcast|dynamic-update-slice"


def lowered(stage: str, layers: int) -> tuple:
    """(function, abstract arguments) of one float32 step of the stage."""
    model = dataclasses.replace(read_config(json.loads(MODEL.read_text()), str(MODEL)), layers=layers)
    base, rate = abstract_decoder(model, "float32"), OptimizerConfig(learning_rate=1e-4)

    def adapter(head: str | None = None):
        return jax.eval_shape(lambda base: init_adapter(base, AdapterConfig(rank=8), jax.random.key(0), head), base)

    def array(dtype, *shape: int):
        return jax.ShapeDtypeStruct(shape, dtype)

    B, S, R = ROWS, PROMPT + RESPONSE, RESPONSE
    if stage == "sft":
        state = jax.eval_shape(lambda a: TrainState(a, init_optimizer(a), jnp.int32(0)), adapter())
        batch = SFTBatch(array(jnp.int32, B, S), array(jnp.int32, B, S), array(jnp.bool_, B, S))
        return sft_update, (state, base, batch, rate)
    config = PPOConfig(epochs=4, minibatches=1, microbatch_size=16, optimizer=rate, value_optimizer=rate)
    state = jax.eval_shape(lambda p, v: init_ppo(p, v, config), adapter(), adapter("value"))
    masks = {"mask": array(jnp.bool_, B, S), "response_mask": array(jnp.bool_, B, R)}
    rows = {name: array(jnp.float32, B) for name in ("temperature", "kl_coef")}
    tokens = ("sample_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")
    per_token = {name: array(jnp.float32, B, R) for name in tokens}
    experience = Experience(tokens=array(jnp.int32, B, S), **masks, **rows, **per_token)
    return ppo_update, (state, base, experience, jax.eval_shape(lambda: jax.random.key(0)), config)


def count(text: str) -> tuple[collections.Counter, int]:
    """(optimizer kernels by kind, number of all kernels) of the computation with the most optimizer kernels."""
    computation = r"^(?:ENTRY )?%?(?!fused|wrapped)[\w.\-]+ \([^\n]*\) -> [^\n]* \{\n(.*?)^\}"
    best = collections.Counter(), 0
    for body in re.findall(computation, text, re.M | re.S):
        kinds, launched = collections.Counter(), 0
        for line in body.split("\n"):
            found = re.match(rf"\s+(?:ROOT )?%?([\w.\-]+) = .*? ({LAUNCHED})\(", line)
            launched += found is not None
            if found and ("/optimizer/" in line or found[2] == "copy"):
                kinds[re.sub(r"[._\d]+$", "", found[1])] += 1
        best = max(best, (kinds, launched), key=lambda counted: counted[0].total())
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", choices=sorted(file.stem for file in TARGETS.glob("*.txtpb")), default="h100")
    parser.add_argument("--stage", choices=("ppo", "sft"), default="ppo")
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args()
    lines = (TARGETS / f"{given.card}.txtpb").read_text(encoding="utf-8").splitlines(keepends=True)
    target = "".join(line for line in lines if not line.startswith("#"))
    topology = topologies.get_topology_desc("card", "cuda", target_config=target, topology="1x1x1")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, shapes = lowered(given.stage, given.layers)
    jitted = jax.jit(function, in_shardings=place, out_shardings=place, donate_argnums=0)
    compiled = jitted.lower(*shapes).compile()
    kinds, launched = count(compiled.as_text())
    print(f"{given.stage}, {given.layers} layers: optimizer launches {kinds.total()}: {dict(kinds.most_common())}")
    print(f"{launched} kernels in the computation that contains them")
    print(f"temporaries {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
