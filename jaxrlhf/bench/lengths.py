"""How long the answers of random weights are: all full, or cut short by chance, with the rollout as it is.

Random weights give every token about the same probability. A set of stop tokens that is the share p of the vocabulary
then ends an answer at each token with probability p: lengths are geometric, with mean 1 / p, cut at the limit.
"""

from jaxrlhf.config import RunConfig, Sampling

MEAN_SHARE = 4  # of geometric lengths: the mean is the limit divided by this, before they are cut at the limit


def with_lengths(config: RunConfig, kind: str, vocabulary: int) -> RunConfig:
    """The run with answers of this kind of length, `full` or `geometric`."""
    if config.ppo is None:
        return config
    sampling = config.ppo.sampling
    stops = () if kind == "full" else stop_tokens(sampling, vocabulary)
    changed = {"stop_tokens": stops, "pad_token": sampling.pad_token or 0}
    ppo = config.ppo.model_copy(update={"sampling": sampling.model_copy(update=changed)})
    return config.model_copy(update={"ppo": ppo})


def stop_tokens(sampling: Sampling, vocabulary: int) -> tuple[int, ...]:
    """MEAN_SHARE / limit of the vocabulary, spread over it; at least one token, and never all."""
    count = round(MEAN_SHARE * vocabulary / sampling.max_new_tokens)
    count = min(max(count, 1), vocabulary - 1)
    return tuple(i * vocabulary // count for i in range(count))
