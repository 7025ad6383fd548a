"""Answers that must be one of a list of strings: a trie over their tokens, which masks the logits.

The policy is the model with its logits masked to the tokens that may follow, at every position of an answer. Sampling,
scoring and the update use the same masks, so they compute the same distribution. The head computes only the tokens that
occur in a choice, because all others have probability 0.

Sizes: B rows, R response tokens, U tokens that occur in a choice, and N nodes. A node is a beginning of a choice, and
node 0 is the empty one.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jaxrlhf.models.decoder import Decoder, shallow_copy
from jaxrlhf.models.linear import Linear


@struct.dataclass
class Choices:
    """The trie. The children of a node have consecutive numbers, in the order of their tokens.

    An index is the place of a token in `tokens`.
    """

    tokens: jax.Array  # i32[U]; ascending, but the stop token is the last one
    allowed: jax.Array  # bool[N,U]; whether the token may follow the node
    first: jax.Array  # i32[N]; the node after the node's first allowed token; unused if only the stop token may follow

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> "Choices":
        """Returns the trie of different answers. Each of them ends with the same stop token."""
        stop = answers[0][-1]
        if any(stop in answer[:-1] or answer[-1] != stop for answer in answers) or len({*map(tuple, answers)}) < 2:
            raise ValueError(
                "there must be two or more different answers, and each must have the same stop token at its end and "
                "nowhere else"
            )
        tokens = [*sorted({*np.concatenate(answers).tolist()} - {stop}), stop]
        place = {token: i for i, token in enumerate(tokens)}
        indices = [tuple(place[token] for token in answer) for answer in answers]
        # The children of a node are consecutive, because nodes are ordered by length, and then by their tokens.
        nodes = sorted({path[:n] for path in indices for n in range(len(path))}, key=lambda path: (len(path), path))
        number = {path: i for i, path in enumerate(nodes)}
        allowed, first = np.zeros((len(nodes), len(tokens)), bool), np.zeros(len(nodes), np.int32)
        for path in indices:
            for n, index in enumerate(path):
                allowed[number[path[:n]], index] = True
        for path in reversed(nodes[1:]):
            first[number[path[:-1]]] = number[path]
        return cls(jnp.array(tokens, jnp.int32), jnp.array(allowed), jnp.array(first))

    def index_of(self, tokens: jax.Array) -> jax.Array:
        """Returns the indices of tokens i32[...]; 0 for tokens that occur in no choice."""
        return jnp.argmax(tokens[..., None] == self.tokens, axis=-1).astype(jnp.int32)

    def after(self, node: jax.Array, index: jax.Array) -> jax.Array:
        """Returns the node i32[B] that follows `node` i32[B] with the token `index`; 0 if the answer ends there."""
        allowed, places = self.allowed[node], jnp.arange(len(self.tokens))
        before = jnp.sum(allowed & (places < index[:, None]), axis=-1, dtype=jnp.int32)
        goes_on = jnp.take_along_axis(allowed, index[:, None], axis=-1)[:, 0] & (index < len(self.tokens) - 1)
        return jnp.where(goes_on, self.first[node] + before, 0)

    def nodes(self, index: jax.Array) -> jax.Array:
        """Returns the node before each token of answers, i32[B,R]. A node depends only on the tokens before it."""

        def step(node: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.after(node, index), node

        return jax.lax.scan(step, jnp.zeros(index.shape[0], jnp.int32), index.T)[1].T

    def forced(self, nodes: jax.Array) -> jax.Array:
        """Returns bool[...]: whether only one token may follow at `nodes` i32[...]."""
        return jnp.sum(self.allowed, axis=-1)[nodes] == 1

    def masked(self, logits: jax.Array, nodes: jax.Array) -> jax.Array:
        """Returns logits f32[...,U] at `nodes` i32[...], with -inf for the tokens that may not follow."""
        return jnp.where(self.allowed[nodes], logits, -jnp.inf)

    def head_of(self, model: Decoder) -> Decoder:
        """Returns a copy of the model whose head computes only the logits of `tokens`, [...,U]."""
        model, own = shallow_copy(model), model.lm_head
        model.lm_head = Linear(model.head_kernel()[:, self.tokens])
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
        if own is not None and own.lora_a is not None:
            model.lm_head.lora_a, model.lm_head.lora_scale = own.lora_a, own.lora_scale
            model.lm_head.lora_b = nnx.Param(own.lora_b[...][:, self.tokens])
        return model
