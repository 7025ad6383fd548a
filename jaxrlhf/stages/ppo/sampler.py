"""Sampling and scoring within the ppo stage: answers to prompts, what is measured of each, and dynamic sampling.

A draw is one rollout: `batch_size` prompts with `samples_per_prompt` answers each, B rows. Sampling is under way when a
function here returns its answers: what the devices are to do next can be given to them while the host reads text.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxrlhf.algorithms.shaping import informative_groups
from jaxrlhf.config import Sampling
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain
from jaxrlhf.rewards.composed import ABSTAINED, ComposedReward
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.programs import greedy_program, merge_program, rollout_program
from jaxrlhf.stages.roles import Roles

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Answers, and to which prompts."""

    completions: Completions
    chosen: np.ndarray  # i64[prompts]; numbers of the prompts


@dataclasses.dataclass(frozen=True)
class ScoredRollout(Sampled):
    """Answers with what is measured of each."""

    rows: dict[str, np.ndarray]  # f32[B] each, by metric name
    draws: int = 1  # rollouts that it took
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the draws

    @property
    def scores(self) -> np.ndarray:
        """f32[B]; of the reward that is maximised."""
        return self.rows["reward/score"]

    def means(self) -> dict[str, float]:
        """Batch means of the reward metrics, except reward/score, which `score_experience` logs."""
        return {name: float(np.mean(values)) for name, values in self.rows.items() if name != "reward/score"}


class Clock:
    """Wall-clock seconds by phase; a phase that comes again adds up."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, result) -> None:
        """Ends a phase when its result is there."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class Sampler:
    """Draws answers and has them scored."""

    def __init__(self, run: Run, roles: Roles, reward: Reward, gold: Reward | None):
        config = run.config.ppo
        self.run, self.roles, self.reward, self.gold, self.config = run, roles, reward, gold, config
        self.sampling = config.sampling
        self.greedy = self.sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        self.rollout = rollout_program(run.mesh, roles.base)
        group = self.sampling.samples_per_prompt
        self.greedy_rollout = greedy_program(run.mesh, roles.base, self.rollout, group)
        self.merge = merge_program(run.mesh)
        self._ahead: tuple[PromptSet, int, np.ndarray, Prompts] | None = None  # whose prompts, draw, numbers, tokens
        self._silent: set[str] = set()  # metrics of rewards that were said to have abstained throughout

    def answer(
        self,
        policy: Adapter,
        prompts: PromptSet,
        chosen: np.ndarray,
        key: jax.Array,
        sampling: Sampling | None = None,
        placed: Prompts | None = None,
    ) -> Completions:
        """Samples answers to each of the chosen prompts, given by their numbers; those to one stand side by side.

        `placed` are the prompts as the program wants them, where they are ready.
        """
        sampling = self.sampling if sampling is None else sampling
        program = self.greedy_rollout if sampling is self.greedy else self.rollout
        placed = self._placed(prompts, chosen) if placed is None else placed
        answered = program(self.roles.base, policy, placed, key, sampling)
        return self._completions(answered, prompts, chosen, sampling.samples_per_prompt)

    def draw(
        self, policy: Adapter, prompts: PromptSet, draws: int, begin: Callable[[Sampled], T], clock: Clock
    ) -> tuple[ScoredRollout, T]:
        """The answers of an iteration with their scores, after `draws` rollouts of the prompts; and what `begin` gave.

        `begin` gives the devices what needs answers and no scores. It is called before the host reads them; where
        groups may give way to others (`resample`), nothing is known of the answers before their scores, and it is
        called after. Samples, scores and, where settings say so, samples again.
        """
        sampled = self._sampled(policy, prompts, draws)
        if not self.config.resample:
            begun = begin(sampled)
            return self._scored(sampled, clock), begun
        scored = self._resampled(self._scored(sampled, clock), policy, prompts, draws, clock)
        return scored, begin(scored)

    def _sampled(self, policy: Adapter, prompts: PromptSet, draw: int) -> Sampled:
        """The answers of a draw, under way."""
        if self._ahead is None or self._ahead[0] is not prompts or self._ahead[1] != draw:
            self.look_ahead(prompts, draw)
        (_, _, chosen, placed), self._ahead = self._ahead, None
        key = key_for(self.run.config.seed, "ppo", draw, "rollout")
        return Sampled(self.answer(policy, prompts, chosen, key, placed=placed), chosen)

    def look_ahead(self, prompts: PromptSet, draw: int) -> None:
        """Makes the prompts of a draw ready, while the devices do something else."""
        chosen = prompts.rows(self.run.config.seed, draw, self.config.batch_size)
        self._ahead = prompts, draw, chosen, self._placed(prompts, chosen)

    def answer_greedily(self, policy: Adapter, prompts: PromptSet, chosen: np.ndarray) -> Completions:
        """One greedy answer to each of the chosen prompts."""
        return self.answer(policy, prompts, chosen, jax.random.key(0), self.greedy)

    def _placed(self, prompts: PromptSet, chosen: np.ndarray) -> Prompts:
        padded, _, _ = prompts.take(chosen)
        return shard_batch(self.run.mesh, padded)

    def measured(self, completions: Completions) -> dict[str, np.ndarray]:
        """f32[B] by metric name: the score that is maximised, its parts, and the gold score; 0 where one abstained.

        Beside each that may abstain stands where it did: its share is then a metric.
        """
        rows: dict[str, np.ndarray] = {}
        if self.gold is not None:
            rows |= self._noted("reward/gold", self.gold, self.gold(completions))
        if isinstance(self.reward, ComposedReward):
            scores, parts = self.reward.scores_and_parts(completions)
            for name, values in parts.items():
                rows |= self._noted(f"reward/{name}", self.reward.parts[name][0], values)
        else:
            scores = self.reward(completions)
        return rows | self._noted("reward/score", self.reward, scores, f"reward/{ABSTAINED[1:]}")

    def _noted(self, metric: str, reward: Reward, scores, named: str | None = None) -> dict[str, np.ndarray]:
        """Scores f32[B], and where there is something to tell, the rows f32[B] in which the reward abstained."""
        if not may_abstain(reward):
            return {metric: np.asarray(fetch(scores), np.float32)}
        named, abstained = named or f"{metric}{ABSTAINED}", abstained_rows(scores)
        if abstained.all() and named not in self._silent:
            self._silent.add(named)
            count = len(abstained)
            self.run.say(f"ppo: {reward.name} abstained on all {count} answers of a batch and counts 0 there ({named})")
        return {metric: np.asarray(scores, np.float32), named: abstained.astype(np.float32)}

    def scores(self, completions: Completions) -> tuple[Rollout, jax.Array]:
        """The answers with their scores f32[B], of the reward alone."""
        return completions.rollout, shard_batch(self.run.mesh, np.asarray(fetch(self.reward(completions)), np.float32))

    def _resampled(
        self, scored: ScoredRollout, policy: Adapter, prompts: PromptSet, draws: int, clock: Clock
    ) -> ScoredRollout:
        """Dynamic sampling: groups whose scores are all equal, which teach group baselines nothing, give way.

        They give way to groups of the next prompts, in at most `resample` further draws (2503.14476); what is left
        after that stays as it is.
        """
        group, count, scores = self.sampling.samples_per_prompt, 1, [scored.scores]
        teaches = np.array(informative_groups(scored.scores, group))
        metrics = {"groups/informative_drawn": float(np.mean(teaches))}
        keep = np.arange(len(teaches))
        # Also where nothing gives way: what follows gets its rows from one program, and is compiled once.
        scored = self._merged(scored, scored, keep, prompts)
        while not teaches.all() and count <= self.config.resample:
            more = self._scored(self._sampled(policy, prompts, draws + count), clock)
            count += 1
            scores.append(more.scores)
            found = np.flatnonzero(np.array(informative_groups(more.scores, group)))
            slots = np.flatnonzero(~teaches)[: len(found)]
            source = keep.copy()
            source[slots] = len(keep) + found[: len(slots)]
            teaches[slots] = True
            scored = self._merged(scored, more, source, prompts)
        metrics |= {
            "groups/informative": float(np.mean(teaches)),
            "groups/draws": float(count),
            "reward/drawn": float(np.mean(scores)),
        }
        return dataclasses.replace(scored, draws=count, metrics=metrics)

    def _scored(self, sampled: Sampled, clock: Clock) -> ScoredRollout:
        clock.lap("time/rollout", sampled.completions.rollout)
        rows = self.measured(sampled.completions)
        clock.lap("time/reward", ())
        return ScoredRollout(sampled.completions, sampled.chosen, rows)

    def _merged(
        self, first: ScoredRollout, second: ScoredRollout, source: np.ndarray, prompts: PromptSet
    ) -> ScoredRollout:
        """Groups by number: below the count of groups those of the first, from there on those of the second."""
        group = self.sampling.samples_per_prompt
        by_row = (source[:, None] * group + np.arange(group)).reshape(-1)
        chosen = np.concatenate([first.chosen, second.chosen])[source]
        rollout = self.merge(first.completions.rollout, second.completions.rollout, by_row.astype(np.int32))
        rows = {name: np.concatenate([values, second.rows[name]])[by_row] for name, values in first.rows.items()}
        return ScoredRollout(self._completions(rollout, prompts, chosen, group), chosen, rows)

    def _completions(self, answered: Rollout, prompts: PromptSet, chosen: np.ndarray, group: int) -> Completions:
        asked = np.repeat(chosen, group)
        texts, rows, chats = ([kind[i] for i in asked] for kind in (prompts.texts, prompts.columns, prompts.chats))
        return Completions(answered, texts, rows, self.roles.tokenizer, chats)
