"""One PPO iteration, and the final evaluation, with the programs that the ppo stage compiles.

Per iteration three programs run (rollout, annotate with GAE, update), and a fourth where the reward is an adapter or a
model of its own. The host does only what must be text: decode for a reward that reads it, log, save.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.running import update_moments
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sft import SFTData
from jaxrlhf.records import Adapter, Experience, PPOState, SFTBatch
from jaxrlhf.runtime.health import PAUSED
from jaxrlhf.runtime.mesh import fetch, place, place_batch
from jaxrlhf.runtime.programs import peak_memory_bytes
from jaxrlhf.runtime.random import key_for
from jaxrlhf.stages.evaluation import SAMPLES, Evaluation, rows_measured, samples_of
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo_sampling import Clock, Drawn, Sampler
from jaxrlhf.stages.programs import annotate_program, update_program
from jaxrlhf.stages.roles import Roles
from jaxrlhf.steps.annotate import Control, ExperienceSettings


class Iteration:
    """One PPO iteration as a function of the state: what it uses and does not change stands here.

    The state is a dict: `ppo` (PPOState), `control` (Control), `draws` (i32[], rollouts of training prompts so far:
    the place in the data), and `reference` (Adapter) where that is refreshed.
    """

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
        self.annotate, self.update = annotate_program(run.mesh), update_program(run.mesh, state)
        greedy = ADVANTAGES[config.advantage.estimator].needs_greedy and sampler.greedy_rollout is not sampler.rollout
        more = ((sampler.greedy_rollout,) if greedy else ()) + ((sampler.merge,) if config.resample else ())
        self.programs = (sampler.rollout, *more, self.annotate, self.update)

    def __call__(self, state: dict, step: int, prompts: PromptSet) -> tuple[dict, dict[str, float], Drawn, Experience]:
        """(state, metrics, what was drawn, what was made of it) of the iteration after `step` iterations."""
        config, clock, ppo = self.config, Clock(), state["ppo"]
        drawn, draws, metrics = self.sampler.draw(ppo.policy, prompts, int(state["draws"]), clock)
        greedy = self._greedy(ppo.policy, prompts, drawn.chosen)
        clock.lap("time/reward", greedy)
        reference = state.get("reference", self.reference)
        experience, control, noted = self.annotated(ppo.policy, ppo.value, reference, drawn, state["control"], greedy)
        clock.lap("time/annotate", experience)
        metrics |= drawn.means() | _floats(noted)
        metrics |= self._paused(metrics)
        if not metrics.get(PAUSED):
            key = key_for(self.run.config.seed, "ppo", step, "update")
            ppo, updated = self.update(ppo, self.roles.base, experience, key, self.update_config, mix=self._mix(step))
            metrics |= _floats(updated)
        clock.lap("time/update", ppo)
        sampled = metrics["length/mean"] * self.rows
        steps = self.update_config.epochs * self.update_config.minibatches
        computed = min(metrics.get("policy/steps", steps) + 1, steps)  # with the step whose KL was too much
        passes = 0 if metrics.get(PAUSED) else computed / self.update_config.minibatches
        metrics |= clock.laps | {
            "tokens_per_second/rollout": sampled * metrics.get("groups/draws", 1) / clock.laps["time/rollout"],
            "tokens_per_second/update": sampled * passes / clock.laps["time/update"],
            "memory/peak_bytes": peak_memory_bytes(),
            **{f"compiles/{p.name}": p.compiles for p in self.programs},
        }
        state = state | {"ppo": ppo, "control": control, "draws": self.count(draws)}
        if config.refresh_reference and (step + 1) % config.refresh_reference == 0:
            state["reference"] = jax.tree.map(jnp.copy, ppo.policy)  # a copy: the next update gives the policy away
        return state, metrics, drawn, experience

    def count(self, number: int) -> jax.Array:
        """A number of the state, i32[], where the programs and the checkpoints want it."""
        return place_batch(self.run.mesh, np.int32(number))

    def annotated(self, policy: Adapter, value: Adapter, reference: Adapter | None, drawn: Drawn, control, greedy):
        """(experience, next control, metrics); see `steps.annotate.annotate_experience`."""
        scores = place_batch(self.run.mesh, drawn.scores)
        answered = drawn.answers.rollout
        return self.annotate(
            self.roles.base, policy, value, reference, answered, scores, greedy, control, self.settings
        )

    def fitted(self, policy: Adapter, prompts: PromptSet, control: Control) -> Control:
        """The control with the moments of scores before the first iteration, for `score.normalise` initial."""
        batches = -(-self.config.score.initial_answers // self.rows)
        moments = control.moments
        for i in range(batches):
            chosen = prompts.rows(self.run.config.seed, i, self.config.batch_size)
            key = key_for(self.run.config.seed, "ppo", i, "initial scores")
            scores = self.sampler.measured(self.sampler.answer(policy, prompts, chosen, key))["reward/score"]
            moments = update_moments(moments, jnp.asarray(scores))
        return place(self.run.mesh, control.replace(moments=moments))

    def evaluate(self, policy: Adapter, value: Adapter, prompts: PromptSet) -> Evaluation:
        """Answers to `evaluation_prompts` prompts in turn, with the same programs at the same shapes."""
        size, wanted = self.config.batch_size, self.config.evaluation_prompts
        control = place(self.run.mesh, Control.start(0.0))
        rows_of: dict[str, list[np.ndarray]] = {}
        samples = []
        for start in range(0, wanted, size):
            chosen = np.arange(start, start + size) % len(prompts)
            key = key_for(self.run.config.seed, "evaluation", start, "rollout")
            answers = self.sampler.answer(policy, prompts, chosen, key)
            drawn = Drawn(answers, chosen, self.sampler.measured(answers))
            greedy = self._greedy(policy, prompts, chosen)
            experience = self.annotated(policy, value, self.reference, drawn, control, greedy)[0]
            for name, values in (drawn.rows | rows_measured(fetch(experience), fetch(answers.rollout.ended))).items():
                rows_of.setdefault(name, []).append(values[: (wanted - start) * self.group])
            samples += samples_of(answers, drawn.scores)
        means = {name: float(np.mean(np.concatenate(values))) for name, values in rows_of.items()}
        return Evaluation(means, samples[:SAMPLES])

    def _paused(self, metrics: dict[str, float]) -> dict[str, float]:
        """Whether this iteration is not to be learnt from, where settings have limits."""
        health = self.run.config.health
        limits = {"kl/k1": health.max_kl, "length/mean": health.max_length}
        if all(limit is None for limit in limits.values()):
            return {}
        return {PAUSED: float(any(limit is not None and metrics[name] > limit for name, limit in limits.items()))}

    def _greedy(self, policy: Adapter, prompts: PromptSet, chosen: np.ndarray):
        """Greedy answers and their scores, where the advantages are measured from them."""
        needed = ADVANTAGES[self.config.advantage.estimator].needs_greedy
        return self.sampler.greedy_scores(policy, prompts, chosen) if needed else None

    def _mix(self, step: int) -> SFTBatch | None:
        """Rows of the language-model mix for each optimizer step of an iteration, one step after another."""
        if self.pretraining is None:
            return None
        steps = self.update_config.epochs * self.update_config.minibatches
        batches = [self.pretraining.batch(step * steps + i) for i in range(steps)]
        return place_batch(self.run.mesh, jax.tree.map(lambda *parts: np.concatenate(parts), *batches))


def _floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
