"""Supervised fine-tuning: cross-entropy on the tokens of the loss mask.

Sizes: B sequences and L tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import cross_entropy
from jaxrlhf.config import OptimizerConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import from_logits
from jaxrlhf.records import Adapter, SFTBatch, TrainState
from jaxrlhf.steps.metrics import plain
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.optimizer import optimizer_step, with_rate


def sft_loss(base: Decoder, adapter: Adapter | None, batch: SFTBatch, remat: str = "none") -> jax.Array:
    """Returns the cross-entropy f32[] in nats, summed over the tokens to learn."""
    return jnp.sum(_token_losses(base, adapter, batch, remat))


def sft_row_losses(base: Decoder, adapter: Adapter | None, batch: SFTBatch) -> tuple[jax.Array, jax.Array]:
    """Returns, for each row, (cross-entropy f32[B] in nats summed over the tokens to learn, number of these i32[B])."""
    return jnp.sum(_token_losses(base, adapter, batch), axis=1), jnp.sum(learned_tokens(batch), axis=1)


def _token_losses(base: Decoder, adapter: Adapter | None, batch: SFTBatch, remat: str = "none") -> jax.Array:
    """Returns the cross-entropy f32[B,L-1] in nats of the tokens to learn, and 0 elsewhere."""
    model = bind(base, adapter)
    hidden = model.encode(batch.tokens, batch.segments, remat)
    # The last position has no target. It stays, so that a mesh axis that divides the length divides the logits too.
    targets = (jnp.pad(x, ((0, 0), (0, 1))) for x in (batch.tokens[:, 1:], learned_tokens(batch)))
    return from_logits(model, hidden, tuple(targets), lambda logits, target: cross_entropy(logits, *target))[:, :-1]


def learned_tokens(batch: SFTBatch) -> jax.Array:
    """Returns the mask of the learned tokens, bool[B,L-1], for the tokens 1 to L-1.

    A token is learned if it is in the loss mask and the token before it belongs to the same segment.
    """
    same_segment = batch.segments[:, 1:] == batch.segments[:, :-1]
    return batch.loss_mask[:, 1:] & same_segment & (batch.segments[:, 1:] > 0)


def sft_update(
    state: TrainState,
    base: Decoder,
    batch: SFTBatch,
    config: OptimizerConfig,
    microbatches: int = 1,
    remat: str = "none",
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one optimizer step on the mean loss per learned token, and returns (state, metrics)."""
    config = with_rate(config, "sft", state.adapter)
    tokens = jnp.maximum(jnp.sum(learned_tokens(batch)), 1)

    def loss(adapter: Adapter, part: SFTBatch) -> tuple[jax.Array, dict]:
        return sft_loss(base, adapter, part, remat) / tokens, {}

    value, _, grads = accumulate(loss, state.adapter, batch, microbatches)
    adapter, optimizer, of_step = optimizer_step(config, grads, state.optimizer, state.adapter, state.step, value)
    metrics = {"sft/loss": value, "sft/tokens": tokens} | {f"optimizer/{k}": v for k, v in plain(of_step).items()}
    return TrainState(adapter, optimizer, state.step + 1), metrics


def sft_evaluate(base: Decoder, adapter: Adapter | None, batch: SFTBatch) -> tuple[jax.Array, jax.Array]:
    """Returns (loss f32[], count i32[]) of a batch: the summed loss, and the number of learned tokens."""
    return sft_loss(base, adapter, batch), jnp.sum(learned_tokens(batch))
