"""One PPO iteration, and the final evaluation, with the programs that the ppo stage compiles.

Per iteration four programs run (rollout, annotate, experience, update), and a fifth where the reward is an adapter or a
model of its own. The host does only what must be text, and beside the devices where it can: it decodes answers and
asks the reward while `annotate` has its passes over them, and writes samples and pads the next prompts while `update`
runs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.running import update_moments
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sft import SFTData
from jaxrlhf.distributed.jit import peak_memory_bytes
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter, Annotated, Experience, PPOState, Rollout, SFTBatch
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.stages.evaluation import SAMPLES, Evaluation, rows_measured, samples_of
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.sampler import Clock, Sampled, Sampler, ScoredRollout
from jaxrlhf.stages.programs import annotate_program, experience_program, update_program
from jaxrlhf.stages.roles import Roles
from jaxrlhf.steps.annotate import Control, ExperienceSettings
from jaxrlhf.steps.ppo import computed_steps
from jaxrlhf.tracking.health import PAUSED


@struct.dataclass
class StageState:
    """All that the iterations to come depend on: what a checkpoint holds."""

    ppo: PPOState
    control: Control
    draws: jax.Array  # i32[]; rollouts of training prompts so far: the place in the data
    reference: Adapter | None = None  # where it is refreshed


class Iteration:
    """One PPO iteration as a function of the state: what it uses and does not change stands here."""

    def __init__(
        self,
        run: Run,
        roles: Roles,
        sampler: Sampler,
        update_config: PPOConfig,
        state: PPOState,
        reference: Adapter | None,
        pretraining: SFTData | None,
    ):
        config = run.config.ppo
        self.run, self.roles, self.config, self.sampler = run, roles, config, sampler
        self.update_config, self.reference, self.pretraining = update_config, reference, pretraining
        self.group = config.sampling.samples_per_prompt
        self.rows = config.batch_size * self.group
        self.settings = ExperienceSettings(config.kl, config.advantage, config.score, update_config, self.group)
        self.annotate, self.experience = annotate_program(run.mesh, roles.base), experience_program(run.mesh)
        self.update = update_program(run.mesh, roles.base, state)
        greedy = ADVANTAGES[config.advantage.estimator].needs_greedy and sampler.greedy_rollout is not sampler.rollout
        more = ((sampler.greedy_rollout,) if greedy else ()) + ((sampler.merge,) if config.resample else ())
        self.programs = (sampler.rollout, *more, self.annotate, self.experience, self.update)
        self._mix_ahead: tuple[int, SFTBatch | None] = (-1, None)  # of which step
        self._said_truncated = False

    def __call__(
        self,
        state: StageState,
        step: int,
        prompts: PromptSet,
        meanwhile: Callable[[ScoredRollout], None] = lambda scored: None,
    ) -> tuple[StageState, dict[str, float], Experience]:
        """(state, metrics, experience) of the iteration after `step` iterations.

        `meanwhile` is called while the update runs, with what was drawn. Times are of the wall clock and add up to the
        iteration: time/rollout until the answers are there, time/reward from then until their scores are,
        time/annotate what was waited from then for logprobs, values and advantages, time/update the rest.
        """
        config, clock, ppo, draws = self.config, Clock(), state.ppo, int(state.draws)
        models = (ppo.policy, ppo.value, self.reference if state.reference is None else state.reference)
        scored, (annotated, greedy) = self.sampler.draw(
            ppo.policy, prompts, draws, lambda sampled: self._begun(models, prompts, sampled), clock
        )
        draws += scored.draws
        greedy = None if greedy is None else self.sampler.scores(greedy)
        clock.lap("time/reward", greedy)
        experience, control, noted = self._experience(scored, annotated, greedy, state.control)
        clock.lap("time/annotate", experience)
        paused, updated = self._paused(noted), {}
        if not paused.get(PAUSED):
            key = key_for(self.run.config.seed, "ppo", step, "update")
            ppo, updated = self.update(ppo, self.roles.base, experience, key, self.update_config, mix=self._mix(step))
        meanwhile(scored)
        if step + 1 < config.iterations:
            self.sampler.look_ahead(prompts, draws)
            self._mix_ahead = (step + 1, self._made_mix(step + 1))
        clock.lap("time/update", ppo)
        metrics = scored.metrics | scored.means() | _floats(noted) | paused | _floats(updated)
        self._say_truncated(metrics)
        tokens = metrics["length/mean"] * self.rows
        computed = computed_steps(metrics, self.update_config)
        passes = 0 if metrics.get(PAUSED) else computed / self.update_config.minibatches
        metrics |= clock.laps | {
            "tokens_per_second/rollout": tokens * scored.draws / clock.laps["time/rollout"],
            "tokens_per_second/update": tokens * passes / clock.laps["time/update"],
            "memory/peak_bytes": peak_memory_bytes(),
            **{f"compiles/{p.name}": p.compiles for p in self.programs},
        }
        state = StageState(ppo, control, self.count(draws), state.reference)
        if config.refresh_reference and (step + 1) % config.refresh_reference == 0:
            # A copy: the next update gives the policy away.
            state = state.replace(reference=jax.tree.map(jnp.copy, ppo.policy))
        return state, metrics, experience

    def _say_truncated(self, metrics: dict[str, float]) -> None:
        """A line, once, where `mask_truncated` leaves nothing of an iteration to learn from."""
        if metrics.get("length/masked_share") == 1 and not self._said_truncated:
            self._said_truncated = True
            limit = self.config.sampling.max_new_tokens
            self.run.say(
                f"ppo: no answer of an iteration ended within {limit} tokens, and ppo.update.mask_truncated leaves out "
                "those that do not: nothing was learnt; raise ppo.sampling.max_new_tokens, or leave mask_truncated out"
            )

    def count(self, number: int) -> jax.Array:
        """A number of the state, i32[], where the programs and the checkpoints want it."""
        return shard_batch(self.run.mesh, np.int32(number))

    def _begun(
        self, models: tuple[Adapter, Adapter, Adapter | None], prompts: PromptSet, sampled: Sampled
    ) -> tuple[Annotated, Completions | None]:
        """What needs no scores, given to the devices: the passes of (policy, value, reference) over the answers, and
        greedy answers where the advantages are measured from them.
        """
        needed = ADVANTAGES[self.config.advantage.estimator].needs_greedy
        greedy = self.sampler.answer_greedily(models[0], prompts, sampled.chosen) if needed else None
        return self.annotate(self.roles.base, *models, sampled.completions.rollout, self.update_config), greedy

    def _experience(
        self, scored: ScoredRollout, annotated: Annotated, greedy: tuple[Rollout, jax.Array] | None, control: Control
    ) -> tuple[Experience, Control, dict[str, jax.Array]]:
        """(experience, next control, metrics); see `steps.annotate.score_experience`."""
        scores = shard_batch(self.run.mesh, scored.scores)
        return self.experience(scored.completions.rollout, annotated, scores, greedy, control, self.settings)

    def fitted(self, policy: Adapter, prompts: PromptSet, control: Control) -> Control:
        """The control with the moments of scores before the first iteration, for `score.normalise` initial."""
        batches = -(-self.config.score.initial_completions // self.rows)
        moments = control.moments
        for i in range(batches):
            chosen = prompts.rows(self.run.config.seed, i, self.config.batch_size)
            key = key_for(self.run.config.seed, "ppo", i, "initial scores")
            scores = self.sampler.measured(self.sampler.answer(policy, prompts, chosen, key))["reward/score"]
            moments = update_moments(moments, jnp.asarray(scores))
        return shard(self.run.mesh, control.replace(moments=moments))

    def evaluate(self, policy: Adapter, value: Adapter, prompts: PromptSet) -> Evaluation:
        """Answers to `evaluation_prompts` prompts in turn, with the same programs at the same shapes."""
        size, wanted = self.config.batch_size, self.config.evaluation_prompts
        control = shard(self.run.mesh, Control.start(0.0))
        rows_of: dict[str, list[np.ndarray]] = {}
        samples = []
        for start in range(0, wanted, size):
            chosen = np.arange(start, start + size) % len(prompts)
            key = key_for(self.run.config.seed, "evaluation", start, "rollout")
            completions = self.sampler.answer(policy, prompts, chosen, key)
            annotated, greedy = self._begun((policy, value, self.reference), prompts, Sampled(completions, chosen))
            scored = ScoredRollout(completions, chosen, self.sampler.measured(completions))
            greedy = None if greedy is None else self.sampler.scores(greedy)
            experience = self._experience(scored, annotated, greedy, control)[0]
            for name, values in (scored.rows | rows_measured(*fetch((experience, completions.rollout)))).items():
                rows_of.setdefault(name, []).append(values[: (wanted - start) * self.group])
            samples += samples_of(completions, scored.scores)
        means = {name: float(np.mean(np.concatenate(values))) for name, values in rows_of.items()}
        return Evaluation(means, samples[:SAMPLES])

    def _paused(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Whether this iteration is not to be learnt from, where settings have limits."""
        health = self.run.config.health
        given = {"kl/k1": health.max_kl, "length/mean": health.max_length}
        limits = {name: limit for name, limit in given.items() if limit is not None}
        if not limits:
            return {}
        return {PAUSED: float(any(float(metrics[name]) > limit for name, limit in limits.items()))}

    def _mix(self, step: int) -> SFTBatch | None:
        """The iteration's rows of the language-model mix, made ready before where there was an iteration before."""
        (ready, mix), self._mix_ahead = self._mix_ahead, (-1, None)
        return mix if ready == step else self._made_mix(step)

    def _made_mix(self, step: int) -> SFTBatch | None:
        """Rows of the language-model mix for each optimizer step of an iteration, one step after another."""
        if self.pretraining is None:
            return None
        steps = self.update_config.epochs * self.update_config.minibatches
        batches = [self.pretraining.batch(step * steps + i) for i in range(steps)]
        return shard_batch(self.run.mesh, jax.tree.map(lambda *parts: np.concatenate(parts), *batches))


def _floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
