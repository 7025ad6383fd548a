"""Sampling episodes in the ppo stage: the policy and an environment take turns (`ppo.environment`).

A turn is one call of the rollout program. Its prompts are all tokens so far, padded on the left to one of a few
lengths, for each of which the program compiles once. Rows whose episode is over have no prompt, so they do not decode.
A row's random numbers depend on the key of the turn and on the number of the row only.

Sizes: B episodes, P tokens of the first observation, R tokens of the rest of an episode, W tokens of a turn's prompts.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import Sampling
from jaxrlhf.data.episode_rows import EpisodeRows
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.environments.episodes import Result, TextEnvironments, Turn
from jaxrlhf.errors import Fault
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.remarks import ONE_ACTION
from jaxrlhf.stages.ppo.sampler import Clock, Sampled, Sampler, ScoredRollout, T
from jaxrlhf.stages.roles import Roles

POLICY, ENVIRONMENT = "policy", "environment"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes(Completions):
    """Completions that are episodes. Their texts are those of the policy; `conversations` have both sides."""

    metrics: Mapping[str, np.ndarray]  # f32[B] by name; masked where a metric does not apply
    turn_rewards: np.ma.MaskedArray  # f32[B,R]; at the last token of each turn
    conversations: Sequence[list[dict[str, Any]]]  # turns with role, text and, for the policy, reward

    def details(self, row: int) -> dict[str, Any]:
        """Returns what the record of an episode in samples.jsonl has in addition: the whole conversation."""
        return {"conversation": self.conversations[row]}


class _Episode:
    """One row while it is sampled."""

    def __init__(self, first: Result) -> None:
        self.prompt = first.ids
        self.ids: list[int] = []  # tokens after the prompt
        self.own: list[bool] = []  # whether they are the policy's
        self.logprobs: list[float] = []
        self.rewards: dict[int, float] = {}  # by the position of the last token of a turn
        self.conversation: list[dict[str, Any]] = [{"role": ENVIRONMENT, "text": first.text}]
        self.terminated, self.stopped, self.over = False, False, first.failed is not None
        self.success, self.failed = first.success, first.failed

    def turn(self, ids: Sequence[int], logprobs: Sequence[float], stopped: bool, room: int, last: bool) -> Turn:
        """Adds a turn of the policy, at most `room` tokens of it, and returns it."""
        context = [*self.prompt, *self.ids]
        self.stopped = stopped and len(ids) <= room
        ids = [int(token) for token in ids[:room]]
        self.ids += ids
        self.own += [True] * len(ids)
        self.logprobs += [float(x) for x in logprobs[: len(ids)]]
        return Turn(context, ids, self.stopped, last or len(ids) == room)

    def take(self, result: Result, action: str, room: int) -> None:
        """Adds what the environment returned. The episode is over if the next turn has no room for a token."""
        if result.failed is not None:
            self.failed, self.over = result.failed, True
            return
        self.rewards[len(self.ids) - 1] = result.reward
        self.conversation += [
            {"role": POLICY, "text": action, "reward": result.reward},
            {"role": ENVIRONMENT, "text": result.text},
        ]
        self.success = self.success if result.success is None else result.success
        self.terminated = result.terminated
        self.over = result.terminated or result.truncated or len(result.ids) >= room
        if not self.over:
            self.ids += result.ids
            self.own += [False] * len(result.ids)
            self.logprobs += [0.0] * len(result.ids)


class EpisodeSampler(Sampler):
    """Samples episodes. The environment gives their rewards."""

    def __init__(self, run: Run, roles: Roles, environments: TextEnvironments | None) -> None:
        """`environments` is None on all processes but the first."""
        super().__init__(run, roles, None, None)
        self.environments, self.R = environments, self.config.response_tokens
        self.turn_sampling = self.sampling
        if self.sampling.samples_per_prompt > 1:  # each row has a prompt of its own
            self.turn_sampling = self.sampling.model_copy(update={"samples_per_prompt": 1})
        self.lengths = context_lengths(self.config.max_prompt_tokens, self.R)
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
        episodes = [_Episode(result) for result in self._start(seeds, rows)]
        clock.lap("time/environment", ())
        for number in range(self.config.environment.max_turns):
            if all(episode.over for episode in episodes):
                break
            self._turn(episodes, policy, turn_key(key, number), number, clock)
        if all(episode.failed is not None for episode in episodes):
            raise Fault(
                f"ppo.environment: all {len(episodes)} episodes of a rollout failed; the last one: "
                f"{episodes[-1].failed}"
            )
        return self._episodes(episodes, rows)

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

    def _start(self, seeds: list[int], rows: list[dict[str, Any]]) -> list[Result]:
        def start() -> bytes:
            return json.dumps([dataclasses.asdict(result) for result in self.environments.start(seeds, rows)]).encode()

        return [Result(**result) for result in json.loads(processes.from_first(start, Fault))]

    def _step(self, turns: dict[int, Turn]) -> tuple[dict[int, Result], dict[int, str]]:
        """Returns the results and the texts of turns."""

        def step() -> bytes:
            results = self.environments.step(turns)
            texts = [self.roles.tokenizer.decode_after(turn.context, turn.ids) for turn in turns.values()]
            return json.dumps([[dataclasses.asdict(results[i]) for i in turns], texts]).encode()

        results, texts = json.loads(processes.from_first(step, Fault))
        return {i: Result(**result) for i, result in zip(turns, results)}, dict(zip(turns, texts))

    def _turn(
        self, episodes: list[_Episode], policy: Adapter, key: jax.Array, number: int, clock: Clock
    ) -> None:
        """Samples a turn of each episode that is not over, and steps the environments."""
        active = {i: episode for i, episode in enumerate(episodes) if not episode.over}
        contexts = self._contexts(episodes)
        prompts, policy = shard_batch(self.mesh, contexts), self.sent(policy)
        sampled = fetch(self.rollout(self.base, policy, prompts, key, self.turn_sampling, choices=None))
        clock.lap("time/rollout", ())
        first, last = contexts.tokens.shape[1], number + 1 == self.config.environment.max_turns
        turns = {}
        for i, episode in active.items():
            own, room = sampled.response_mask[i], self.R - len(episode.ids)
            ids, logprobs = sampled.tokens[i, first:][own], sampled.sample_logprobs[i][own]
            turns[i] = episode.turn(ids, logprobs, bool(sampled.ended[i]), room, last)
        results, texts = self._step(turns)
        for i, episode in active.items():
            episode.take(results[i], texts[i], self.R - len(episode.ids))
        clock.lap("time/environment", ())

    def _contexts(self, episodes: list[_Episode]) -> Prompts:
        """Returns the prompts [B,W] of the next turn: all tokens so far, and none where the episode is over."""
        contexts = [[] if episode.over else [*episode.prompt, *episode.ids] for episode in episodes]
        longest = max(map(len, contexts))
        width = next(length for length in self.lengths if length >= longest)
        tokens = np.full((len(episodes), width), self.roles.tokenizer.pad_id or 0, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, context in enumerate(contexts):
            tokens[row, width - len(context) :] = context
            mask[row, width - len(context) :] = True
        return Prompts(tokens, mask)

    def _episodes(self, episodes: list[_Episode], rows: list[dict[str, Any]]) -> Episodes:
        """Returns the episodes as completions on the mesh of the run."""
        B, P, R = len(episodes), self.config.max_prompt_tokens, self.R
        pad = self.base.config.pad_token or 0 if self.sampling.pad_token is None else self.sampling.pad_token
        tokens = np.full((B, P + R), pad, np.int32)
        tokens[:, :P] = self.roles.tokenizer.pad_id or 0
        mask, own = np.zeros((B, P + R), bool), np.zeros((B, R), bool)
        logprobs, rewards = np.zeros((B, R), np.float32), np.ma.masked_all((B, R), np.float32)
        rewards.data[:] = 0
        for i, episode in enumerate(episodes):
            # A row needs one real token, or its attention would have nothing to read.
            prompt, ids = episode.prompt or [pad], episode.ids
            tokens[i, P - len(prompt) : P], mask[i, P - len(prompt) : P] = prompt, True
            tokens[i, P : P + len(ids)], mask[i, P : P + len(ids)] = ids, True
            if episode.failed is None:  # else nothing of it is learnt
                own[i, : len(ids)], logprobs[i, : len(ids)] = episode.own, episode.logprobs
                for place, reward in episode.rewards.items():
                    rewards[i, place] = reward
        ended = np.array([e.terminated and e.stopped and e.failed is None for e in episodes])
        temperature = np.full(B, self.sampling.temperature, np.float32)
        rollout = shard_batch(self.run.mesh, Rollout(tokens, mask, own, logprobs, ended, temperature))
        return Episodes(
            rollout=rollout,
            prompts=[episode.conversation[0]["text"] for episode in episodes],
            rows=rows,
            tokenizer=self.roles.tokenizer,
            metrics=_metrics(episodes, rewards, own, mask[:, P:]),
            turn_rewards=rewards,
            conversations=[episode.conversation for episode in episodes],
        )


def context_lengths(prompt: int, rest: int) -> list[int]:
    """Returns the lengths W to which the prompts of turns are padded, from `prompt` on, each at most twice the last.

    The last one holds the tokens before the last token of an episode.
    """
    lengths = [prompt]
    while lengths[-1] < prompt + rest - 1:
        lengths.append(min(2 * lengths[-1], prompt + rest - 1))
    return lengths


def episode_seeds(key: jax.Array, count: int) -> np.ndarray:
    """Returns the seeds i64[count], from 0 to 2^31 - 1, of a draw's episodes."""
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return np.array([np.random.SeedSequence([*words, i]).generate_state(1)[0] >> 1 for i in range(count)], np.int64)


def turn_key(key: jax.Array, number: int) -> jax.Array:
    """Returns the key of a turn, counted from 0. That of the first is `key`, as if there were no environment."""
    return key if number == 0 else jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"turn")), number)


def _metrics(
    episodes: list[_Episode], rewards: np.ma.MaskedArray, own: np.ndarray, real: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the metrics of episodes, f32[B] by name. All but two leave out failed episodes (masked)."""
    failed = np.array([episode.failed is not None for episode in episodes])
    returns = rewards.filled(0).sum(axis=1, dtype=np.float32)

    def of(values: Any, missing: np.ndarray = failed) -> np.ma.MaskedArray:
        return np.ma.MaskedArray(np.asarray(values, np.float32), missing)

    found = {
        "environment/return": of(returns),
        "environment/turns": of([len(episode.rewards) for episode in episodes]),
        "environment/tokens": of((real & ~own).sum(axis=1)),
        "environment/truncated": of([not episode.terminated for episode in episodes]),
        "environment/failed": np.asarray(failed, np.float32),
        "reward/score": returns,
    }
    unknown = failed | np.array([episode.success is None for episode in episodes])
    if not unknown.all():
        found["environment/success"] = of([episode.success or 0.0 for episode in episodes], unknown)
    return found
