"""What the value model is before the first iteration.

It should say what returns are, else the policy learns from the difference: a value of 3 where returns are 0 gives the
last token of every answer an advantage of -3, and the policy learns not to end. A reward model says how good an answer
is that ends here. Where the reward is that model's score, its adapter is a good start, head and all; with
`score.normalise` initial, gain and bias go into the head. Where returns have another scale, or are of another reward,
only its trunk is of use, with a head of 0: normalised scores have a mean of 0.
"""

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.models.adapters import as_kind, init_adapter, is_full, scaled_head, value_head, with_head
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.load import own_gain
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles


def starting_value(run: Run, roles: Roles) -> tuple[Adapter | None, bool]:
    """(the value model's adapter, whether it says the reward's scores before they are normalised).

    A head alone where it shares the policy's trunk, None where there is no value model. Where it does not start from
    all of the reward adapter, a line says why.
    """
    config, base = run.config.ppo, roles.base
    if not ADVANTAGES[config.advantage.estimator].needs_value:
        return None, False
    if config.update.value_trunk == "policy":
        return value_head(base), False
    wanted, key = run.config.adapter_or(config.value_adapter), key_for(run.config.seed, "ppo", 0, "value")
    reward = roles.adapters.get("reward") if config.value_from == "reward" else None
    if reward is not None and wanted.kind == "lora" and is_full(reward):
        run.say(
            "ppo: the value model starts fresh: the reward adapter holds whole weights, and the value's is LoRA pairs; "
            "ppo.value_adapter.kind=full starts from it, and so does a reward model trained as LoRA pairs"
        )
        reward = None
    if reward is None:
        return init_adapter(base, wanted, key, head="value"), False
    trunk, gain = as_kind(base, reward, wanted.kind), own_gain(config.reward)
    if gain is not None and config.score.normalise in ("none", "initial"):
        return scaled_head(trunk, gain, 0.0), True
    why = "the reward is not its score alone" if gain is None else f"ppo.score.normalise is {config.score.normalise}"
    run.say(f"ppo: the value model starts from the reward adapter's trunk with a head of 0: {why}")
    return with_head(trunk, base, "value", key), False
