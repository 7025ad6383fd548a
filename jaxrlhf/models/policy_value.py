"""Computes logprobs of a policy and values of a value model. Both share one frozen base.

If both adapters hold only LoRA pairs, one pass computes both: `jax.vmap` over the two adapters. A product with a weight
of the base is then one product with twice the rows, and a norm or an attention is one operation. A program has half as
many operations, and compiles in about half the time.

A batch has B rows of S tokens, and R response tokens (see `models.scoring`).
"""

from typing import Literal

import jax

from jaxrlhf.models.adapters import HEAD, SCORE, bind, has_only_pairs, stack_pairs, without_head
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_scan import STACKED
from jaxrlhf.models.packing import PackedRows
from jaxrlhf.models.scoring import (
    hidden_before_tokens,
    logprobs_of_hidden,
    response_logprobs,
    response_logprobs_and_values,
    response_values,
    values_of_hidden,
)
from jaxrlhf.records import Adapter


def response_outputs(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    value_trunk: Literal["own", "policy"] = "own",
    remat: str = "none",
    packed: PackedRows | None = None,
    choices: Choices | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (logprobs of the policy, entropies, values), f32[B,R] each; 0 past the end of a completion.

    The values are None if `value` is None or empty. If `value_trunk` is "policy", `value` is a head on the policy's
    trunk. `choices` are as in `response_logprobs`. Scoring and update both call this function, so that they compute the
    same logprobs.
    """
    inputs = (tokens, mask, response_mask)
    if not value:
        return *response_logprobs(bind(base, policy), *inputs, temperature, remat, packed, choices), None
    if value_trunk == "policy":
        model = bind(base, {**(policy or {}), **value})
        return response_logprobs_and_values(model, *inputs, temperature, remat, packed, choices)
    if not can_stack(base, policy, value):
        logprobs = response_logprobs(bind(base, policy), *inputs, temperature, remat, packed, choices)
        return *logprobs, response_values(bind(base, value), *inputs, remat, packed)
    trunks, axes = stack(policy, value)
    encode = jax.vmap(lambda trunk: hidden_before_tokens(bind(base, trunk), *inputs, remat, packed), in_axes=(axes,))
    hidden = encode(trunks)
    heads = {path: leaves for path, leaves in policy.items() if path == HEAD}
    logprobs = logprobs_of_hidden(bind(base, heads), hidden[0], tokens, response_mask, temperature, packed, choices)
    return *logprobs, values_of_hidden(bind(base, {SCORE: value[SCORE]}), hidden[1], response_mask, packed)


def can_stack(base: Decoder, policy: Adapter | None, value: Adapter) -> bool:
    """Returns True if one pass computes both models.

    Each adapter must have LoRA pairs in the layers, and no other weights there. On a CPU the models are computed one
    after another, because two small products are as fast as a large one. The same holds with
    cuDNN, because its attention does not accept a mask that several models share.
    """
    target = base.config.target
    if target.platform == "cpu" or target.attention != "xla":
        return False
    return all(without_head(adapter or {}) and has_only_pairs(adapter) for adapter in (policy, value))


def stack(policy: Adapter, value: Adapter) -> tuple[Adapter, dict[str, int]]:
    """Returns (LoRA pairs of both adapters, axes). The heads are left out.

    The pairs are stacked along a new dimension. `axes` has the index of this dimension for each path. The index is 0,
    but 1 in stacked layers, because dimension 0 is that of the loop over layers.
    """
    axes = {path: int(path.startswith(STACKED)) for path in {**policy, **value} if path not in (SCORE, HEAD)}
    return {path: stack_pairs([policy.get(path), value.get(path)], axis) for path, axis in axes.items()}, axes
