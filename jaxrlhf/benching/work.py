"""The least that a program has to do: multiplications and additions of matrix products, and bytes it has to read.

By formula, from shapes and from the lengths of the answers, not from what was compiled: a program that does less than
before comes nearer to its limit. Counted per pass of one role, with W the weights of a layer's linear maps, A those of
its LoRA pairs, D x V the head, a multiplication and an addition each as one:

    forward    2 (W + A) per real token, 4 heads x head size per (query, key) that sees each other, 2 D V per position
               whose logits are wanted
    backward   2 W + 4 A per token where LoRA is trained (no gradient of the base), 4 W where W is; twice the forward
               of attention; 2 D V of the head, 4 where it is trained
    decoding   weights, adapter and the filled cache are read once a step, by the rows that have not ended

Nobody wants the gradient of the embedding under LoRA: the first layer's part of it is left out. Nobody reads what the
last layer says of a prompt but for its last token: its queries, MLP and what joins them are left out there (the reward
model's, which reads one token of each row, counts in full). Elementwise work, activations that leave the caches, and
what `remat` computes twice are no part of the least.

In float32 a pair may be added to its kernel (`models.linear`), with 2 r in out once for each value that the adapter has
in a pass, instead of 2 A per token forward: the smaller one counts. Backward is 4 A either way. Decoding then has
kernels alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrlhf.benching.machine import Rates
from jaxrlhf.config import RunConfig
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.decoder import Decoder, find_module, linear_shapes, named_parameters
from jaxrlhf.records import Rollout
from jaxrlhf.steps.ppo import computed_steps, single_step

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_READS_INPUT = (*_QKV, "mlp.gate_proj", "mlp.up_proj")  # of a block whose attention and MLP read the same
_FOR_OTHERS = ("attention.k_proj", "attention.v_proj")  # what later positions read of a position


@dataclasses.dataclass
class _Weights:
    """Counts of a role's weights."""

    plain: float = 0.0  # of the base
    trained: float = 0.0  # of them, those that are trained
    pairs: float = 0.0  # of LoRA pairs whose products are their own
    unwanted: float = 0.0  # through which no gradient need go
    mergeable: list["_Pair"] = dataclasses.field(default_factory=list)  # the other pairs

    def forward(self, tokens: float, values: int) -> float:
        return 2 * (self.plain + self.pairs) * tokens + sum(pair.forward(tokens, values) for pair in self.mergeable)

    def backward(self, tokens: float, values: int) -> float:
        own = 2 * self.plain + 2 * self.trained + 4 * self.pairs - 2 * self.unwanted
        return own * tokens + sum(pair.backward(tokens, values) for pair in self.mergeable)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Counts of a LoRA pair that may be added to its kernel once for each of its `values`, where that is less."""

    weights: float
    product: float  # rank x in x out
    unwanted: float  # weights through which no gradient need go; added to a kernel they make no product of their own

    def _merged(self, tokens: float, values: int) -> bool:
        return self.product * values < self.weights * tokens

    def forward(self, tokens: float, values: int) -> float:
        return 2 * (self.product * values if self._merged(tokens, values) else self.weights * tokens)

    def backward(self, tokens: float, values: int) -> float:
        return (4 * self.weights - (0 if self._merged(tokens, values) else 2 * self.unwanted)) * tokens


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a program that cannot overlap with its others, such as a step of decoding."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


@dataclasses.dataclass(frozen=True)
class Work:
    """All phases of one call of a program, and the tokens that it is about."""

    phases: tuple[Phase, ...]
    tokens: float  # sampled ones, in an update once for each epoch; of other stages all

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes for phase in self.phases)

    def least_seconds(self, rates: Rates) -> float:
        """The sum over phases of what binds each at these rates."""
        return sum(phase.seconds(rates) for phase in self.phases)

    def bound_by(self, rates: Rates) -> str:
        """What most of the least time goes by."""
        arithmetic = sum(p.seconds(rates) for p in self.phases if p.flops / rates.flops >= p.bytes / rates.bytes)
        return "arithmetic" if 2 * arithmetic >= self.least_seconds(rates) else "memory"


class Role:
    """The base with one adapter: what a pass through it takes. Trees may hold arrays or shapes."""

    def __init__(self, base: Decoder, adapter: Any):
        self.base, self.config, self.adapter = base, base.config, adapter or {}
        config = self.config
        self.early, self.late = _Weights(), _Weights()  # late: of the last layer, what only its own position reads
        whole = any(name != SCORE and "lora_a" not in leaves for name, leaves in self.adapter.items())
        reads = _READS_INPUT if config.parallel_residual else _QKV
        last = f"layers.{config.layers - 1}."
        for path, (fan_in, fan_out) in linear_shapes(base).items():
            leaves = self.adapter.get(path, {})
            late = path.startswith(last) and path.removeprefix(last) not in _FOR_OTHERS
            counts = self.late if late else self.early
            counts.plain += fan_in * fan_out
            counts.trained += fan_in * fan_out if "kernel" in leaves else 0
            first = not whole and path.removeprefix("layers.0.") in reads
            counts.unwanted += fan_in * fan_out if first else 0
            if "lora_a" not in leaves:
                continue
            down, up = leaves["lora_a"].size, leaves["lora_b"].size
            if self._in_kernel(path):
                counts.mergeable.append(_Pair(down + up, down * fan_out, down if first else 0))
            else:
                counts.pairs += down + up
                counts.unwanted += down if first else 0
        self.head = config.hidden_size * config.vocab_size
        self.trains_head = any(name in self.adapter for name in ("lm_head", "embed_tokens"))

    def forward(
        self, tokens: float, seen: float, logits: float = 0, scalars: float = 0, unread: float = 0, values: int = 1
    ) -> float:
        """Of real tokens, pairs that see each other (summed over layers), logits and scalar-head positions.

        `unread` counts the tokens of whose last state nobody wants anything, `values` those that the adapter has in
        turn while the tokens pass; 0: it is in the kernels already.
        """
        trunk = self.early.forward(tokens, values) + self.late.forward(tokens - unread, values)
        return trunk + self._attention(seen) + 2 * self.head * logits + 2 * self.config.hidden_size * scalars

    def backward(
        self, tokens: float, seen: float, logits: float = 0, scalars: float = 0, unread: float = 0, values: int = 1
    ) -> float:
        """Of the same pass, with the gradient of what the adapter trains."""
        trunk = self.early.backward(tokens, values) + self.late.backward(tokens - unread, values)
        trunk += 2 * self._attention(seen)
        head = (4 if self.trains_head else 2) * self.head * logits
        return trunk + head + 4 * self.config.hidden_size * scalars

    def both(self, *counts: float, values: int = 1) -> float:
        return self.forward(*counts, values=values) + self.backward(*counts, values=values)

    def _attention(self, seen: float) -> float:
        return 4 * self.config.heads * self.config.head_dim * seen

    def seen(self, lengths: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """Pairs (query, key) of causal attention in rows of these lengths, summed over layers.

        In the last layer only queries from read[0] up to read[1] of each row; None: all.
        """
        *windows, last = self._windows()
        first, end = (0 * lengths, lengths) if read is None else read
        before = sum(float(np.sum(_causal_pairs(lengths, w))) for w in windows)
        return before + float(np.sum(_causal_pairs(end, last) - _causal_pairs(first, last)))

    def seen_by_next(self, lengths: np.ndarray) -> float:
        """The same for one more token per row, whose query sees so many keys, its own included."""
        return sum(float(np.sum(lengths if w is None else np.minimum(lengths, w))) for w in self._windows())

    def _windows(self) -> list[int | None]:
        return [self.config.layer_kind(i).window for i in range(self.config.layers)]

    def weight_bytes(self, logits: bool, tokens: float, merged: bool = False) -> float:
        """Of the base and the adapter as a pass reads them: of the embedding only the tokens' rows, unless it is the
        head too. `merged`: pairs that may be are in the kernels."""
        total = _bytes(
            {path: leaves for path, leaves in self.adapter.items() if not (merged and self._in_kernel(path))}
        )
        for name, leaf in named_parameters(self.base).items():
            if name.startswith(("embed_tokens", "embed_positions")) and not (
                logits and self.config.tie_embeddings and name.startswith("embed_tokens")
            ):
                total += min(tokens * leaf.shape[1], leaf.size) * leaf.dtype.itemsize
            elif logits or not name.startswith("lm_head"):
                total += leaf.size * leaf.dtype.itemsize
        return total

    def cache_bytes(self, keys: float) -> float:
        """Of keys and values, `keys` summed over rows and layers."""
        return 2 * self.config.kv_heads * self.config.head_dim * self._dtype().itemsize * keys

    def _dtype(self) -> np.dtype:
        """Of activations."""
        return named_parameters(self.base)["embed_tokens/embedding"].dtype

    def _in_kernel(self, path: str) -> bool:
        """Whether a program may add what the adapter has of this path, as a LoRA pair, to a kernel."""
        pair = path != SCORE and "lora_a" in self.adapter[path]
        return pair and self._dtype() == np.float32 and find_module(self.base, path).merges


def _causal_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs in rows of these lengths: 1 + 2 + ..., but no more than the window each."""
    lengths = np.asarray(lengths, np.float64)
    if window is None:
        return lengths * (lengths + 1) / 2
    short = np.minimum(lengths, window)
    return short * (short + 1) / 2 + (lengths - short) * window


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _optimizer_bytes(adapter: Any) -> float:
    """Parameters and both moments, read and written."""
    return 6 * _bytes(adapter)


# ---------------------------------------------------------------- programs


def rollout(base: Decoder, policy: Any, prompts: np.ndarray, answers: np.ndarray) -> Work:
    """Prompts of these lengths, each read once, and answers of these lengths, i[B n]."""
    role, group = Role(base, policy), len(answers) // len(prompts)
    seen = role.seen(prompts, (prompts - 1, prompts))
    read = role.forward(prompts.sum(), seen, len(prompts), 0, prompts.sum() - len(prompts))
    phases = [Phase(read, role.weight_bytes(True, prompts.sum()))]
    before = np.repeat(prompts, group)
    for t in range(1, int(answers.max())):  # the token at t is sampled by a step that reads the one before it
        filled = before[answers > t] + t
        keys = role.seen_by_next(filled)
        flops = role.forward(len(filled), keys, len(filled), values=0)
        phases.append(Phase(flops, role.weight_bytes(True, len(filled), merged=True) + role.cache_bytes(keys)))
    return Work(tuple(phases), float(answers.sum()))


def reward(base: Decoder, adapter: Any, lengths: np.ndarray, tokens: float) -> Work:
    """One scalar for each row of these lengths."""
    role = Role(base, adapter)
    flops = role.forward(lengths.sum(), role.seen(lengths), 0, len(lengths))
    return Work((Phase(flops, role.weight_bytes(False, lengths.sum())),), tokens)


def annotate(
    base: Decoder, policy: Any, value: Any, reference: Any, lengths: np.ndarray, answers: np.ndarray, update: Any
) -> Work:
    """Logprobs of the policy, unless the update makes its own, and of the reference; values, where there are any."""
    total, wanted = lengths.sum(), float(answers.sum())
    passes = [(Role(base, reference), wanted, 0.0)]
    shared, needs_policy = update.value_trunk == "policy" and bool(value), not single_step(update)
    if shared:
        passes.append((Role(base, {**policy, **value}), wanted if needs_policy else 0.0, wanted))
    else:
        passes += [(Role(base, policy), wanted, 0.0)] if needs_policy else []
        passes += [(Role(base, value), 0.0, wanted)] if value else []
    read = _before(lengths, answers)
    flops = sum(role.forward(total, role.seen(lengths, read), *heads, total - wanted) for role, *heads in passes)
    # The base is read once for all roles, each adapter besides.
    size = Role(base, None).weight_bytes(True, total) + sum(_bytes(role.adapter) for role, *_ in passes)
    return Work((Phase(flops, size),), wanted)


def update(
    base: Decoder, policy: Any, value: Any, lengths: np.ndarray, answers: np.ndarray, update: Any, mix: Any = None
) -> Work:
    """Epochs of forward and backward passes of policy and value, and an optimizer step for each minibatch."""
    total, wanted = lengths.sum(), float(answers.sum())
    if value and update.value_trunk == "policy":
        passes = [(Role(base, {**policy, **value}), wanted, wanted)]
    else:
        passes = [(Role(base, policy), wanted, 0.0)] + ([(Role(base, value), 0.0, wanted)] if value else [])
    read = _before(lengths, answers)
    values = update.minibatches  # each one's step gives the adapters others
    flops = update.epochs * sum(
        role.both(total, role.seen(lengths, read), *heads, total - wanted, values=values) for role, *heads in passes
    )
    if mix is not None:
        role, (rows, length) = Role(base, policy), mix.tokens.shape
        flops += role.both(rows * length, role.seen(np.full(rows, length)), rows * (length - 1))
    steps = update.epochs * update.minibatches
    size = 2 * Role(base, None).weight_bytes(True, total / update.minibatches) + sum(
        2 * _bytes(role.adapter) + _optimizer_bytes(role.adapter) for role, _, _ in passes
    )
    return Work((Phase(flops, steps * size),), wanted * update.epochs)


def _before(lengths: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions before each token of the answers, which rows end with: from and up to."""
    return lengths - answers - 1, lengths - 1


def train_step(base: Decoder, adapter: Any, lengths: np.ndarray, logits: float, scalars: float) -> Work:
    """One optimizer step of the stages sft and reward_model."""
    role = Role(base, adapter)
    flops = role.both(lengths.sum(), role.seen(lengths), logits, scalars)
    size = 2 * role.weight_bytes(logits > 0, lengths.sum()) + _optimizer_bytes(adapter)
    return Work((Phase(flops, size),), float(lengths.sum()))


# ---------------------------------------------------------------- from what a program is given


def work_of(name: str, args: tuple, kwargs: dict[str, Any], result: Any, config: RunConfig) -> Work:
    """The least work of a call of one of `planning.programs`' programs; `result` is what it gave."""
    kind = name.split()[0]
    if name not in _BY_NAME and kind != "reward":
        raise ValueError(f"no formula for the program {name!r}")
    return _BY_NAME.get(name, _reward_model)(args, kwargs, result, config)


def _lengths(mask: jax.Array) -> np.ndarray:
    return np.asarray(mask).sum(1)


def _rollout(args: tuple, kwargs: dict, result: Rollout, config: RunConfig) -> Work:
    base, policy, prompts, *_ = args
    return rollout(base, policy, _lengths(prompts.mask), _lengths(result.response_mask))


def _own_reward(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    base, adapter, answers = args
    return reward(base, adapter, _lengths(answers.mask), float(_lengths(answers.response_mask).sum()))


def _reward_model(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    base, head, _, mask = args
    return reward(base, head, _lengths(mask), float(_lengths(mask).sum()))


def _annotate(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    base, policy, value, reference, answers, _ = args
    lengths, wanted = _lengths(answers.mask), _lengths(answers.response_mask)
    return annotate(base, policy, value, reference, lengths, wanted, config.ppo.update)


def _experience(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    """Has no products: what it is given is read, what it gives is written."""
    answers, *_ = args
    return Work((Phase(0.0, _bytes(args[:-1]) + _bytes(result)),), float(_lengths(answers.response_mask).sum()))


def _update(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    state, base, experience, *_ = args
    lengths, wanted = _lengths(experience.mask), _lengths(experience.response_mask)
    whole = update(base, state.policy, state.value, lengths, wanted, config.ppo.update, kwargs.get("mix"))
    part = computed_steps(result[1], config.ppo.update) / (config.ppo.update.epochs * config.ppo.update.minibatches)
    phases = tuple(Phase(phase.flops * part, phase.bytes * part) for phase in whole.phases)
    return Work(phases, whole.tokens * part)


def _sft(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    state, base, batch, *_ = args
    rows, length = batch.tokens.shape
    return train_step(base, state.adapter, np.full(rows, length), rows * (length - 1.0), 0.0)


def _pairs(args: tuple, kwargs: dict, result: Any, config: RunConfig) -> Work:
    state, base, batch, *_ = args
    lengths = np.concatenate([_lengths(batch.chosen_mask), _lengths(batch.rejected_mask)])
    return train_step(base, state.adapter, lengths, 0.0, float(len(lengths)))


_BY_NAME: dict[str, Callable[[tuple, dict, Any, RunConfig], Work]] = {
    "rollout": _rollout,
    "greedy": _rollout,
    "reward": _own_reward,
    "annotate": _annotate,
    "experience": _experience,
    "update": _update,
    "sft_update": _sft,
    "reward_model_update": _pairs,
}
