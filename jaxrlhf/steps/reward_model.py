"""The update of the reward model on preference pairs (1706.03741, 2009.01325).

Sizes: B pairs and L tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import pairwise_loss
from jaxrlhf.config import OptimizerConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.records import Adapter, PreferenceBatch, TrainState
from jaxrlhf.steps.metrics import Metrics, plain, share
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.optimizer import optimizer_step, with_rate


def pair_scores(
    base: Decoder, adapter: Adapter, batch: PreferenceBatch, remat: str = "none"
) -> tuple[jax.Array, jax.Array]:
    """Returns (chosen scores, rejected scores), f32[B] each. A score belongs to the last real token of a sequence.

    One forward pass computes all scores.
    """
    tokens = jnp.concatenate([batch.chosen, batch.rejected])
    mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
    scores = sequence_scores(bind(base, adapter), tokens, mask, remat)
    chosen, rejected = jnp.split(scores, 2)
    return chosen, rejected


def reward_model_update(
    state: TrainState,
    base: Decoder,
    batch: PreferenceBatch,
    config: OptimizerConfig,
    center_rewards_coef: jax.Array | float,
    microbatches: int = 1,
    remat: str = "none",
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one optimizer step, and returns (state, metrics). The loss is the weighted mean of the pairwise loss."""
    config = with_rate(config, "reward_model", state.adapter)
    weight = jnp.maximum(jnp.sum(batch.weight), 1e-6)

    def loss(adapter: Adapter, part: PreferenceBatch) -> tuple[jax.Array, Metrics]:
        chosen, rejected = pair_scores(base, adapter, part, remat)
        fraction = jnp.sum(part.weight) / weight  # share of this part in the weights of the batch
        value, accuracy = pairwise_loss(chosen, rejected, part.margin, center_rewards_coef, part.weight)
        mean = jnp.sum(part.weight * (chosen + rejected)) / 2 / weight
        metrics = {"reward_model/accuracy": share(accuracy * fraction), "reward_model/score": share(mean)}
        return value * fraction, metrics

    value, metrics, grads = accumulate(loss, state.adapter, batch, microbatches)
    adapter, optimizer, of_step = optimizer_step(config, grads, state.optimizer, state.adapter, state.step, value)
    metrics |= {f"optimizer/{name}": metric for name, metric in of_step.items()}
    return TrainState(adapter, optimizer, state.step + 1), {"reward_model/loss": value} | plain(metrics)
