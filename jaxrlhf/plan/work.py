"""The least work of each program, from formulas. Work means operations of matrix products, and bytes to read and send.

The formulas use sizes and row lengths, not the compiled program. So the work is a fixed limit, and a faster program
comes closer to it. A multiplication and an addition are two operations. The formulas are for one pass of one role
(policy, value, reward or reference). W is the number of weights in the linear layers of a block, and A the number of
weights in the LoRA pairs of these layers. D x V is the shape of the head, and L the number of layers.

    forward    2 (W + A) per real token, 4 heads x head size per (query, key) pair, 2 D V per position with logits
    backward   2 W + 4 A per token with LoRA (the base has no gradient), 4 W if W is trained; twice the forward of
               attention; 2 D V for the head, 4 D V if the head is trained
    bytes      weights and adapters once in each pass; decoding also reads the filled cache, 2 x kv heads x head size
               x L numbers per position; an update reads and writes its parameters and both moments (6 times the
               adapter)
    sent       tensor (t cards): in each layer, 2 all-reduces of [tokens, D] forward and 2 backward (1 each if attention
               and MLP read the same input); each sends 2 (t - 1) / t of its bytes. fsdp (f cards): (f - 1) / f of the
               weights in each pass. context (c cards): (c - 1) / c of queries, keys, values and outputs of attention
               in each pass forward and in each pass backward. data x fsdp x context (n cards): 2 (n - 1) / n of the
               gradients in each optimizer step

Work that no result needs is not counted. With LoRA, no result needs the gradient of the first layer's input. In the
last layer, prompt tokens before the last prompt token need only keys and values. (For the reward model, the last layer
is counted in full.) Elementwise operations, reads and writes of activations that do not fit in caches, and work that
`remat` repeats are not counted either.

In float32 a LoRA pair may be merged into its kernel (`models.linear`). A merge takes 2 x rank x in x out operations,
once for each value that the adapter has during the pass. Without the merge, the pair takes 2 A operations per token.
The smaller of the two numbers counts. Decoding with merged kernels reads no LoRA pairs.
"""

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import PPOConfig, RunConfig
from jaxrlhf.distributed.mesh import AXES
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder, find_module, linear_shapes, named_parameters
from jaxrlhf.steps.ppo import computed_steps, single_step

_KEYS_VALUES = ("attention.k_proj", "attention.v_proj")  # later positions also read the outputs of these layers
_QKV = ("attention.q_proj", *_KEYS_VALUES)
_PARALLEL_INPUTS = (*_QKV, "mlp.gate_proj", "mlp.up_proj")  # layers that read the input of a parallel block


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates per second. `flops` counts operations of matrix products, `bytes` counts bytes from and to memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one call of a program by phase, summed over all devices.

    Phases are steps that do not overlap, such as decode steps.
    """

    flops: np.ndarray  # f64[phases]
    weights: np.ndarray  # f64[phases]; bytes of parameters and optimizer states that are read or written
    cache: np.ndarray  # f64[phases]; bytes of keys and values that are read
    tokens: float  # in PPO the number of sampled tokens (in an update, times epochs); in other stages all tokens
    reduced: float = 0.0  # bytes of activations that are summed over `tensor`
    gradients: float = 0.0  # bytes of gradients that are summed over `data`, `fsdp` and `context`
    exchanged: float = 0.0  # bytes of activations whose split changes between positions and heads over `context`

    @property
    def bytes(self) -> np.ndarray:
        """The bytes that are read from and written to memory, f64[phases]."""
        return self.weights + self.cache

    def on_card(self, mesh: Mapping[str, int]) -> tuple["Work", dict[str, float]]:
        """Returns (the work of one card, the bytes that the card sends along each mesh axis).

        The axes are assumed to divide all work evenly.
        """
        data, fsdp, context, tensor = (mesh[axis] for axis in AXES)
        groups = data * fsdp * context
        share = dataclasses.replace(
            self,
            flops=self.flops / (groups * tensor),
            weights=self.weights / tensor,  # each group reads all weights for its rows, even if `fsdp` splits them
            cache=self.cache / (groups * tensor),
            reduced=self.reduced / groups,
            gradients=self.gradients / tensor,
            exchanged=self.exchanged / (groups * tensor),
        )
        sent = {
            "tensor": 2 * (tensor - 1) / tensor * share.reduced,
            "fsdp": (fsdp - 1) / fsdp * (float(share.weights.sum()) + share.gradients),
            "context": (context - 1) / context * (share.exchanged + 2 * share.gradients / fsdp),
            "data": 2 * (data - 1) / data * share.gradients / fsdp,
        }
        return share, sent

    def least_seconds(self, rates: Rates) -> float:
        """Returns the least time in seconds.

        A phase takes the longer of two times: that of its arithmetic and that of its memory traffic. The result is the
        sum over the phases.
        """
        return float(np.maximum(self.flops / rates.flops, self.bytes / rates.bytes).sum())

    def bound_by(self, rates: Rates) -> str:
        """Returns "arithmetic" or "memory", whichever takes more of the least time."""
        arithmetic, memory = self.flops / rates.flops, self.bytes / rates.bytes
        return "arithmetic" if 2 * arithmetic[arithmetic >= memory].sum() >= self.least_seconds(rates) else "memory"


def _one_phase(flops: float, weights: float, tokens: float, *sent: float) -> Work:
    """`sent` are the fields `reduced`, `gradients` and `exchanged`."""
    return Work(np.array([flops], float), np.array([weights], float), np.zeros(1), tokens, *sent)


class Role:
    """Counts the work of passes through the base with one adapter. The leaves of both may be arrays or shapes."""

    def __init__(self, base: Decoder, adapter: Any, merge_rounded: bool = False):
        """`merge_rounded` is as in `adapters.for_decoding`."""
        self.config, self.adapter, leaves = base.config, adapter or {}, named_parameters(base)
        self.dtype = leaves["embed_tokens/embedding"].dtype
        self.adapter_bytes, self.merged_bytes = _bytes(self.adapter), 0.0
        full = any(name != SCORE and "lora_a" not in own for name, own in self.adapter.items())
        first_inputs = _PARALLEL_INPUTS if self.config.parallel_residual else _QKV
        last, maps = f"layers.{self.config.layers - 1}.", []
        for path, (fan_in, fan_out) in linear_shapes(base).items():
            own = self.adapter.get(path, {})
            down, up = (own[name].size if name in own else 0 for name in ("lora_a", "lora_b"))
            exact = self.dtype == np.float32 and find_module(base, path).can_merge
            merges = down > 0 and (exact or (merge_rounded and find_module(base, path).merges(True)))
            self.merged_bytes += _bytes(own) if merges else 0.0
            late = path.startswith(last) and path.removeprefix(last) not in _KEYS_VALUES
            first = not full and path.removeprefix("layers.0.") in first_inputs
            maps.append((fan_in * fan_out, "kernel" in own, down, down + up, down * fan_out, merges, late, first))
        # Linear layers with equal numbers share one row of `maps`, and `counts` is the number of these layers. `late`
        # marks a layer if only the same position reads its outputs. `first` marks a layer if its input needs no
        # gradient.
        maps, self.counts = np.unique(np.array(maps, float), axis=0, return_counts=True)
        self.kernel, self.trained, self.down, self.pair, self.product, self.merges, self.late, self.first = maps.T
        self.head_tokens = self.config.vocab_size if base.lm_head is None else base.lm_head.shape[1]
        self.trains_head = any(name in self.adapter for name in ("lm_head", "embed_tokens"))
        self.tables = {name: leaf for name, leaf in leaves.items() if name.startswith(("embed_", "lm_head"))}
        self.blocks = _bytes([leaf for name, leaf in leaves.items() if name not in self.tables])
        *self.windows, self.last_window = (self.config.layer_kind(i).window for i in range(self.config.layers))

    def flops(self, tokens, seen, logits=0, scalars=0, unread=0, values=1, *, backward: bool = False) -> Any:
        """Returns the operations of a pass. All numbers are floats or f64[n].

        `seen` is the number of (query, key) pairs. `logits` and `scalars` are the numbers of positions with logits and
        with outputs of the scalar head. `unread` is the number of tokens with a last hidden state that is not used.
        `values` is the number of adapter values during the pass, one per optimizer step. If `values` is 0, the adapter
        is already merged. `backward` adds the gradients of the trained parameters.
        """
        config, tokens = self.config, np.asarray(tokens, float)[..., None] - unread * self.late
        merged = (self.merges > 0) & (values * self.product < self.pair * tokens)
        linear = 2 * self.kernel * tokens + 2 * np.where(merged, values * self.product, self.pair * tokens)
        if backward:
            no_gradient = self.first * (self.kernel + ~merged * self.down)
            linear += (2 * self.kernel * (1 + self.trained) + 4 * self.pair - 2 * no_gradient) * tokens
        times = 3 if backward else 1
        head = 2 * config.hidden_size * self.head_tokens * (times - (backward and not self.trains_head))
        other = 4 * config.heads * config.head_dim * seen + 2 * config.hidden_size * scalars
        return linear @ self.counts + times * other + head * logits

    def seen(self, lengths: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """Returns the number of (query, key) pairs of causal attention in rows of these lengths, summed over layers.

        In the last layer, only the queries from read[0] up to read[1] of each row count. If `read` is None, all count.
        """
        first, end = (0 * lengths, lengths) if read is None else read
        last = _causal_pairs(end, self.last_window) - _causal_pairs(first, self.last_window)
        return float(sum(_causal_pairs(lengths, window).sum() for window in self.windows) + last.sum())

    def seen_by_next(self, filled: np.ndarray) -> np.ndarray:
        """Returns the number of keys that the newest token of each row sees, summed over rows (last axis) and layers.

        `filled` is the number of tokens of each row, including the newest token.
        """
        windows = (*self.windows, self.last_window)
        return sum((filled if window is None else np.minimum(filled, window)).sum(-1) for window in windows)

    def weight_bytes(self, logits: bool, tokens: Any, merged: bool = False) -> Any:
        """Returns the bytes of base and adapter that a pass reads.

        `merged` means that all LoRA pairs that may be merged are already part of their kernels. A pass reads only the
        rows of an embedding that its tokens need. If the embedding is tied and the pass computes logits, it reads all
        rows.
        """
        total = self.blocks + self.adapter_bytes - (self.merged_bytes if merged else 0.0)
        heads = ("lm_head", "embed_tokens") if self.config.tie_embeddings else ("lm_head",)
        for name, leaf in self.tables.items():
            if logits and name.startswith(heads):
                total = total + _bytes(leaf)
            elif name.startswith("embed_"):
                total = total + np.minimum(tokens * leaf.shape[1], leaf.size) * leaf.dtype.itemsize
        return total

    def cache_bytes(self, keys: Any) -> Any:
        """Returns the bytes of cached keys and values. `keys` is the number of keys, summed over rows and layers."""
        return 2 * self.config.kv_heads * self.config.head_dim * self.dtype.itemsize * keys

    def reduced(self, tokens: float) -> float:
        """Returns the bytes that a forward pass sums over `tensor`: [tokens, D] after each row-split layer."""
        times = 1 if self.config.parallel_residual else 2
        return times * self.config.layers * tokens * self.config.hidden_size * self.dtype.itemsize

    def exchanged(self, tokens: float) -> float:
        """Returns the bytes of queries, keys, values and outputs of attention in a forward pass."""
        heads = 2 * (self.config.heads + self.config.kv_heads)
        return heads * self.config.head_dim * self.config.layers * tokens * self.dtype.itemsize


def _causal_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Returns the number of (query, key) pairs in each row.

    Query i, counted from 1, sees the last i keys, but at most `window` keys.
    """
    lengths = np.asarray(lengths, np.float64)
    short = lengths if window is None else np.minimum(lengths, window)
    return short * (short + 1) / 2 + (lengths - short) * (window or 0)


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")))


# ---------------------------------------------------------------- programs; `lengths` i[B] are the real tokens per row


def rollout(
    base: Decoder,
    policy: Any,
    prompts: np.ndarray,
    completions: np.ndarray,
    slots: int | None = None,
    merge_rounded: bool = False,
) -> Work:
    """Returns the work of sampling, with one phase per step. `prompts` i[B] and `completions` i[B n] are lengths.

    The first phase reads each prompt once and samples the first tokens. Every other phase is a decode step: it reads
    the newest token of the active rows and samples the next token. If `slots` is not None, at most this number of rows
    is active in a step. `merge_rounded` is as in `adapters.for_decoding`.
    """
    role, group, prompt_tokens = Role(base, policy, merge_rounded), len(completions) // len(prompts), prompts.sum()
    seen = role.seen(prompts, (prompts - 1, prompts))
    prefill = role.flops(prompt_tokens, seen, len(prompts), unread=prompt_tokens - len(prompts))
    starts = _starts(completions, slots)
    step = np.arange(1, max(int((starts + completions).max()), 1))[:, None] - starts
    active = (step > 0) & (completions > step)
    rows = active.sum(-1).astype(float)
    keys = role.seen_by_next(np.where(active, np.repeat(prompts, group) + step, 0))
    return Work(
        np.append(prefill, role.flops(rows, keys, rows, values=0)),
        np.append(role.weight_bytes(True, prompt_tokens), 0 * rows + role.weight_bytes(True, rows, merged=True)),
        np.append(0.0, role.cache_bytes(keys)),
        float(completions.sum()),
        role.reduced(float(prompt_tokens + rows.sum())),
    )


def _starts(completions: np.ndarray, slots: int | None) -> np.ndarray:
    """Returns the number of decode steps before each row enters, i[rows]. Rows enter in order, into free slots."""
    if slots is None or slots >= len(completions):
        return np.zeros(len(completions), int)
    free, starts = [0] * slots, []
    for length in completions:
        starts.append(heapq.heappop(free))
        heapq.heappush(free, starts[-1] + int(length) - 1)
    return np.array(starts)


def reward(base: Decoder, adapter: Any, lengths: np.ndarray, tokens: float) -> Work:
    """Returns the work of a reward model that computes one scalar for each row."""
    role, total = Role(base, adapter), float(lengths.sum())
    flops = role.flops(total, role.seen(lengths), scalars=len(lengths))
    return _one_phase(flops, role.weight_bytes(False, total), tokens, role.reduced(total), 0.0, role.exchanged(total))


def annotate(
    base: Decoder, roles: tuple[Any, Any, Any], lengths: np.ndarray, completions: np.ndarray, config: PPOConfig
) -> Work:
    """Returns the work of the logprobs and values of all completions.

    The reference computes logprobs. The policy also computes logprobs, unless the update computes them. `roles` are the
    adapters of policy, value and reference. The base is read once for all three roles.
    """
    policy, value, reference = roles
    total, scored, first = float(lengths.sum()), float(completions.sum()), Role(base, reference)
    passes = [(first, scored, 0.0), *_passes(base, policy, value, scored, config, values_only=single_step(config))]
    seen = first.seen(lengths, (lengths - completions - 1, lengths - 1))
    flops = sum(role.flops(total, seen, *heads, total - scored) for role, *heads in passes)
    weights = first.weight_bytes(True, total) + sum(role.adapter_bytes for role, *_ in passes[1:])
    sent = len(passes) * first.reduced(total), 0.0, len(passes) * first.exchanged(total)
    return _one_phase(flops, weights, scored, *sent)


def update(
    base: Decoder,
    policy: Any,
    value: Any,
    lengths: np.ndarray,
    completions: np.ndarray,
    config: PPOConfig,
    mix=None,
    choices: Choices | None = None,
) -> Work:
    """Returns the work of PPO's update. Each epoch has forward and backward passes and a step for each minibatch.

    `mix` is the batch of demonstrations that is added to the update, or None. `choices` are those of the completions.
    """
    total, scored = float(lengths.sum()), float(completions.sum())
    passes = _passes(_with_choices(base, choices), policy, value, scored, config)
    first, epochs, minibatches = passes[0][0], config.epochs, config.minibatches
    seen = first.seen(lengths, (lengths - completions - 1, lengths - 1))
    each = [role.flops(total, seen, *heads, total - scored, minibatches, backward=True) for role, *heads in passes]
    flops, times = epochs * sum(each), epochs * len(passes) * 2
    reduced, exchanged = times * first.reduced(total), times * first.exchanged(total)
    if mix is not None:
        role, (rows, length) = Role(base, policy), mix.tokens.shape
        flops += role.flops(rows * length, role.seen(np.full(rows, length)), rows * (length - 1), backward=True)
        reduced, exchanged = reduced + 2 * role.reduced(rows * length), exchanged + 2 * role.exchanged(rows * length)
    steps, adapters = epochs * minibatches, sum(role.adapter_bytes for role, *_ in passes)
    base_bytes = first.weight_bytes(True, total / minibatches) - first.adapter_bytes
    sent = reduced, steps * adapters, exchanged
    return _one_phase(flops, steps * (2 * base_bytes + 8 * adapters), scored * epochs, *sent)


def train_step(base: Decoder, adapter: Any, lengths: np.ndarray, logits: float, scalars: float) -> Work:
    """Returns the work of one optimizer step of the stages sft and reward_model."""
    role, total = Role(base, adapter), float(lengths.sum())
    flops = role.flops(total, role.seen(lengths), logits, scalars, backward=True)
    weights = 2 * role.weight_bytes(logits > 0, total) + 6 * role.adapter_bytes
    sent = 2 * role.reduced(total), role.adapter_bytes, 2 * role.exchanged(total)
    return _one_phase(flops, weights, total, *sent)


def _passes(
    base: Decoder, policy: Any, value: Any, scored: float, config: PPOConfig, values_only: bool = False
) -> list[tuple[Role, float, float]]:
    """Returns (role, logits, scalars) of each pass of policy and value. If they share the trunk, there is one pass."""
    logits = 0.0 if values_only else scored
    if value and config.value_trunk == "policy":
        return [(Role(base, {**policy, **value}), logits, scored)]
    passes = [] if values_only else [(Role(base, policy), scored, 0.0)]
    return [*passes, (Role(base, value), 0.0, scored)] if value else passes


def work_of(name: str, args: tuple, kwargs: dict[str, Any], result: Any, config: RunConfig) -> Work:
    """Returns the least work of one call of the program `name`, which is one of the programs in `stages.programs`.

    If `args` and `result` hold arrays, the masks give the lengths of rows. If they hold shapes, rows have full length.
    """
    settings, choices = None if config.ppo is None else config.ppo.update, kwargs.get("choices")
    match name.split()[0], args:
        case "rollout" | "greedy", (base, policy, prompts, _, sampling):
            lengths = _lengths(prompts.mask), _lengths(result.response_mask)
            return rollout(_with_choices(base, choices), policy, *lengths, sampling.slots, sampling.merge_adapter)
        case "reward", (base, adapter, rows):
            return reward(base, adapter, _lengths(rows.mask), float(_lengths(rows.response_mask).sum()))
        case "reward", (base, head, _, mask):  # a reward model with another base
            return reward(base, head, _lengths(mask), float(_lengths(mask).sum()))
        case "annotate", (base, *roles, rows, _):
            lengths = _lengths(rows.mask), _lengths(rows.response_mask)
            return annotate(_with_choices(base, choices), roles, *lengths, settings)
        case "experience", (rows, *more, _):  # has no matrix products, but reads its arguments and writes its results
            size = _bytes((rows, more)) + _bytes(result)
            return _one_phase(0.0, size, float(_lengths(rows.response_mask).sum()))
        case "update", (state, base, rows, *_):
            lengths, completions = _lengths(rows.mask), _lengths(rows.response_mask)
            more = kwargs.get("mix"), choices
            work = update(base, state.policy, state.value, lengths, completions, settings, *more)
            if result is None:
                return work
            share = computed_steps(result[1], settings) / (settings.epochs * settings.minibatches)
            return Work(*(share * value for value in dataclasses.astuple(work)))
        case "sft_update", (state, base, batch, *_):
            rows, length = batch.tokens.shape
            return train_step(base, state.adapter, np.full(rows, length), rows * (length - 1.0), 0.0)
        case "reward_model_update", (state, base, batch, *_):
            lengths = np.concatenate([_lengths(batch.chosen_mask), _lengths(batch.rejected_mask)])
            return train_step(base, state.adapter, lengths, 0.0, float(len(lengths)))
    raise ValueError(f"no formula for the program {name!r}")


def _with_choices(base: Decoder, choices: Choices | None) -> Decoder:
    """Returns the base. With choices, returns its shapes, with a head for only the tokens of choices."""
    return base if choices is None else jax.eval_shape(lambda base, choices: choices.head_of(base), base, choices)


def _lengths(mask: Any) -> np.ndarray:
    """Returns the number of real tokens of each row, i[rows]."""
    return np.full(*mask.shape) if isinstance(mask, jax.ShapeDtypeStruct) else np.asarray(mask).sum(1)
