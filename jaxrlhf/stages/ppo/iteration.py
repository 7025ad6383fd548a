"""One PPO iteration and the final evaluation, with their compiled programs.

An iteration runs four programs (rollout, annotate, experience, update), and a fifth if the reward is an adapter or a
model of its own. Host work overlaps device work: the host decodes and scores completions while `annotate` runs, and
prepares samples and the next prompts while `update` runs. If an iteration's samples are logged, `annotate` runs once
more, for the logprobs after the update.

With `ppo.async` 1, iteration n gives the devices these programs in order: rollout n + 1 (with the policy before update
n), annotate n, experience n, update n. The host scores the completions of n meanwhile, and does not wait for the
update: iteration n + 1 begins while update n runs.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.running import update_moments
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sft import SFTData
from jaxrlhf.data.streamed import PromptSource
from jaxrlhf.data.streams import StreamFault
from jaxrlhf.distributed.jit import peak_memory_bytes
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter, Annotated, Experience, PPOState, Rollout, SFTBatch
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.stages.choices import on_mesh
from jaxrlhf.stages.evaluation import Evaluation, row_metrics
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.sampler import Clock, Sampled, Sampler, ScoredRollout
from jaxrlhf.stages.programs import annotate_program, copy_program, experience_program, update_program
from jaxrlhf.stages.roles import Roles
from jaxrlhf.stages.samples import SAMPLES, add_by_token, rounded, samples_of
from jaxrlhf.steps.annotate import Control, ExperienceSettings
from jaxrlhf.steps.ppo import computed_steps, single_step
from jaxrlhf.tracking.health import PAUSED


@struct.dataclass
class StageState:
    """The state that later iterations depend on. Checkpoints save this state."""

    ppo: PPOState
    control: Control
    draws: jax.Array  # i32[]; number of rollouts of training prompts so far: the position in the data
    reference: Adapter | None = None  # None if the reference never changes
    behind: Adapter | None = None  # policy that samples the next iteration; None if this is the policy itself


class Iteration:
    """One PPO iteration as a function of the state. Attributes hold the programs and constants of an iteration."""

    def __init__(
        self,
        run: Run,
        roles: Roles,
        sampler: Sampler,
        update_config: PPOConfig,
        state: PPOState,
        reference: Adapter | None,
        pretraining: SFTData | None,
        choices: Choices | None = None,
    ):
        config = run.config.ppo
        self.run, self.roles, self.config, self.sampler = run, roles, config, sampler
        self.update_config, self.reference, self.pretraining = update_config, reference, pretraining
        self.choices = on_mesh(choices, run.mesh)
        self.group = config.sampling.samples_per_prompt
        self.rows = config.batch_size * self.group
        self.settings = ExperienceSettings(config.kl, config.advantage, config.score, update_config, self.group)
        self.overlaps = config.async_ == 1
        self.annotate = annotate_program(run.mesh, roles.base, self.overlaps)
        self.experience = experience_program(run.mesh)
        self.update = update_program(run.mesh, roles.base, state)
        self.copy = copy_program(run.mesh, state.policy)  # for policies that outlive the next update, which donates
        # With one step per iteration, `annotate` may not compute logprobs, but return those of sampling.
        recomputes = self.overlaps or not single_step(update_config)
        self.sees_update = recomputes or update_config.value_trunk == "policy"
        self.needs_greedy = ADVANTAGES[config.advantage.estimator].needs_greedy
        greedy = self.needs_greedy and sampler.greedy_rollout is not sampler.rollout
        more = ((sampler.greedy_rollout,) if greedy else ()) + ((sampler.merge,) if config.resample else ())
        self.programs = (sampler.rollout, *more, self.annotate, self.experience, self.update)
        self._prefetched_mix: tuple[int, SFTBatch | None] = (-1, None)  # step, batch
        self._warned_truncated = False

    def __call__(
        self,
        state: StageState,
        step: int,
        prompts: PromptSource,
        log_samples: Callable[[dict], None] | None = None,
    ) -> tuple[StageState, dict[str, Any], Experience]:
        """Runs iteration `step`, counted from 0; returns (state, metrics, experience).

        `log_samples` is called with the iteration's record for samples.jsonl. The metrics time/... are the wall-clock
        times of the phases, and add up to the time of the iteration. time/rollout ends when the completions are ready,
        time/reward when the scores are ready, time/annotate when the experience is ready, and time/update when the
        update is done. time/samples is the rest. With `async`, each of them is the time for which the
        host waits. time/update then ends when the devices have the update in their queue. The metrics of the update are
        arrays that may still be computed.
        """
        config, clock, ppo, draws = self.config, Clock(), state.ppo, int(state.draws)
        models = (ppo.policy, ppo.value, self.reference if state.reference is None else state.reference)
        samples_with = ppo.policy if state.behind is None else state.behind
        behind = self._kept(ppo.policy) if self.overlaps else None

        def dispatch(sampled: Sampled) -> tuple[Annotated, Completions | None]:
            greedy = self._greedy(samples_with, prompts, sampled)
            if self.overlaps and step + 1 < config.iterations:
                self.sampler.begin(behind, prompts, draws + sampled.draws)
            return self._annotate(models, sampled.completions.rollout), greedy

        scored, (annotated, greedy) = self.sampler.draw(samples_with, prompts, draws, dispatch, clock)
        draws += scored.draws
        greedy = None if greedy is None else self.sampler.with_scores(greedy)
        clock.lap("time/reward", greedy)
        experience, control, experience_metrics = self._experience(scored, annotated, greedy, state.control)
        clock.lap("time/annotate", experience)
        paused, update_metrics = self._paused(experience_metrics), {}
        if not paused.get(PAUSED):
            key = key_for(self.run.config.seed, "ppo", step, "update")
            prefetched_step, mix = self._prefetched_mix
            mix = mix if prefetched_step == step else self._mix(step)
            inputs = (experience, key, self.update_config)
            ppo, update_metrics = self.update(ppo, self.roles.base, *inputs, mix=mix, choices=self.choices)
        if log_samples is not None:
            samples = samples_of(scored.completions, scored.rows, experience, scored.step_rewards)
            models = (ppo.policy, ppo.value, models[2])
            new = self._annotate(models, scored.completions.rollout).logprobs if self.sees_update else None
        if prompts.success is not None:
            for rows, scores in self.sampler.scored:
                prompts.success.observe(rows, scores)
        if step + 1 < config.iterations:
            if step + 1 + self.overlaps < config.iterations:
                with contextlib.suppress(StreamFault):  # the next draw raises it again, when the state is complete
                    self.sampler.prefetch(prompts, draws + self.overlaps)
            self._prefetched_mix = (step + 1, self._mix(step + 1))
        clock.lap("time/update", () if self.overlaps else ppo)
        if log_samples is not None:
            if new is not None:
                add_by_token(samples, "new_logprobs", scored.completions, new)
            log_samples({"samples": samples, "scores": rounded(scored.scores)})
            clock.lap("time/samples", ())
        metrics = scored.metrics | scored.means() | _floats(experience_metrics) | paused
        metrics |= {} if prompts.success is None else prompts.success.metrics()
        metrics["kl/per_token"] = metrics["kl/k1"] / max(metrics["length/mean"], 1.0)
        self._warn_truncated(metrics)
        metrics |= update_metrics if self.overlaps else _floats(update_metrics)
        metrics |= clock.laps | ({} if self.overlaps else self._rates(metrics, scored.draws, clock.laps)) | {
            "memory/peak_bytes": peak_memory_bytes(),
            **{f"compiles/{p.name}": p.compiles for p in self.programs},
        }
        state = StageState(ppo, control, self.count(draws), state.reference, behind)
        if config.refresh_reference and (step + 1) % config.refresh_reference == 0:
            state = state.replace(reference=self.copy(ppo.policy))
        return state, metrics, experience

    def _kept(self, policy: Adapter) -> Adapter:
        """Returns a copy of the policy on the mesh that samples. It stays valid when the update donates the policy."""
        return self.copy(policy) if self.sampler.mesh is self.run.mesh else self.sampler.sent(policy)

    def _rates(self, metrics: dict[str, float], draws: int, laps: dict[str, float]) -> dict[str, float]:
        """Returns the tokens per second of the rollout and of the update, from the times of these phases."""
        tokens = metrics["length/mean"] * self.rows
        computed = computed_steps(metrics, self.update_config)
        passes = 0 if metrics.get(PAUSED) else computed / self.update_config.minibatches
        return {
            "tokens_per_second/rollout": tokens * draws / laps["time/rollout"],
            "tokens_per_second/update": tokens * passes / laps["time/update"],
        }

    def _warn_truncated(self, metrics: dict[str, float]) -> None:
        """Warns once if `mask_truncated` masks all completions of an iteration."""
        if metrics.get("length/masked_share") == 1 and not self._warned_truncated:
            self._warned_truncated = True
            what, limit = "completion", f"within {self.config.sampling.max_new_tokens} tokens"
            remedy = "ppo.sampling.max_new_tokens"
            if self.config.environment is not None:
                what, limit, remedy = "episode", "by itself", "max_turns or max_episode_tokens of ppo.environment"
            self.run.say(
                f"ppo: no {what} of an iteration ended {limit}, so ppo.update.mask_truncated masks all of them and the "
                f"policy learns nothing; raise {remedy}, or leave mask_truncated out"
            )

    def count(self, number: int) -> jax.Array:
        """Returns a number as a replicated i32[], for `StageState`."""
        return shard_batch(self.run.mesh, np.int32(number))

    def _greedy(self, policy: Adapter, prompts: PromptSource, sampled: Sampled) -> Completions | None:
        """Starts to decode the greedy completions of the prompts. Returns None if the estimator needs none."""
        return self.sampler.sample_greedily(policy, prompts, sampled.indices) if self.needs_greedy else None

    def _annotate(self, models: tuple[Adapter, Adapter, Adapter | None], rollout: Rollout) -> Annotated:
        return self.annotate(self.roles.base, *models, rollout, self.update_config, choices=self.choices)

    def _experience(
        self, scored: ScoredRollout, annotated: Annotated, greedy: tuple[Rollout, jax.Array] | None, control: Control
    ) -> tuple[Experience, Control, dict[str, jax.Array]]:
        """Runs `score_experience`. Returns (experience, next control, metrics)."""
        scores, steps = scored.given()
        inside = {} if steps is None else {"steps": shard_batch(self.run.mesh, steps)}
        rows = scored.completions.rollout, annotated, shard_batch(self.run.mesh, scores)
        return self.experience(*rows, greedy, control, self.settings, **inside)

    def with_initial_moments(self, policy: Adapter, prompts: PromptSource, control: Control) -> Control:
        """Returns the control with the moments of scores before training, which `score.normalise` initial needs."""
        batches = -(-self.config.score.initial_completions // self.rows)
        moments = control.moments
        for i in range(batches):
            indices = prompts.rows(self.run.config.seed, i, self.config.batch_size)
            key = key_for(self.run.config.seed, "ppo", i, "initial scores")
            rows, _ = self.sampler.reward_metrics(self.sampler.sample(policy, prompts, indices, key))
            moments = update_moments(moments, jnp.asarray(rows["reward/score"]))
        return shard(self.run.mesh, control.replace(moments=moments))

    def evaluate(self, policy: Adapter, value: Adapter, prompts: PromptSet) -> Evaluation:
        """Evaluates a policy on the first `evaluation.prompts` prompts, with the programs and shapes of training."""
        size, total = self.config.batch_size, self.config.evaluation.prompts
        control = shard(self.run.mesh, Control.start(0.0))
        rows_of: dict[str, list[np.ndarray]] = {}
        samples = []
        for start in range(0, total, size):
            indices = np.arange(start, start + size) % len(prompts)
            key = key_for(self.run.config.seed, "evaluation", start, "rollout")
            completions = self.sampler.sample(policy, prompts, indices, key)
            greedy = self._greedy(policy, prompts, Sampled(completions, indices))
            annotated = self._annotate((policy, value, self.reference), completions.rollout)
            scored = ScoredRollout(completions, indices, *self.sampler.reward_metrics(completions))
            greedy = None if greedy is None else self.sampler.with_scores(greedy)
            experience = self._experience(scored, annotated, greedy, control)[0]
            for name, values in (scored.rows | row_metrics(*fetch((experience, completions.rollout)))).items():
                rows_of.setdefault(name, []).append(values[: (total - start) * self.group])
            if len(samples) < SAMPLES:
                samples += samples_of(completions, scored.rows, experience, scored.step_rewards)
        rows = {name: np.ma.concatenate(values) for name, values in rows_of.items()}
        means = {name: float(np.mean(values)) for name, values in rows.items() if np.ma.count(values)}
        return Evaluation(means, samples[: min(SAMPLES, total * self.group)], rounded(rows["reward/score"]))

    def _paused(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Returns the metric health/paused: 1 if KL or length is above its limit. The update is then skipped."""
        health = self.run.config.health
        limits = {"kl/k1": health.max_kl, "length/mean": health.max_length}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not limits:
            return {}
        return {PAUSED: float(any(float(metrics[name]) > limit for name, limit in limits.items()))}

    def _mix(self, step: int) -> SFTBatch | None:
        """Returns the pretraining rows for all optimizer steps of an iteration, in order."""
        if self.pretraining is None:
            return None
        steps = self.update_config.epochs * self.update_config.minibatches
        batches = [self.pretraining.batch(step * steps + i) for i in range(steps)]
        return shard_batch(self.run.mesh, jax.tree.map(lambda *parts: np.concatenate(parts), *batches))


def _floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
