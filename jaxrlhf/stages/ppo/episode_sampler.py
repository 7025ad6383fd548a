"""Episodes in the ppo stage. They take the place of completions, and the environment gives their rewards."""

from collections.abc import Callable

import jax
import numpy as np

from jaxrlhf.config import Sampling
from jaxrlhf.data.episode_rows import EpisodeRows
from jaxrlhf.environments.text_environments import TextEnvironments
from jaxrlhf.records import Adapter
from jaxrlhf.stages.episodes import Episodes, Player, episode_seeds
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.remarks import ONE_ACTION
from jaxrlhf.stages.ppo.sampler import Clock, Sampled, Sampler, ScoredRollout, T
from jaxrlhf.stages.roles import Roles


class EpisodeSampler(Sampler):
    """Samples episodes."""

    def __init__(self, run: Run, roles: Roles, environments: TextEnvironments | None) -> None:
        """`environments` is None on all processes but the first."""
        super().__init__(run, roles, None, None)
        self.player = Player(self.config, self.mesh, self.rollout, self.base, roles.tokenizer, environments)
        # One reward per episode for estimators that treat it as one action, and where there is one turn.
        self.by_turn = self.config.environment.max_turns > 1 and self.config.advantage.estimator not in ONE_ACTION

    def sample(
        self,
        policy: Adapter,
        prompts: EpisodeRows,
        indices: np.ndarray,
        key: jax.Array,
        sampling: Sampling | None = None,
        clock: Clock | None = None,
    ) -> Episodes:
        """Plays an episode for each completion of the rows at `indices`. Episodes of one row are adjacent.

        The seeds of the environments follow from the key. Episodes of one row have the same seed. Raises Fault if all
        episodes fail.
        """
        group, clock = self.sampling.samples_per_prompt, clock or Clock()
        rows = [prompts.columns[i] for i in np.repeat(indices, group)]
        seeds = np.repeat(episode_seeds(key, len(indices)), group).tolist()
        return self.player.play(policy, rows, seeds, key, lambda name: clock.lap(name, ()))

    def draw(
        self, policy: Adapter, prompts: EpisodeRows, draws: int, dispatch: Callable[[Sampled], T], clock: Clock
    ) -> tuple[ScoredRollout, T]:
        """Samples the episodes of an iteration. Returns them, and the result of `dispatch`, see `Sampler.draw`."""
        self.scored.clear()
        indices = prompts.rows(self.run.config.seed, draws, self.config.batch_size)
        key = key_for(self.run.config.seed, "ppo", draws, "rollout")
        episodes = self.sample(policy, prompts, indices, key, clock=clock)
        dispatched = dispatch(Sampled(episodes, indices))
        rows, rewards = self.reward_metrics(episodes)
        return ScoredRollout(episodes, indices, rows, rewards), dispatched

    def prefetch(self, prompts: EpisodeRows, draw: int) -> None:
        """Nothing to prepare: the environments give the prompts when a draw begins."""

    def reward_metrics(self, completions: Episodes) -> tuple[dict[str, np.ndarray], np.ma.MaskedArray | None]:
        """Returns (metric name -> f32[B], rewards of turns f32[B,R], or None if an episode counts as one action)."""
        return dict(completions.metrics), completions.turn_rewards if self.by_turn else None
