"""Statistics of episodes, as Stable-Baselines3's Monitor has them."""

import json
import time
from pathlib import Path
from typing import Any

from jaxrlhf.environments.protocol import adapt, name_of
from jaxrlhf.errors import UserError


class Monitor:
    """Wraps an environment. Adds info["episode"] at the end of each episode, and can write it to a CSV file.

    info["episode"] has the return "r", the length "l", and "t", the seconds since the Monitor was made. Other
    attributes are read from the environment. `VecEnv` adds the same statistics to environments without a Monitor.

    Args:
      env: an environment in the current or the older form; `reset` and `step` of the Monitor have the current form.
      filename: a CSV file, overwritten if it exists; None writes no file. The name gets the suffix .monitor.csv if it
        does not end with monitor.csv.
      info_keywords: keys of info at the last step that become columns and entries of info["episode"].
    """

    def __init__(self, env: Any, filename: str | Path | None = None, info_keywords: tuple[str, ...] = ()) -> None:
        self.env, self._keywords = adapt(env), tuple(info_keywords)
        self._started, self._rewards, self._file = time.time(), [], None
        self.returns: list[float] = []
        self.lengths: list[int] = []
        if filename is not None:
            path = Path(filename)
            path = path if path.name.endswith("monitor.csv") else path.with_name(f"{path.name}.monitor.csv")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
            except OSError as error:
                raise UserError(f"{path}: the file cannot be written: {error.strerror}") from None
            head = {"t_start": self._started, "env_id": name_of(env)}
            self._file.write(f"#{json.dumps(head)}\n{','.join(['r', 'l', 't', *self._keywords])}\n")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._rewards = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._rewards.append(float(reward))
        if terminated or truncated:
            total, length = sum(self._rewards), len(self._rewards)
            self.returns.append(total)
            self.lengths.append(length)
            episode = {"r": round(total, 6), "l": length, "t": round(time.time() - self._started, 6)}
            for name in self._keywords:
                if name not in info:
                    raise UserError(f"info_keywords: {name} is not in info at the end of an episode")
                episode[name] = info[name]
            if self._file is not None:
                self._file.write(",".join(str(value) for value in episode.values()) + "\n")
            info = {**info, "episode": episode}
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Closes the file and the environment."""
        if self._file is not None:
            self._file.close()
        close = getattr(self.env.env, "close", None)
        if callable(close):
            close()

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)
