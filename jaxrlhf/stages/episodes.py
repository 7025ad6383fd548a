"""Plays episodes: the policy and an environment take turns (`ppo.environment`).

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

from jaxrlhf.config import PPOStageConfig
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.environments.text_environments import Result, TextEnvironments, Turn
from jaxrlhf.errors import Fault
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rewards.completions import Completions

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
        self.prompt, self.prompt_text = first.ids, first.prompt
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

    def take(self, result: Result, room: int) -> None:
        """Adds what the environment returned. The episode is over if the next turn has no room for a token."""
        if result.failed is not None:
            self.failed, self.over = result.failed, True
            return
        self.rewards[len(self.ids) - 1] = result.reward
        self.conversation += [
            {"role": POLICY, "text": result.action, "reward": result.reward},
            {"role": ENVIRONMENT, "text": result.text},
        ]
        self.success = self.success if result.success is None else result.success
        self.terminated = result.terminated
        self.over = result.terminated or result.truncated or len(result.ids) >= room
        if not self.over:
            self.ids += result.ids
            self.own += [False] * len(result.ids)
            self.logprobs += [0.0] * len(result.ids)


def make_environments(
    config: PPOStageConfig, base: Decoder, tokenizer: Tokenizer, count: int, say: Callable[[str], None]
) -> TextEnvironments:
    """Returns `count` environments of a run. Raises `UserError` if they cannot be made."""
    stops = base.config.stop_tokens if config.sampling.stop_tokens is None else config.sampling.stop_tokens
    limits = config.max_prompt_tokens, config.overflow
    return TextEnvironments(config.environment, count, tokenizer, stops, *limits, say)


@dataclasses.dataclass(frozen=True)
class Player:
    """Plays episodes with a policy."""

    config: PPOStageConfig
    mesh: jax.sharding.Mesh
    rollout: Program  # of one completion per prompt
    base: Decoder
    tokenizer: Tokenizer
    environments: TextEnvironments | None  # on the first process; None on others

    def play(
        self,
        policy: Adapter | None,
        rows: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        key: jax.Array,
        lap: Callable[[str], None] = lambda name: None,
    ) -> Episodes:
        """Plays one episode for each row. `lap` receives the metric of the time since its last call.

        Raises Fault if all episodes fail.
        """
        episodes = [_Episode(result) for result in self._start(seeds, rows)]
        lap("time/environment")
        for number in range(self.config.environment.max_turns):
            if all(episode.over for episode in episodes):
                break
            self._turn(episodes, policy, turn_key(key, number), number, lap)
        if all(episode.failed is not None for episode in episodes):
            raise Fault(
                f"ppo.environment: all {len(episodes)} episodes of a rollout failed; the last one: "
                f"{episodes[-1].failed}"
            )
        return self._episodes(episodes, rows)

    def _start(self, seeds: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[Result]:
        def start() -> bytes:
            return json.dumps([dataclasses.asdict(result) for result in self.environments.start(seeds, rows)]).encode()

        return [Result(**result) for result in json.loads(processes.from_first(start, Fault))]

    def _step(self, turns: dict[int, Turn]) -> dict[int, Result]:
        def step() -> bytes:
            results = self.environments.step(turns)
            return json.dumps([dataclasses.asdict(results[i]) for i in turns]).encode()

        return {i: Result(**result) for i, result in zip(turns, json.loads(processes.from_first(step, Fault)))}

    def _turn(
        self,
        episodes: list[_Episode],
        policy: Adapter | None,
        key: jax.Array,
        number: int,
        lap: Callable[[str], None],
    ) -> None:
        """Samples a turn of each episode that is not over, and steps the environments."""
        active = {i: episode for i, episode in enumerate(episodes) if not episode.over}
        contexts = self._contexts(episodes)
        sampling = self.config.sampling
        if sampling.samples_per_prompt > 1:  # each row has a prompt of its own
            sampling = sampling.model_copy(update={"samples_per_prompt": 1})
        prompts = shard_batch(self.mesh, contexts)
        sampled = fetch(self.rollout(self.base, policy, prompts, key, sampling, choices=None))
        lap("time/rollout")
        first, last = contexts.tokens.shape[1], number + 1 == self.config.environment.max_turns
        turns = {}
        for i, episode in active.items():
            own, room = sampled.response_mask[i], self.config.response_tokens - len(episode.ids)
            ids, logprobs = sampled.tokens[i, first:][own], sampled.sample_logprobs[i][own]
            turns[i] = episode.turn(ids, logprobs, bool(sampled.ended[i]), room, last)
        results = self._step(turns)
        for i, episode in active.items():
            episode.take(results[i], self.config.response_tokens - len(episode.ids))
        lap("time/environment")

    def _contexts(self, episodes: list[_Episode]) -> Prompts:
        """Returns the prompts [B,W] of the next turn: all tokens so far, and none where the episode is over."""
        contexts = [[] if episode.over else [*episode.prompt, *episode.ids] for episode in episodes]
        longest = max(map(len, contexts))
        lengths = context_lengths(self.config.max_prompt_tokens, self.config.response_tokens)
        width = next(length for length in lengths if length >= longest)
        tokens = np.full((len(episodes), width), self.tokenizer.pad_id or 0, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, context in enumerate(contexts):
            tokens[row, width - len(context) :] = context
            mask[row, width - len(context) :] = True
        return Prompts(tokens, mask)

    def _episodes(self, episodes: list[_Episode], rows: Sequence[dict[str, Any]]) -> Episodes:
        """Returns the episodes as completions on the mesh."""
        config, sampling = self.config, self.config.sampling
        B, P, R = len(episodes), config.max_prompt_tokens, config.response_tokens
        pad = (self.base.config.pad_token or 0) if sampling.pad_token is None else sampling.pad_token
        tokens = np.full((B, P + R), pad, np.int32)
        tokens[:, :P] = self.tokenizer.pad_id or 0
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
        temperature = np.full(B, sampling.temperature or 1.0, np.float32)
        rollout = shard_batch(self.mesh, Rollout(tokens, mask, own, logprobs, ended, temperature))
        return Episodes(
            rollout=rollout,
            prompts=[episode.prompt_text for episode in episodes],
            rows=rows,
            tokenizer=self.tokenizer,
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
    """Returns the metrics of episodes, f32[B] by name. All but two leave out failed episodes (masked).

    All successes are masked if no environment told of one.
    """
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
    # Many environments say at the end only whether it was a success. An episode that was cut before is none.
    told = any(episode.success is not None for episode in episodes)
    unknown = failed if told else np.ones(len(episodes), bool)
    return found | {"environment/success": of([episode.success or 0.0 for episode in episodes], unknown)}
