"""The completions of a role in the evaluate command: sampled, episodes, or the most probable choices; with metrics.

Shapes: N prompts, B rows per batch, C choices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.environments.text_environments import TextEnvironments
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.choice_logprobs import Paths, choice_logprobs
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.scoring import response_logprobs
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rewards.completions import Completions, summed
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.stages.choices import on_mesh, trie
from jaxrlhf.stages.episodes import Episodes, Player, episode_seeds
from jaxrlhf.stages.evaluation_inputs import Inputs
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.programs import rollout_program


@dataclasses.dataclass
class Answers:
    """The N completions of a role, and the metrics of each completion."""

    texts: list[str]
    rows: dict[str, np.ndarray]  # metric name -> [N]; values are masked if a reward abstained
    logprobs: np.ndarray | None = None  # f64[N,C]; with choices, the logprob of each


def _logprob_sums(base: Decoder, adapter: Adapter | None, rollout: Rollout) -> jax.Array:
    """Returns the logprob of each completion under a model, f32[B]: the sum over its tokens."""
    inputs = (rollout.tokens, rollout.mask, rollout.response_mask, rollout.temperature)
    return jnp.sum(response_logprobs(bind(base, adapter), *inputs)[0], axis=1)


def _choice_logprobs(base: Decoder, adapter: Adapter | None, *inputs: Any) -> jax.Array:
    return choice_logprobs(bind(base, adapter), *inputs)


class Sampler:
    """Samples, scores and measures the completions of a model."""

    def __init__(self, inputs: Inputs, mesh, base: Decoder, tokenizer, seed: int):
        self.inputs, self.mesh, self.tokenizer, self.seed = inputs, mesh, tokenizer, seed
        self.rollout = rollout_program(mesh, base)
        self.logprobs = Program(_logprob_sums, "logprob_sums", mesh, compiler_options(base))

    def answers(self, base: Decoder, adapter: Adapter | None) -> Answers:
        """Returns one completion of every prompt, with its metrics."""
        texts: list[str] = []
        logprobs: list[np.ndarray] = []
        rows: dict[str, list[np.ndarray]] = {}
        prompts = self.inputs.prompts
        for start, numbers, real in batches(prompts, self.inputs.batch_size):
            completions, kl, of_choices = self._completed(base, adapter, prompts, numbers, start)
            mask, ended = fetch((completions.rollout.response_mask, completions.rollout.ended))
            found = self._scores(completions) | {"length/mean": mask.sum(axis=1), "length/eos_share": ended} | kl
            for name, values in found.items():
                rows.setdefault(name, []).append(values[:real])
            logprobs += [] if of_choices is None else [of_choices[:real]]
            texts += [text.strip() for text in completions.texts[:real]]
        rows = {name: np.ma.concatenate(parts) for name, parts in rows.items()}
        return Answers(texts, rows, np.concatenate(logprobs) if logprobs else None)

    def _completed(
        self, base: Decoder, adapter: Adapter | None, prompts: PromptSet, numbers: np.ndarray, start: int
    ) -> tuple[Completions, dict[str, np.ndarray], np.ndarray | None]:
        """Returns the completions of the prompts with the indices `numbers`, with KL and logprobs.

        The result is (completions, KL [B] by metric name, logprobs of the choices f64[B,C] or None).
        """
        rollout, kl, of_choices = self._complete(base, adapter, prompts, numbers, start)
        return _completions(prompts, numbers, rollout, self.tokenizer), kl, of_choices

    def _complete(
        self, base: Decoder, adapter: Adapter | None, prompts: PromptSet, numbers: np.ndarray, start: int
    ) -> tuple[Rollout, dict[str, np.ndarray], np.ndarray | None]:
        """Returns the same as `_completed`, with the rollout of the completions."""
        key = key_for(self.seed, "evaluate", start, "rollout")
        tokens = shard_batch(self.mesh, prompts.padded(numbers))
        rollout = self.rollout(base, adapter, tokens, key, self.inputs.sampling)
        return rollout, self._kl(base, adapter, rollout), None

    def _kl(self, base: Decoder, adapter: Adapter | None, rollout: Rollout) -> dict[str, np.ndarray]:
        """Returns the KL to the reference of each completion, as a metric; no metric without a reference."""
        if self.inputs.reference is None:
            return {}
        sums = [self.logprobs(*model, rollout) for model in ((base, adapter), self.inputs.reference)]
        return {"kl/k1": np.subtract(*fetch(sums)).astype(np.float64)}

    def _scores(self, completions: Completions) -> dict[str, np.ndarray]:
        """Returns the scores [B] of the reward, its parts and the gold function.

        A score is masked if its function abstained.
        """
        found: dict[str, Any] = {}
        if isinstance(self.inputs.reward, ComposedReward):
            found["reward/score"], parts = self.inputs.reward.scores_and_parts(completions)
            found |= {f"reward/{name}": values for name, values in parts.items()}
        elif self.inputs.reward is not None:
            found["reward/score"] = self.inputs.reward(completions)
        if self.inputs.gold is not None:
            found["reward/gold"] = self.inputs.gold(completions)
        found = {name: values if isinstance(values, np.ndarray) else fetch(values) for name, values in found.items()}
        return {name: summed(values) for name, values in found.items()}


class EpisodeSampler(Sampler):
    """Plays an episode for each prompt. Every role plays in the same environments, with the same seeds."""

    def __init__(self, inputs: Inputs, mesh, base: Decoder, tokenizer, seed: int, environments: TextEnvironments):
        super().__init__(inputs, mesh, base, tokenizer, seed)
        self.player = Player(inputs.environment, mesh, self.rollout, base, tokenizer, environments)
        self.seeds = episode_seeds(key_for(seed, "evaluate", 0, "episodes"), len(inputs.prompts))

    def _completed(
        self, base: Decoder, adapter: Adapter | None, prompts: PromptSet, numbers: np.ndarray, start: int
    ) -> tuple[Episodes, dict[str, np.ndarray], None]:
        key = key_for(self.seed, "evaluate", start, "rollout")
        # The samples of a prompt are adjacent, and play with one seed.
        seeds = self.seeds[numbers - numbers % self.inputs.group].tolist()
        player = dataclasses.replace(self.player, base=base)
        episodes = player.play(adapter, [prompts.columns[i] for i in numbers], seeds, key)
        for i, text in zip(numbers, episodes.prompts):
            prompts.texts[i] = text or prompts.texts[i]  # known only now; the same for every role
        return episodes, self._kl(base, adapter, episodes.rollout), None

    def _scores(self, completions: Episodes) -> dict[str, np.ndarray]:
        return dict(completions.metrics)


class Chooser(Sampler):
    """Takes the most probable choice as the completion of a model, and computes the probability of every choice."""

    def __init__(self, inputs: Inputs, mesh, base: Decoder, tokenizer, seed: int):
        super().__init__(inputs, mesh, base, tokenizer, seed)
        self.choices: Choices = on_mesh(trie(inputs.choices, "choices"), mesh)
        self.paths: Paths = on_mesh(Paths.of(list(inputs.choices.values())), mesh)
        self.temperature = np.float32(inputs.sampling.temperature or 1.0)
        self.of_choices = Program(_choice_logprobs, "choice_logprobs", mesh, compiler_options(base))

    def logprobs_of(self, base: Decoder, adapter: Adapter | None, prompts: PromptSet) -> np.ndarray:
        """Returns the logprob of each choice after each prompt, f64[N,C]."""
        found = [
            self._logprobs_of((base, adapter), prompts, numbers)[:real]
            for _, numbers, real in batches(prompts, self.inputs.batch_size)
        ]
        return np.concatenate(found)

    def _logprobs_of(self, model: tuple[Decoder, Adapter | None], prompts: PromptSet, numbers: np.ndarray):
        padded = shard_batch(self.mesh, prompts.padded(numbers))
        return fetch(self.of_choices(*model, padded, self.choices, self.paths, self.temperature)).astype(np.float64)

    def _complete(
        self, base: Decoder, adapter: Adapter | None, prompts: PromptSet, numbers: np.ndarray, start: int
    ) -> tuple[Rollout, dict[str, np.ndarray], np.ndarray | None]:
        logprobs, found = self._logprobs_of((base, adapter), prompts, numbers), {}
        if self.inputs.reference is not None:  # the exact KL, not that of a sample
            others = self._logprobs_of(self.inputs.reference, prompts, numbers)
            found["kl/k1"] = np.sum(np.exp(logprobs) * (logprobs - others), axis=1)
        rollout = _as_rollout(prompts.padded(numbers), self.paths, logprobs.argmax(axis=1), self.temperature)
        return shard_batch(self.mesh, rollout), found, logprobs


def _as_rollout(prompts: Prompts, paths: Paths, chosen: np.ndarray, temperature: np.float32) -> Rollout:
    """Returns a rollout of the prompts and the chosen answers i[B]. Sampling logprobs are 0, as nothing was sampled."""
    answers, real = fetch((paths.tokens, paths.real))
    answers, real = answers[chosen], real[chosen]
    return Rollout(
        tokens=np.concatenate([prompts.tokens, answers], axis=1),
        mask=np.concatenate([prompts.mask, real], axis=1),
        response_mask=real,
        sample_logprobs=np.zeros(real.shape, np.float32),
        ended=np.ones(len(real), bool),
        temperature=np.full(len(real), temperature, np.float32),
    )


def batches(prompts: PromptSet, size: int):
    """Yields (index of the first prompt, indices i[size], number of real prompts).

    The last batch is filled up with copies of the last prompt.
    """
    for start in range(0, len(prompts), size):
        numbers = np.minimum(np.arange(start, start + size), len(prompts) - 1)
        yield start, numbers, min(size, len(prompts) - start)


def _completions(prompts: PromptSet, numbers: np.ndarray, rollout: Rollout, tokenizer) -> Completions:
    texts, rows, chats = ([kind[i] for i in numbers] for kind in (prompts.texts, prompts.columns, prompts.chats))
    return Completions(rollout, texts, rows, tokenizer, chats)
