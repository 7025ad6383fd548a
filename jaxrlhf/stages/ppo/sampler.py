"""Sampling and scoring in the ppo stage: rollouts, reward metrics and dynamic sampling.

A draw is one rollout of B completions: `samples_per_prompt` completions for each of `batch_size` prompts. Methods that
return completions do not wait for the devices. The caller can thus dispatch more programs before the host reads the
text. Draws may run on a mesh of their own (`mesh.rollout`): the policy is sent to it, and the completions come back to
the mesh of the run.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.shaping import informative_groups
from jaxrlhf.config import Sampling
from jaxrlhf.data.streamed import PromptSource
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain, summed
from jaxrlhf.rewards.composed import ABSTAINED, ComposedReward
from jaxrlhf.stages.choices import on_mesh
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.programs import greedy_program, merge_program, rollout_program
from jaxrlhf.stages.roles import Roles

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Completions, and the indices of their prompts in the data."""

    completions: Completions
    indices: np.ndarray  # i64[prompts]
    draws = 1  # number of rollouts that were sampled


@dataclasses.dataclass(frozen=True)
class ScoredRollout(Sampled):
    """Completions, their scores, and other reward metrics."""

    rows: dict[str, np.ndarray]  # f32[B] by metric name
    step_rewards: np.ma.MaskedArray | None = None  # f32[B,R] if the reward scores inside completions, else None
    draws: int = 1  # number of rollouts that were sampled
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # metrics of dynamic sampling

    @property
    def scores(self) -> np.ndarray:
        """Returns the scores f32[B] of the reward that is maximised."""
        return self.rows["reward/score"]

    def given(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns (scores f32[B], None).

        If the reward scores inside completions, returns (rewards f32[B,R], bool[B,R]: True at the ends of steps).
        """
        if self.step_rewards is None:
            return self.scores, None
        return self.step_rewards.filled(0), ~np.ma.getmaskarray(self.step_rewards)

    def means(self) -> dict[str, float]:
        """Returns the batch means of the reward metrics, without reward/score: `score_experience` logs that mean."""
        known = {name: values for name, values in self.rows.items() if name != "reward/score" and np.ma.count(values)}
        return {name: float(np.mean(values)) for name, values in known.items()}


class Clock:
    """Measures the wall-clock seconds of phases. The times of a repeated phase add up."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, result) -> None:
        """Waits until `result` is computed, and ends the phase `name`."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class Sampler:
    """Samples completions and scores them."""

    def __init__(
        self,
        run: Run,
        roles: Roles,
        reward: Reward,
        gold: Reward | None,
        mesh: jax.sharding.Mesh | None = None,
        choices: Choices | None = None,
    ):
        """`mesh` is the mesh that samples. None means the mesh of the run, on which everything else runs."""
        config = run.config.ppo
        self.mesh = run.mesh if mesh is None else mesh
        self.base = roles.base if self.mesh is run.mesh else shard(self.mesh, roles.base)
        self.run, self.roles, self.reward, self.gold, self.config = run, roles, reward, gold, config
        self.sampling = config.sampling
        self.greedy = self.sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        self.choices = on_mesh(choices, self.mesh)
        self.rollout = rollout_program(self.mesh, self.base)
        self.greedy_rollout = greedy_program(self.mesh, self.base, self.rollout, self.sampling.samples_per_prompt)
        self.merge = merge_program(run.mesh)
        self._prefetched: tuple[PromptSource, int, np.ndarray, Prompts] | None = None  # prompts, draw, indices, tokens
        self._begun: tuple[PromptSource, int, np.ndarray, Rollout] | None = None  # prompts, draw, indices, completions
        self.scored: list[tuple[np.ndarray, np.ndarray]] = []  # (prompts, scores) of all draws of the iteration
        self._warned: set[str] = set()  # metrics of rewards for which a warning was printed

    def sample(
        self,
        policy: Adapter,
        prompts: PromptSource,
        indices: np.ndarray,
        key: jax.Array,
        sampling: Sampling | None = None,
    ) -> Completions:
        """Samples completions of the prompts at `indices`. Completions of one prompt are adjacent rows."""
        sampling = self.sampling if sampling is None else sampling
        program = self.greedy_rollout if sampling is self.greedy else self.rollout
        tokens = self._tokens(prompts, indices)
        rollout = program(self.base, self.sent(policy), tokens, key, sampling, choices=self.choices)
        return self._completions(self._received(rollout), prompts, indices, sampling.samples_per_prompt)

    def sample_greedily(self, policy: Adapter, prompts: PromptSource, indices: np.ndarray) -> Completions:
        """Decodes one greedy completion of each prompt at `indices`."""
        return self.sample(policy, prompts, indices, jax.random.key(0), self.greedy)

    def draw(
        self, policy: Adapter, prompts: PromptSource, draws: int, dispatch: Callable[[Sampled], T], clock: Clock
    ) -> tuple[ScoredRollout, T]:
        """Samples and scores the completions of an iteration. Returns them, and the result of `dispatch`.

        `draws` is the number of rollouts of these prompts so far. `dispatch` starts the device programs that need
        completions but no scores.
        `dispatch` is called before the host reads the text. With `resample` it is called after scoring, because the
        scores decide which completions are kept. Completions that `begin` has begun to sample are not sampled again.
        """
        self.scored.clear()
        sampled = self._sample_draw(policy, prompts, draws)
        if not self.config.resample:
            dispatched = dispatch(sampled)
            return self._score(sampled, clock), dispatched
        scored = self._resample(self._score(sampled, clock), policy, prompts, draws, clock)
        return scored, dispatch(scored)

    def begin(self, policy: Adapter, prompts: PromptSource, draw: int) -> None:
        """Begins to sample draw number `draw`. The next call of `draw` uses its completions."""
        if self._prefetched is None or self._prefetched[0] is not prompts or self._prefetched[1] != draw:
            self.prefetch(prompts, draw)
        (_, _, indices, tokens), self._prefetched = self._prefetched, None
        key = key_for(self.run.config.seed, "ppo", draw, "rollout")
        rollout = self.rollout(self.base, self.sent(policy), tokens, key, self.sampling, choices=self.choices)
        self._begun = prompts, draw, indices, rollout

    def prefetch(self, prompts: PromptSource, draw: int) -> None:
        """Prepares the prompts of draw number `draw`. Raises `StreamFault` if the next rows of a stream are bad."""
        indices = prompts.rows(self.run.config.seed, draw, self.config.batch_size)
        self._prefetched = prompts, draw, indices, self._tokens(prompts, indices)

    def reward_metrics(self, completions: Completions) -> tuple[dict[str, np.ndarray], np.ma.MaskedArray | None]:
        """Scores completions with the reward, its parts and the gold reward.

        Returns (metric name -> f32[B], rewards inside the completions f32[B,R] or None). If a reward abstains on a
        completion, the score is 0. A reward that may abstain has a second metric, which is 1 for these completions and
        0 for others.
        """
        rows: dict[str, np.ndarray] = {}
        if self.gold is not None:
            rows |= self._metrics_of("reward/gold", self.gold, self.gold(completions))
        if isinstance(self.reward, ComposedReward):
            scores, parts = self.reward.scores_and_parts(completions)
            for name, values in parts.items():
                rows |= self._metrics_of(f"reward/{name}", self.reward.parts[name][0], values)
        else:
            scores = self.reward(completions)
        inside = scores if isinstance(scores, np.ma.MaskedArray) and scores.ndim == 2 else None
        if inside is not None:
            given = ~np.ma.getmaskarray(inside)
            scores, counts = summed(inside), given.sum(axis=1, dtype=np.float32)
            rows["reward/step"] = np.asarray(scores) / np.maximum(counts, np.float32(1))
            rows["length/steps"] = counts
        return rows | self._metrics_of("reward/score", self.reward, scores, f"reward/{ABSTAINED[1:]}"), inside

    def with_scores(self, completions: Completions) -> tuple[Rollout, jax.Array]:
        """Returns (rollout, its scores f32[B]) without other metrics."""
        scores = self.reward(completions)
        scores = scores if isinstance(scores, np.ndarray) else fetch(scores)
        return completions.rollout, shard_batch(self.run.mesh, np.asarray(summed(scores), np.float32))

    def _metrics_of(self, metric: str, reward: Reward, scores, abstained: str | None = None) -> dict[str, np.ndarray]:
        """Returns the scores f32[B] under `name`, and under `abstained` whether the reward abstained."""
        if not may_abstain(reward):
            return {metric: np.asarray(fetch(scores), np.float32)}
        abstained, rows = abstained or f"{metric}{ABSTAINED}", abstained_rows(scores)
        if rows.all() and abstained not in self._warned:
            self._warned.add(abstained)
            self.run.say(
                f"ppo: {reward.name} abstained on all {len(rows)} completions of a batch, so their scores are 0 (see "
                f"the metric {abstained})"
            )
        return {metric: np.asarray(scores, np.float32), abstained: rows.astype(np.float32)}

    def _tokens(self, prompts: PromptSource, indices: np.ndarray) -> Prompts:
        return shard_batch(self.mesh, prompts.padded(indices))

    def _sample_draw(self, policy: Adapter, prompts: PromptSource, draw: int) -> Sampled:
        if self._begun is None or self._begun[0] is not prompts or self._begun[1] != draw:
            self.begin(policy, prompts, draw)
        (_, _, indices, rollout), self._begun = self._begun, None
        group = self.sampling.samples_per_prompt
        return Sampled(self._completions(self._received(rollout), prompts, indices, group), indices)

    def sent(self, policy: Adapter) -> Adapter:
        """Returns the policy on the mesh that samples."""
        return policy if self.mesh is self.run.mesh else shard(self.mesh, policy)

    def _received(self, rollout: Rollout) -> Rollout:
        """Returns completions on the mesh of the run."""
        return rollout if self.mesh is self.run.mesh else shard_batch(self.run.mesh, rollout)

    def _score(self, sampled: Sampled, clock: Clock) -> ScoredRollout:
        clock.lap("time/rollout", sampled.completions.rollout)
        rows, step_rewards = self.reward_metrics(sampled.completions)
        self.scored.append((sampled.indices, rows["reward/score"]))
        clock.lap("time/reward", ())
        return ScoredRollout(sampled.completions, sampled.indices, rows, step_rewards)

    def _informative(self, scored: ScoredRollout) -> np.ndarray:
        """Returns bool[prompts]: whether the rewards that the estimator compares differ in a group."""
        if ADVANTAGES[self.config.advantage.estimator].by_step is None:
            return np.array(informative_groups(scored.scores, self.sampling.samples_per_prompt))
        rewards, steps = scored.given()
        return np.array(informative_groups(rewards, self.sampling.samples_per_prompt, steps))

    def _resample(
        self, scored: ScoredRollout, policy: Adapter, prompts: PromptSource, draws: int, clock: Clock
    ) -> ScoredRollout:
        """Dynamic sampling (2503.14476): replaces groups with equal scores, because their advantages are 0.

        Replacements come from the next prompts, in at most `resample` further draws. Groups with equal scores that are
        left after these draws are kept.
        """
        count, scores = 1, [scored.scores]
        informative = self._informative(scored)
        metrics = {"groups/informative_drawn": float(np.mean(informative))}
        keep = np.arange(len(informative))
        # Merge even if nothing is replaced, so that later programs always get one sharding and compile once.
        scored = self._merged(scored, scored, keep, prompts)
        while not informative.all() and count <= self.config.resample:
            more = self._score(self._sample_draw(policy, prompts, draws + count), clock)
            count += 1
            scores.append(more.scores)
            replacements = np.flatnonzero(self._informative(more))
            slots = np.flatnonzero(~informative)[: len(replacements)]
            source = keep.copy()
            source[slots] = len(keep) + replacements[: len(slots)]
            informative[slots] = True
            scored = self._merged(scored, more, source, prompts)
        metrics |= {
            "groups/informative": float(np.mean(informative)),
            "groups/draws": float(count),
            "reward/drawn": float(np.mean(scores)),
        }
        return dataclasses.replace(scored, draws=count, metrics=metrics)

    def _merged(
        self, first: ScoredRollout, second: ScoredRollout, source: np.ndarray, prompts: PromptSource
    ) -> ScoredRollout:
        """Selects the groups `source` of two rollouts.

        The numbers of the groups of `second` follow those of `first`.
        """
        group = self.sampling.samples_per_prompt
        by_row = (source[:, None] * group + np.arange(group)).reshape(-1)
        indices = np.concatenate([first.indices, second.indices])[source]
        rollout = self.merge(first.completions.rollout, second.completions.rollout, by_row.astype(np.int32))
        rows = {name: np.concatenate([values, second.rows[name]])[by_row] for name, values in first.rows.items()}
        step_rewards = None
        if first.step_rewards is not None:
            step_rewards = np.ma.concatenate([first.step_rewards, second.step_rewards])[by_row]
        return ScoredRollout(self._completions(rollout, prompts, indices, group), indices, rows, step_rewards)

    def _completions(self, rollout: Rollout, prompts: PromptSource, indices: np.ndarray, group: int) -> Completions:
        repeated = np.repeat(indices, group)
        texts, rows, chats = ([kind[i] for i in repeated] for kind in (prompts.texts, prompts.columns, prompts.chats))
        return Completions(rollout, texts, rows, self.roles.tokenizer, chats)
