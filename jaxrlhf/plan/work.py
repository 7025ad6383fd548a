"""The least that a program has to do: arithmetic of matrix products, bytes to read, bytes to send. By formula.

From sizes and from the lengths of the answers, not from what was compiled: a program that does less than before comes
nearer to its limit. Counted per pass of one role, with W the weights of a layer's linear maps, A those of its LoRA
pairs, D x V the head, L layers, a multiplication and an addition each as one:

    forward    2 (W + A) per real token, 4 heads x head size per (query, key) that sees each other, 2 D V per position
               whose logits are wanted
    backward   2 W + 4 A per token where LoRA is trained (no gradient of the base), 4 W where W is; twice the forward
               of attention; 2 D V of the head, 4 where it is trained
    bytes      weights and adapters once a pass; decoding also the filled cache, 2 x kv heads x head size x L per
               position; an update's parameters and both moments are read and written (6 times the adapter)
    sent       over tensor (t cards), 2 all-reduces of [tokens, D] a layer forward and 2 backward (one where attention
               and MLP read the same), each 2 (t - 1) / t of its bytes; over fsdp (f), the weights of each pass,
               (f - 1) / f; over data x fsdp (n), gradients of each optimizer step, 2 (n - 1) / n

Left out as unused: the gradient of the embedding under LoRA, thus of what enters the first layer; of prompts, what the
last layer computes behind keys and values, but for the last token (the reward model, which reads one token of each row,
counts in full). Elementwise work, activations that leave the caches and what `remat` computes twice are no part of the
least. In float32 a pair may be added to its kernel (`models.linear`), with 2 r in out for each value that the adapter
has in a pass, instead of 2 A per token forward: the smaller one counts. Decoding then has kernels alone.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.config import PPOConfig, RunConfig
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.decoder import Decoder, find_module, linear_shapes, named_parameters
from jaxrlhf.steps.ppo import computed_steps, single_step

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_READS_INPUT = (*_QKV, "mlp.gate_proj", "mlp.up_proj")  # of a block whose attention and MLP read the same
_FOR_OTHERS = ("attention.k_proj", "attention.v_proj")  # what later positions read of a position


@dataclasses.dataclass(frozen=True)
class Rates:
    """Per second."""

    flops: float  # of matrix products, a multiplication and an addition each count
    bytes: float  # read from and written to memory


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of a program on all devices together, phase by phase: a phase, such as a decode step, overlaps no other.

    `reduced` and `gradients` are bytes that are summed over `tensor`, and over `data` and `fsdp`.
    """

    flops: np.ndarray  # f64[phases]
    weights: np.ndarray  # f64[phases]; bytes of parameters that are read, and of optimizer states
    cache: np.ndarray  # f64[phases]; bytes of keys and values that are read
    tokens: float  # sampled ones, in an update once for each epoch; of other stages all
    reduced: float = 0.0
    gradients: float = 0.0

    @property
    def bytes(self) -> np.ndarray:
        """f64[phases]; from and to memory."""
        return self.weights + self.cache

    def part(self, share: float) -> "Work":
        """A share of the same work."""
        return Work(**{field.name: getattr(self, field.name) * share for field in dataclasses.fields(self)})

    def on_card(self, mesh: Mapping[str, int]) -> tuple["Work", dict[str, float]]:
        """(one card's share, bytes that it sends by mesh axis); what an axis does not divide evenly is left out."""
        data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
        groups = data * fsdp
        share = dataclasses.replace(
            self,
            flops=self.flops / (groups * tensor),
            weights=self.weights / tensor,  # each group reads what its rows meet, gathered or not
            cache=self.cache / (groups * tensor),
            reduced=self.reduced / groups,
            gradients=self.gradients / tensor,
        )
        sent = {
            "tensor": 2 * (tensor - 1) / tensor * share.reduced,
            "fsdp": (fsdp - 1) / fsdp * (float(share.weights.sum()) + share.gradients),
            "data": 2 * (data - 1) / data * share.gradients / fsdp,
        }
        return share, sent

    def least_seconds(self, rates: Rates) -> float:
        """The sum over phases of what binds each at these rates."""
        return float(np.maximum(self.flops / rates.flops, self.bytes / rates.bytes).sum())

    def bound_by(self, rates: Rates) -> str:
        """What most of the least time goes by: arithmetic or memory."""
        arithmetic, memory = self.flops / rates.flops, self.bytes / rates.bytes
        return "arithmetic" if 2 * arithmetic[arithmetic >= memory].sum() >= self.least_seconds(rates) else "memory"


def _work(flops: float, weights: float, tokens: float, reduced: float = 0.0, gradients: float = 0.0) -> Work:
    """The work of a program of one phase, without a cache."""
    return Work(np.array([flops], float), np.array([weights], float), np.zeros(1), tokens, reduced, gradients)


# ---------------------------------------------------------------- a pass of one role


class _Pair(NamedTuple):
    """Counts of a LoRA pair that may be added to its kernel once for each value it has, where that is less."""

    weights: float
    product: float  # rank x in x out
    unused: float  # weights through which no gradient need go; added to a kernel they make no product of their own


@dataclasses.dataclass
class _Weights:
    """Counts of a role's weights."""

    plain: float = 0.0  # of the base
    trained: float = 0.0  # of them, those that are trained
    pairs: float = 0.0  # of LoRA pairs whose products are their own
    unused: float = 0.0  # through which no gradient need go
    mergeable: collections.Counter[_Pair] = dataclasses.field(default_factory=collections.Counter)  # and how many

    def flops(self, tokens: Any, values: int, backward: bool) -> Any:
        """Floating-point operations of the products with these weights, forward, or with their gradients too."""
        total = 2 * (self.plain + self.pairs) * tokens
        if backward:
            total += (2 * self.plain + 2 * self.trained + 4 * self.pairs - 2 * self.unused) * tokens
        for pair, count in self.mergeable.items():
            alone, merged = pair.weights * tokens, pair.product * values
            total = total + 2 * count * np.minimum(alone, merged)
            if backward:
                total += count * (4 * alone - (0 if merged < alone else 2 * pair.unused * tokens))
        return total


class Role:
    """The base with one adapter: what a pass through it takes. Trees may hold arrays or shapes.

    The parameters are walked once, here; every count after that is arithmetic on a few numbers.
    """

    def __init__(self, base: Decoder, adapter: Any):
        self.config, self.adapter = base.config, adapter or {}
        config, leaves = self.config, named_parameters(base)
        self.activations = leaves["embed_tokens/embedding"].dtype
        self.early, self.late = _Weights(), _Weights()  # late: of the last layer, what only its own position reads
        whole = any(name != SCORE and "lora_a" not in own for name, own in self.adapter.items())
        reads = _READS_INPUT if config.parallel_residual else _QKV
        last = f"layers.{config.layers - 1}."
        self.adapter_bytes, self.merged_bytes = _bytes(self.adapter), 0.0
        for path, (fan_in, fan_out) in linear_shapes(base).items():
            own = self.adapter.get(path, {})
            late = path.startswith(last) and path.removeprefix(last) not in _FOR_OTHERS
            counts = self.late if late else self.early
            counts.plain += fan_in * fan_out
            counts.trained += fan_in * fan_out if "kernel" in own else 0
            first = not whole and path.removeprefix("layers.0.") in reads
            counts.unused += fan_in * fan_out if first else 0
            if "lora_a" not in own:
                continue
            down, up = own["lora_a"].size, own["lora_b"].size
            if self.activations == np.float32 and find_module(base, path).can_merge:
                counts.mergeable[_Pair(down + up, down * fan_out, down if first else 0)] += 1
                self.merged_bytes += _bytes(own)
            else:
                counts.pairs += down + up
                counts.unused += down if first else 0
        self.head = config.hidden_size * config.vocab_size
        self.trains_head = any(name in self.adapter for name in ("lm_head", "embed_tokens"))
        self.tables = {name: leaf for name, leaf in leaves.items() if name.startswith(("embed_", "lm_head"))}
        self.blocks = float(sum(_bytes(leaf) for name, leaf in leaves.items() if name not in self.tables))
        *self.windows, self.last_window = (config.layer_kind(i).window for i in range(config.layers))

    def flops(
        self,
        tokens: Any,
        seen: Any,
        logits: Any = 0,
        scalars: float = 0,
        unread: float = 0,
        values: int = 1,
        backward: bool = False,
    ) -> Any:
        """Operations of a pass, by the numbers of real tokens, pairs seen (over all layers), logits and scalars.

        `unread` counts the tokens whose last state is unused, `values` those that the adapter has in turn while the
        tokens pass; 0: it is in the kernels already. `backward` adds the gradient of what the adapter trains.
        """
        trunk = self.early.flops(tokens, values, backward) + self.late.flops(tokens - unread, values, backward)
        attention = 4 * self.config.heads * self.config.head_dim * seen
        head, scalar = 2 * self.head * logits, 2 * self.config.hidden_size * scalars
        if not backward:
            return trunk + attention + head + scalar
        return trunk + 3 * attention + (3 if self.trains_head else 2) * head + 3 * scalar

    def seen(self, lengths: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """Pairs (query, key) of causal attention in rows of these lengths, summed over layers.

        In the last layer only queries from read[0] up to read[1] of each row; None: all.
        """
        first, end = (0 * lengths, lengths) if read is None else read
        last = _causal_pairs(end, self.last_window) - _causal_pairs(first, self.last_window)
        return float(sum(_causal_pairs(lengths, window).sum() for window in self.windows) + last.sum())

    def seen_by_next(self, filled: np.ndarray) -> np.ndarray:
        """Keys that one more token of each row sees, its own included; summed over rows (the last axis) and layers."""
        windows = (*self.windows, self.last_window)
        return sum((filled if window is None else np.minimum(filled, window)).sum(-1) for window in windows)

    def weight_bytes(self, logits: bool, tokens: Any, merged: bool = False) -> Any:
        """Bytes of base and adapter that a pass reads: of the embedding only the tokens' rows, unless it is the head
        too. `merged`: LoRA pairs that may be merged are in the kernels already."""
        total = self.blocks + self.adapter_bytes - (self.merged_bytes if merged else 0.0)
        for name, leaf in self.tables.items():
            head = self.config.tie_embeddings and name.startswith("embed_tokens")
            if name.startswith("embed_") and not (logits and head):
                total = total + np.minimum(tokens * leaf.shape[1], leaf.size) * leaf.dtype.itemsize
            elif logits or not name.startswith("lm_head"):
                total = total + _bytes(leaf)
        return total

    def cache_bytes(self, keys: Any) -> Any:
        """Bytes of cached keys and values, where `keys` is their number over rows and layers."""
        return 2 * self.config.kv_heads * self.config.head_dim * self.activations.itemsize * keys

    def reduced(self, tokens: float) -> float:
        """Bytes that a pass sums over `tensor`: [tokens, D] after each row-split product."""
        times = 1 if self.config.parallel_residual else 2
        return times * self.config.layers * tokens * self.config.hidden_size * self.activations.itemsize


def _causal_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs in rows of these lengths: 1 + 2 + ..., but no more than the window each."""
    lengths = np.asarray(lengths, np.float64)
    short = lengths if window is None else np.minimum(lengths, window)
    return short * (short + 1) / 2 + (lengths - short) * (window or 0)


def _bytes(tree: Any) -> float:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))


# ---------------------------------------------------------------- programs


def rollout(base: Decoder, policy: Any, prompts: np.ndarray, answers: np.ndarray) -> Work:
    """Prompts of these lengths, each read once, and answers of these lengths, i[B n]: a phase for each token."""
    role, group = Role(base, policy), len(answers) // len(prompts)
    seen = role.seen(prompts, (prompts - 1, prompts))
    read = role.flops(prompts.sum(), seen, len(prompts), unread=prompts.sum() - len(prompts))
    # The token at t is sampled by a step that reads the one before it.
    at = np.arange(1, max(int(answers.max()), 1))[:, None]
    active = answers > at
    rows = active.sum(-1).astype(float)
    keys = role.seen_by_next(np.where(active, np.repeat(prompts, group) + at, 0))
    return Work(
        np.append(read, role.flops(rows, keys, rows, values=0)),
        np.append(role.weight_bytes(True, prompts.sum()), 0 * rows + role.weight_bytes(True, rows, merged=True)),
        np.append(0.0, role.cache_bytes(keys)),
        float(answers.sum()),
        role.reduced(float(prompts.sum() + rows.sum())),
    )


def reward(base: Decoder, adapter: Any, lengths: np.ndarray, tokens: float) -> Work:
    """One scalar for each row of these lengths."""
    role, total = Role(base, adapter), float(lengths.sum())
    flops = role.flops(total, role.seen(lengths), scalars=len(lengths))
    return _work(flops, role.weight_bytes(False, total), tokens, role.reduced(total))


def annotate(
    base: Decoder, policy: Any, value: Any, reference: Any, lengths: np.ndarray, answers: np.ndarray, update: PPOConfig
) -> Work:
    """Logprobs of the policy, unless the update makes its own, and of the reference; values, where there are any."""
    total, wanted = float(lengths.sum()), float(answers.sum())
    passes = [(Role(base, reference), wanted, 0.0), *_passes(base, policy, value, wanted, update, single_step(update))]
    seen = passes[0][0].seen(lengths, _before(lengths, answers))
    flops = sum(role.flops(total, seen, *heads, total - wanted) for role, *heads in passes)
    # The base is read once for all roles, each adapter besides.
    first = passes[0][0]
    size = first.weight_bytes(True, total) + sum(role.adapter_bytes for role, *_ in passes[1:])
    return _work(flops, size, wanted, len(passes) * first.reduced(total))


def update(
    base: Decoder, policy: Any, value: Any, lengths: np.ndarray, answers: np.ndarray, update: PPOConfig, mix: Any = None
) -> Work:
    """Epochs of forward and backward passes of policy and value, and an optimizer step for each minibatch."""
    total, wanted = float(lengths.sum()), float(answers.sum())
    passes = _passes(base, policy, value, wanted, update)
    first = passes[0][0]
    seen = first.seen(lengths, _before(lengths, answers))
    values = update.minibatches  # each one's step gives the adapters others
    flops = update.epochs * sum(
        role.flops(total, seen, *heads, total - wanted, values, backward=True) for role, *heads in passes
    )
    reduced = update.epochs * len(passes) * 2 * first.reduced(total)
    if mix is not None:
        role, (rows, length) = Role(base, policy), mix.tokens.shape
        seen = role.seen(np.full(rows, length))
        flops += role.flops(rows * length, seen, rows * (length - 1), backward=True)
        reduced += 2 * role.reduced(rows * length)
    steps, adapters = update.epochs * update.minibatches, sum(role.adapter_bytes for role, *_ in passes)
    bare = first.weight_bytes(True, total / update.minibatches) - first.adapter_bytes
    return _work(flops, steps * (2 * bare + 8 * adapters), wanted * update.epochs, reduced, steps * adapters)


def train_step(base: Decoder, adapter: Any, lengths: np.ndarray, logits: float, scalars: float) -> Work:
    """One optimizer step of the stages sft and reward_model."""
    role, total = Role(base, adapter), float(lengths.sum())
    flops = role.flops(total, role.seen(lengths), logits, scalars, backward=True)
    size = 2 * role.weight_bytes(logits > 0, total) + 6 * role.adapter_bytes
    return _work(flops, size, total, 2 * role.reduced(total), role.adapter_bytes)


def _passes(
    base: Decoder, policy: Any, value: Any, wanted: float, update: PPOConfig, values_only: bool = False
) -> list[tuple[Role, float, float]]:
    """(role, logits, scalars) of each pass of policy and value, one where they share the trunk."""
    logits = 0.0 if values_only else wanted
    if value and update.value_trunk == "policy":
        return [(Role(base, {**policy, **value}), logits, wanted)]
    passes = [] if values_only else [(Role(base, policy), wanted, 0.0)]
    return [*passes, (Role(base, value), 0.0, wanted)] if value else passes


def _before(lengths: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions before each token of the answers, which rows end with: from and up to."""
    return lengths - answers - 1, lengths - 1


def work_of(name: str, args: tuple, kwargs: dict[str, Any], result: Any, config: RunConfig) -> Work:
    """The least work of a call of one of the stages' programs (`stages.programs`), named as there.

    `result` is what it gave. Arrays say how long rows are; of shapes all have their full length.
    """
    settings = None if config.ppo is None else config.ppo.update
    match name.split()[0], args:
        case "rollout" | "greedy", (base, policy, prompts, *_):
            return rollout(base, policy, _lengths(prompts.mask), _lengths(result.response_mask))
        case "reward", (base, adapter, answers):
            return reward(base, adapter, _lengths(answers.mask), float(_lengths(answers.response_mask).sum()))
        case "reward", (base, head, _, mask):  # a model with a base of its own
            return reward(base, head, _lengths(mask), float(_lengths(mask).sum()))
        case "annotate", (*roles, answers, _):
            return annotate(*roles, _lengths(answers.mask), _lengths(answers.response_mask), settings)
        case "experience", (answers, *rest):  # no products: what it is given is read, what it gives is written
            read = _bytes((answers, rest[:-1]))
            return _work(0.0, read + _bytes(result), float(_lengths(answers.response_mask).sum()))
        case "update", (state, base, rows, *_):
            lengths, wanted = _lengths(rows.mask), _lengths(rows.response_mask)
            whole = update(base, state.policy, state.value, lengths, wanted, settings, kwargs.get("mix"))
            steps = settings.epochs * settings.minibatches
            return whole if result is None else whole.part(computed_steps(result[1], settings) / steps)
        case "sft_update", (state, base, batch, *_):
            rows, length = batch.tokens.shape
            return train_step(base, state.adapter, np.full(rows, length), rows * (length - 1.0), 0.0)
        case "reward_model_update", (state, base, batch, *_):
            lengths = np.concatenate([_lengths(batch.chosen_mask), _lengths(batch.rejected_mask)])
            return train_step(base, state.adapter, lengths, 0.0, float(len(lengths)))
    raise ValueError(f"no formula for the program {name!r}")


def _lengths(mask: Any) -> np.ndarray:
    """i[rows]; real tokens of each row."""
    if isinstance(mask, jax.ShapeDtypeStruct):
        return np.full(mask.shape[0], mask.shape[1])
    return np.asarray(mask).sum(1)
