"""Running statistics of observations and returns, as in Stable-Baselines3's VecNormalize. Float64, on the host."""

import numpy as np

CLIP = 10.0
_EPSILON = 1e-8


class Moments:
    """Mean and variance of all rows so far (Chan, Golub and LeVeque 1979)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean, self.variance, self.count = np.zeros(shape), np.ones(shape), np.array(1e-4)

    def update(self, rows: np.ndarray) -> None:
        """Adds rows [B, *shape]."""
        rows = rows.astype(np.float64)
        count, mean, variance = rows.shape[0], rows.mean(0), rows.var(0)
        total, delta = self.count + count, mean - self.mean
        squares = self.variance * self.count + variance * count + np.square(delta) * self.count * count / total
        self.mean, self.variance, self.count = self.mean + delta * count / total, squares / total, np.asarray(total)


class Normalization:
    """Normalises observations f32[N,I] and rewards f32[N]. If one of the two is switched off, it stays unchanged.

    An observation becomes (x - mean) / deviation, and a reward r / deviation of the discounted returns. Both are
    clipped to [-10, 10]. `see` updates the statistics of observations, and `reward` those of rewards.
    """

    def __init__(self, inputs: int, envs: int, observations: bool, rewards: bool, gamma: float) -> None:
        self.observations = Moments((inputs,)) if observations else None
        self.rewards = Moments(()) if rewards else None
        self.returns, self._gamma = np.zeros(envs), gamma

    def start(self, envs: int) -> None:
        """Sets the discounted returns to zero, because an episode starts in each environment."""
        self.returns = np.zeros(envs)

    def observe(self, observations: np.ndarray) -> np.ndarray:
        """Returns normalised observations."""
        if self.observations is None:
            return observations
        deviation = np.sqrt(self.observations.variance + _EPSILON)
        return np.clip((observations - self.observations.mean) / deviation, -CLIP, CLIP).astype(np.float32)

    def see(self, observations: np.ndarray) -> None:
        """Adds observations to the statistics."""
        if self.observations is not None:
            self.observations.update(observations)

    def reward(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Adds rewards to the statistics and returns normalised rewards. `dones` is True where an episode has ended."""
        if self.rewards is None:
            return rewards
        self.returns = self.returns * self._gamma + rewards
        self.rewards.update(self.returns)
        self.returns[dones] = 0.0
        return np.clip(rewards / np.sqrt(self.rewards.variance + _EPSILON), -CLIP, CLIP).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the statistics by name."""
        parts = {"observations": self.observations, "rewards": self.rewards}
        return {
            f"{part}/{name}": np.asarray(getattr(moments, name))
            for part, moments in parts.items()
            if moments is not None
            for name in ("mean", "variance", "count")
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets the statistics that `arrays` returned."""
        for name, value in arrays.items():
            part, _, field = name.partition("/")
            setattr(getattr(self, part), field, np.array(value))
