"""Rewards that the host computes, in a run of several processes: process 0 scores the whole batch, all get its scores.

A function, a server or a classifier in torch may answer each call differently, keep a count, or see only one host's
network: called by each process for itself, the processes would learn from different scores and drift apart. One call
for the whole batch is also what a reward function is promised, whatever the number of processes.
"""

import numpy as np

from jaxrlhf.distributed.processes import alone, from_first
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, may_abstain, with_abstained
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.pretrained import PretrainedReward


class FromFirst:
    """A reward (see `completions.Reward`) that process 0 asks, for all; what it fails with is raised on all."""

    def __init__(self, reward: Reward):
        self.reward, self.name, self.may_abstain = reward, reward.name, may_abstain(reward)

    def __call__(self, completions: Completions) -> np.ndarray:
        completions.gather()

        def score() -> bytes:
            scores = self.reward(completions)
            return np.stack([np.asarray(scores, np.float32), abstained_rows(scores).astype(np.float32)]).tobytes()

        scores, abstained = np.frombuffer(from_first(score, RewardFault), np.float32).reshape(2, -1)
        return with_abstained(scores, abstained > 0)


def on_first(reward: Reward) -> Reward:
    """The reward, asked by process 0 alone where there are several and it is no program of all devices."""
    return reward if alone() or isinstance(reward, (ModelReward, PretrainedReward)) else FromFirst(reward)
