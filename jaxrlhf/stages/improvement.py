"""Early stopping, and learning rates that fall when a metric stops improving."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxrlhf.config import ImprovementConfig, OptimizerConfig
from jaxrlhf.stages.metric_names import PREFIX


@dataclasses.dataclass
class Improvement:
    """The best value of a metric so far, and the number of values since then, none of which was better."""

    config: ImprovementConfig
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes the value of a step, if the step has one. Returns `over`.

        A value that is not finite is never better.
        """
        value = metrics.get(self.config.metric)
        if value is None:
            return False
        sign = 1 if self.config.mode == "highest" else -1
        if math.isfinite(value) and (self.best is None or sign * (value - self.best) > self.config.min_delta):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return self.over

    @property
    def over(self) -> bool:
        """Whether none of the last `patience` values was better than the best value before them."""
        return self.waited >= self.config.patience

    def text(self) -> str:
        """Returns a message about the observed values."""
        values = f"{self.waited} value{'s' * (self.waited != 1)} in a row"
        best = "no value was finite" if self.best is None else f"its best was {self.best:.4g} at step {self.best_step}"
        return f"{self.config.metric} has not improved in {values}; {best}"

    def notes(self) -> dict[str, Any]:
        """Returns the state, as JSON values for a checkpoint."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}


class Watch:
    """Decides when a stage ends early, and when its learning rates are lowered.

    The argument `optimizers` holds the stage's optimizers by name, with learning rates. The attribute `optimizers`
    holds them with the learning rates of the next step. After each reduction the patience of a plateau counts from 0
    again, as in torch's ReduceLROnPlateau.
    """

    def __init__(
        self, early_stopping: ImprovementConfig | None, optimizers: Mapping[str, OptimizerConfig], notes: Mapping
    ):
        saved = notes.get("early_stopping", {})
        self.early_stopping = None if early_stopping is None else Improvement(early_stopping, **saved)
        self.optimizers, self._plateaus = dict(optimizers), {}
        for name, optimizer in optimizers.items():
            if optimizer.plateau is not None:
                saved = dict(notes.get("plateaus", {}).get(name, {}))
                self._set_rate(name, saved.pop("learning_rate", optimizer.learning_rate))
                self._plateaus[name] = Improvement(optimizer.plateau, **saved)

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Takes the metrics of a step. Returns a line for each learning rate that is now lowered."""
        lines = []
        if self.early_stopping is not None:
            self.early_stopping.observe(step, metrics)
        for name, plateau in self._plateaus.items():
            if plateau.observe(step, metrics):
                rate = self.optimizers[name].learning_rate
                lower = min(max(rate * plateau.config.factor, plateau.config.min_rate), rate)
                if lower < rate:
                    lines.append(
                        f"{name}: learning rate lowered to {lower:.4g} after step {step}, because {plateau.text()}"
                    )
                self._set_rate(name, lower)
                plateau.waited = 0
        return lines

    def _set_rate(self, name: str, rate: float) -> None:
        self.optimizers[name] = self.optimizers[name].model_copy(update={"learning_rate": rate})

    @property
    def stops(self) -> bool:
        """Whether early stopping ends the stage now."""
        return self.early_stopping is not None and self.early_stopping.over

    @property
    def needs_every_step(self) -> bool:
        """Whether the next step depends on the metrics of the training steps.

        The host must then read them before the next step.
        """
        watched = [*filter(None, [self.early_stopping]), *self._plateaus.values()]
        return any(not improvement.config.metric.startswith(PREFIX) for improvement in watched)

    def notes(self) -> dict[str, Any]:
        """Returns the state, as JSON values for a checkpoint."""
        notes: dict[str, Any] = {}
        if self.early_stopping is not None:
            notes["early_stopping"] = self.early_stopping.notes()
        if self._plateaus:
            notes["plateaus"] = {
                name: plateau.notes() | {"learning_rate": self.optimizers[name].learning_rate}
                for name, plateau in self._plateaus.items()
            }
        return notes
