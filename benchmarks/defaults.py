"""Measures the effect of default settings and their alternatives: the figures of docs/defaults.md.

    python benchmarks/defaults.py [steps] [epsilon] [lam] [value]         numbers on random models; minutes
    python benchmarks/defaults.py runs --model FOLDER --data FILE --reward path.py:function [--iterations 100]

`steps`: how far one iteration moves a policy, by width and kind. `epsilon`: how much of a step Adam's epsilon leaves at
the gradients of large models. `lam`: how much of a final score reaches the first tokens. `value`: how fast a value
model reaches the scale of its scores. `runs`: PPO with only model, data, reward and lengths set: LoRA, full fine-tune,
GRPO.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from jaxrlhf.algorithms.advantages import gae
from jaxrlhf.algorithms.losses import value_loss
from jaxrlhf.algorithms.masked import whiten
from jaxrlhf.config import AdapterConfig, AdvantageConfig, OptimizerConfig, PPOConfig, Sampling
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, abstract_decoder, named_parameters, with_parameters
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate, build_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

ROWS, PROMPT, ANSWER, VOCABULARY = 16, 8, 32, 256
RATE = OptimizerConfig(learning_rate=1e-4)
FORMER = {"epochs": 4, "minibatches": 1, "optimizer": RATE, "value_optimizer": RATE}
STORY = {"text_tokens": 8}  # a story's first tokens are the prompt


# ---------------------------------------------------------------- one iteration on a random model


def random_decoder(width: int, seed: int = 3) -> Decoder:
    """Two layers with activations of size 1 and logits with a deviation of about 2."""
    config = DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, layers=2, heads=width // 32,
        kv_heads=width // 32, head_dim=32, max_positions=64, stop_tokens=(), pad_token=0,
    )  # fmt: skip
    abstract, values = abstract_decoder(config, jnp.float32), {}
    generator = np.random.default_rng(seed)
    sizes = {"embed_tokens/embedding": 1.0, "lm_head/kernel": 2 * width**-0.5}
    for name, leaf in named_parameters(abstract).items():
        drawn = sizes.get(name, width**-0.5) * generator.standard_normal(leaf.shape)
        values[name] = jnp.asarray(np.ones(leaf.shape) if "norm" in name else drawn, leaf.dtype)
    return with_parameters(abstract, values)


def moved(width: int, kind: str, configs: list[PPOConfig]) -> list[tuple[float, float]]:
    """(KL per token from old to new policy, share of ratios outside 0.8 .. 1.2) after one iteration with each config.

    All of them learn from the same completions.
    """
    base = random_decoder(width)
    policy = init_adapter(base, AdapterConfig(kind=kind), jax.random.key(1))
    value = init_adapter(base, AdapterConfig(rank=2), jax.random.key(2), "value")
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(1, VOCABULARY, (ROWS, PROMPT)), jnp.int32)
    prompts = Prompts(tokens, jnp.ones((ROWS, PROMPT), bool))
    sampling = Sampling(max_new_tokens=ANSWER, stop_tokens=())
    sampled = jax.jit(rollout)(base, policy, prompts, jax.random.key(5), sampling)
    annotated, update, results = jax.jit(annotate), jax.jit(ppo_update), []
    before = annotated(base, policy, value, None, sampled)
    scores = jnp.asarray(generator.standard_normal(ROWS), jnp.float32)
    experience, _ = build_experience(sampled, before, scores, 0.05, lam=AdvantageConfig().lam)
    for config in configs:
        state, _ = update(init_ppo(policy, value, config), base, experience, jax.random.key(0), config)
        log_ratio = annotated(base, state.policy, value, None, sampled).logprobs - before.logprobs
        outside = (log_ratio > np.log(1.2)) | (log_ratio < np.log(0.8))
        results.append((float((jnp.expm1(log_ratio) - log_ratio).mean()), float(outside.mean())))
    return results


def steps() -> None:
    print("one iteration: KL per token, old to new; share of tokens outside the clip range")
    print("| trained | width | 4 x 1, 1e-4 (before) | 1 x 4, defaults |\n|" + " --- |" * 4)
    for kind, widths in (("lora", (64, 256, 768, 2048)), ("full", (64, 256, 768))):
        for width in widths:
            cells = [f"{kl:.1e}; {out:.0%}" for kl, out in moved(width, kind, [PPOConfig(**FORMER), PPOConfig()])]
            print(f"| {kind} | {width} | {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------- numbers alone


def epsilon() -> None:
    print("share of Adam's step that epsilon leaves, if all gradients are equal, by gradient norm")
    print("| trained | gradient norm | each | epsilon 1e-5 | 1e-8 |\n|" + " --- |" * 5)
    for name, count in (("LoRA r16 of 1B", 11e6), ("LoRA r16 of 8B", 42e6), ("full 1B", 1.2e9), ("full 8B", 8e9)):
        for norm in (1.0, 0.1):
            each = norm / count**0.5
            left = [each / (each + size) for size in (1e-5, 1e-8)]
            print(f"| {name} | {norm:g} | {each:.0e} | {left[0]:.3f} | {left[1]:.3f} |")


def lam() -> None:
    print("a value model of 0 everywhere, a final score of 0 or 1: whitened advantage of 1 minus that of 0")
    print("| tokens | lam | first token | half way | last | tokens with more than 0.1 |\n|" + " --- |" * 6)
    generator = np.random.default_rng(0)
    for length in (64, 320, 1024):
        rewards = np.zeros((256, length), np.float32)
        rewards[:, -1] = right = generator.integers(0, 2, 256)
        mask = jnp.ones(rewards.shape, bool)
        for value in (0.95, 1.0):
            advantages = whiten(gae(jnp.asarray(rewards), jnp.zeros(rewards.shape), mask, 1.0, value)[0], mask)
            gap = np.asarray(advantages)[right == 1].mean(0) - np.asarray(advantages)[right == 0].mean(0)
            cells = f"{gap[0]:.1e} | {gap[length // 2]:.1e} | {gap[-1]:.1f} | {np.mean(gap > 0.1):.0%}"
            print(f"| {length} | {value:g} | {cells} |")


def value() -> None:
    print("iterations until a value is within a tenth of the scores' deviation of their mean, with its loss minimised")
    print("| scores | value begins at | clip 0.2 | clip 0.5 |\n|" + " --- |" * 4)
    for name, mean, deviation, start in (
        ("0 or 1", 0.4, 0.5, 0.0), ("a reward model's", 3.0, 2.0, 0.0), ("0 to 10", 5.0, 3.0, 0.0),
    ):  # fmt: skip
        counts = [_iterations(start, mean, 0.1 * deviation, clip) for clip in (0.2, 0.5)]
        print(f"| {name} (mean {mean:g}, deviation {deviation:g}) | {start:g} | {counts[0]} | {counts[1]} |")


def _iterations(start: float, mean: float, near: float, clip: float) -> int:
    """Number of times that `value_loss` is minimised on a grid around the old value."""
    current, mask = start, jnp.ones((1, 4001), bool)
    for count in range(1, 1000):
        old = jnp.full((1, 4001), current)
        grid = current + jnp.linspace(-2.0, 2.0, 4001)[None]
        losses = np.asarray(value_loss(grid, old, jnp.full_like(grid, mean), mask, clip)[0])[0]
        # Beyond the clip the loss is flat at best, so an optimizer stops where it reaches that.
        best = np.flatnonzero(losses <= losses.min() + 1e-9)
        current = float(min((float(grid[0, i]) for i in best), key=lambda x: abs(x - current)))
        if abs(current - mean) < near:
            return count
    return 1000


# ---------------------------------------------------------------- runs

RUNS = {
    "LoRA": [],
    "full fine-tune": ["adapter.kind=full"],
    "GRPO": ["ppo.advantage.estimator=grpo", "ppo.sampling.samples_per_prompt=8"],
}


def runs(given: argparse.Namespace) -> None:
    """Prints the reward by tenth of each run, and the KL at its end."""
    ppo = {
        "data": {"path": given.data, **STORY}, "max_prompt_tokens": 16, "overflow": "cut", "sampling":
        {"max_new_tokens": 64}, "reward": {"kind": "function", "function": given.reward},
        "iterations": given.iterations,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            run = Path(folder, name.replace(" ", "-"))
            settings = {"run_dir": str(run), "stages": ["ppo"], "model": {"path": given.model}, "ppo": ppo}
            file = Path(folder, "config.yaml")
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
            command = [sys.executable, "-m", "jaxrlhf.train", "--config", str(file), *overrides]
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                sys.exit(f"{name}: the run failed")
            print(f"{name}: {summary(run / 'metrics.jsonl')}", flush=True)


def summary(metrics: Path) -> str:
    """Mean score of each tenth of PPO's iterations, and the mean KL of the last tenth."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["stage"] == "ppo"]
    tenths = [[line["reward/score"] for line in part] for part in np.array_split(np.array(lines, object), 10)]
    kl = np.mean([line["kl/k1"] for line in lines[-max(len(lines) // 10, 1) :]])
    return f"reward by tenth {' '.join(f'{np.mean(part):.3f}' for part in tenths)}; final KL per completion {kl:.1f}"


PARTS = {"steps": steps, "epsilon": epsilon, "lam": lam, "value": value}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "runs"], help="default: all but runs")
    parser.add_argument("--model", help="runs: a Hugging Face folder")
    parser.add_argument("--data", help="runs: JSON Lines of texts")
    parser.add_argument("--reward", help="runs: path.py:function")
    parser.add_argument("--iterations", type=int, default=100, help="runs: of each; default 100")
    given = parser.parse_args(arguments)
    if "runs" in given.parts and None in (given.model, given.data, given.reward):
        parser.error("runs needs --model, --data and --reward")
    for part in given.parts or PARTS:
        runs(given) if part == "runs" else PARTS[part]()


if __name__ == "__main__":
    main()
