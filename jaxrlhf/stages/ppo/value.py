"""The starting weights of the value model.

The value model must predict returns on their scale. If it predicts 3 and returns are 0, the last token of every
completion has an advantage of -3, and the policy learns not to end a completion. If the reward is the score of the
run's reward adapter, the value model starts from this adapter and its head. With `score.normalise` initial, the gain
and bias of the normalisation are included in the head. For other rewards or scales the value model starts from the
adapter's trunk with a head of 0, because 0 is the mean of normalised scores.
"""

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.models.adapters import as_kind, init_adapter, is_full, scaled_head, value_head, with_head
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.load import own_gain
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles


def starting_value(run: Run, roles: Roles) -> tuple[Adapter | None, bool]:
    """Returns (adapter of the value model, whether the adapter predicts reward scores before normalisation).

    The adapter is only a head if the value model shares the policy's trunk. It is None if there is no value model.
    Prints a line if the value model does not start from the whole reward adapter.
    """
    config, base = run.config.ppo, roles.base
    if not ADVANTAGES[config.advantage.estimator].needs_value:
        return None, False
    if config.update.value_trunk == "policy":
        return value_head(base), False
    adapter_config, key = run.config.adapter_or(config.value_adapter), key_for(run.config.seed, "ppo", 0, "value")
    reward = roles.adapters.get("reward") if config.value_from == "reward" else None
    if reward is not None and adapter_config.kind == "lora" and is_full(reward):
        run.say(
            "ppo: the value model starts from a new adapter, because the reward adapter has full weights, but the "
            "value adapter has LoRA pairs; to start from the reward adapter, give ppo.value_adapter.kind=full or train "
            "the reward model with LoRA"
        )
        reward = None
    if reward is None:
        return init_adapter(base, adapter_config, key, head="value"), False
    trunk, gain = as_kind(base, reward, adapter_config.kind), own_gain(config.reward)
    if gain is not None and config.score.normalise in ("none", "initial"):
        return scaled_head(trunk, gain, 0.0), True
    scale = f"ppo.score.normalise is {config.score.normalise}"
    why = "the reward is not only the score of the reward adapter" if gain is None else scale
    run.say(f"ppo: the value model starts from the reward adapter's trunk with a head of 0, because {why}")
    return with_head(trunk, base, "value", key), False
