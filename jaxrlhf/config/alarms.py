"""Settings of alarms, and the shipped sets of alarms."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema, model_validator

from jaxrlhf.config.base import LARGEST_FLOAT, FiniteFloat, PositiveInt, Settings

LIMITS = ("above", "below", "rises_by", "falls_by")


def _change(value: Any) -> float | str:
    """Returns a number above 0 as float, or a percentage as text."""
    number = value.removesuffix("%") if isinstance(value, str) and value.endswith("%") else value
    try:
        if isinstance(number, bool) or (isinstance(value, str) and number is value) or not 0 < float(number) <= LARGEST_FLOAT:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"must be a number above 0, or a percentage such as 25%, not {value!r}") from None
    return value if isinstance(value, str) else float(value)


Change = Annotated[Any, PlainValidator(_change), WithJsonSchema({"type": "change"})]


class AlarmConfig(Settings):
    """An alarm: a condition on a metric, and what to do when the condition begins to hold."""

    name: Annotated[str, Field(pattern=r"^\w+$", max_length=60)] | None = Field(None, description="name in messages and in metrics.jsonl (alarm/NAME); with the name of a shipped alarm, the keys given here replace its keys, and its other keys are kept; null makes a name from metric and limit")
    metric: str | None = Field(None, description="metric that the alarm watches, such as kl/k1; steps that do not log the metric are skipped; only an alarm with the name of a shipped alarm may leave metric out")
    above: FiniteFloat | None = Field(None, description="limit; the alarm is for values above this limit")
    below: FiniteFloat | None = Field(None, description="limit; the alarm is for values below this limit")
    rises_by: Change | None = Field(None, description="limit; the alarm is for values above the lowest value of the stage so far plus this limit; a percentage such as 50% is a percentage of the size of the lowest value")
    falls_by: Change | None = Field(None, description="limit; the alarm is for values below the highest value of the stage so far minus this limit; a percentage such as 50% is a percentage of the size of the highest value")
    over: PositiveInt = Field(1, description="the mean of this number of latest values of the metric is compared with the limit; nothing is compared before there are so many values")
    for_: PositiveInt = Field(1, alias="for", description="the alarm begins after this number of values in a row beyond the limit, and ends after this number of values in a row within the limit")
    against: str | None = Field(None, description="another metric, only with rises_by or falls_by; its mean over the same steps must have moved the other way since the lowest or highest value, such as a gold score that falls while the reward rises")
    stage: Literal["sft", "reward_model", "ppo"] | None = Field(None, description="stage that the alarm watches; null watches all stages")
    do: Literal["warn", "run", "pause", "stop"] = Field("warn", description="what the run does when the alarm begins, after it prints a line: nothing (warn), run command (run), save and wait for the user (pause), or save and end the run with exit status 3 (stop)")
    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(None, description="program and arguments for do run; the program is started on process 0 without a shell, its standard input is the alarm as JSON, and it is ended after 60 seconds")

    @model_validator(mode="after")
    def _complete(self) -> "AlarmConfig":
        limits = [name for name in LIMITS if getattr(self, name) is not None]
        shipped = SHIPPED.get(self.name) if SHIPPED else None
        if self.metric is None and shipped is None:
            near = f"; the shipped alarms are {', '.join(SHIPPED)}" if self.name else ""
            raise ValueError(f"metric is missing; give the metric that the alarm watches{near}")
        if len(limits) > 1 or (not limits and (self.metric is not None or shipped is None)):
            raise ValueError(f"give exactly one of {', '.join(LIMITS)}; given: {', '.join(limits) or 'none'}")
        if self.against is not None and not self.whole.changes:
            raise ValueError("against needs rises_by or falls_by")
        if (self.do == "run") != (self.command is not None):
            raise ValueError("do: run needs command, and command needs do: run; give both, or neither")
        return self

    @property
    def whole(self) -> "AlarmConfig":
        """Returns the complete alarm. Keys that are not given come from the shipped alarm of the same name."""
        shipped = SHIPPED.get(self.name) if SHIPPED and self.metric is None else None
        if shipped is None:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if any(given.get(name) is not None for name in LIMITS):
            given = dict.fromkeys(LIMITS) | given
        return shipped.model_copy(update=given)

    @property
    def limit(self) -> tuple[str, float | str]:
        """Returns (name, value) of the limit. The name is above, below, rises_by or falls_by."""
        return next((name, getattr(self.whole, name)) for name in LIMITS if getattr(self.whole, name) is not None)

    @property
    def changes(self) -> bool:
        """Whether the limit is rises_by or falls_by."""
        return self.rises_by is not None or self.falls_by is not None

    @property
    def title(self) -> str:
        """Returns the name. If none is given, makes a name from metric and limit."""
        kind, limit = self.limit
        number = limit if isinstance(limit, str) else f"{limit:g}"
        return self.name or f"{self.metric.replace('/', '_')}_{kind}_{number}"


SHIPPED: dict[str, AlarmConfig] = {}  # filled below, because `AlarmConfig` reads it


def _shipped(name: str, **keys: Any) -> AlarmConfig:
    return AlarmConfig.model_validate({"name": name, "stage": "ppo", **keys})


# docs/alarms.md gives the reason for each limit.
SETS: dict[str, tuple[AlarmConfig, ...]] = {
    "ppo": (
        _shipped("kl_runs_away", metric="kl/per_token", above=0.8, over=3, **{"for": 3}),
        _shipped("length_collapses", metric="length/mean", falls_by="75%", over=3, **{"for": 3}),
        _shipped("length_explodes", metric="length/mean", rises_by="200%", over=3, **{"for": 3}),
        _shipped("unfinished", metric="length/eos_share", below=0.5, over=5, **{"for": 5}),
        _shipped("entropy_collapses", metric="policy/entropy", falls_by="95%", over=3, **{"for": 5}),
        _shipped("gold_falls", metric="reward/gold", falls_by="15%", over=10, against="reward/score", **{"for": 5}),
        _shipped("evaluation_gold_falls", metric="evaluation/reward/gold", falls_by="10%", against="evaluation/reward/score", **{"for": 2}),
        _shipped("value_does_not_fit", metric="value/explained_variance", below=-0.01, over=10, **{"for": 20}),
        _shipped("policy_jumps", metric="policy/approx_kl", above=0.1, over=3, **{"for": 3}),
        _shipped("clips_high", metric="policy/clip_high", above=0.5, over=3, **{"for": 3}),
        _shipped("clips_low", metric="policy/clip_low", above=0.5, over=3, **{"for": 3}),
        _shipped("sampling_gap", metric="gap/logprob_mean", above=0.05, over=3, **{"for": 3}),
        _shipped("first_ratio", metric="policy/first_ratio_error", above=0.001, **{"for": 3}),
    )
}
SHIPPED.update({alarm.name: alarm for alarms in SETS.values() for alarm in alarms})

ADVICE = {
    "kl_runs_away": "raise ppo.kl.coef, lower the learning rate, or set ppo.kl.target",
    "length_collapses": "look at samples.jsonl, because the reward may favour short completions; see ppo.score",
    "length_explodes": "look at samples.jsonl, because the reward may favour length; see ppo.score.length_penalty",
    "unfinished": "raise ppo.sampling.max_new_tokens, or set ppo.score.missing_eos_penalty",
    "entropy_collapses": "raise ppo.update.entropy_coef or ppo.kl.coef, or lower the learning rate",
    "gold_falls": "the policy exploits the reward; raise ppo.kl.coef, or take the best checkpoint (checkpoints.best)",
    "evaluation_gold_falls": "the policy exploits the reward; raise ppo.kl.coef, or take the best checkpoint "
    "(checkpoints.best)",
    "value_does_not_fit": "use ppo.update.value_warmup, a larger ppo.update.value_clip, or ppo.score.normalise",
    "policy_jumps": "lower the learning rate or ppo.update.epochs, or set ppo.update.kl_stop",
    "clips_high": "lower the learning rate or ppo.update.epochs",
    "clips_low": "lower the learning rate or ppo.update.epochs",
    "sampling_gap": "set ppo.update.importance_cap, or raise the precision of the base (model.dtype); with ppo.async=1, "
    "lower the learning rate",
    "first_ratio": "set model.matmul_precision=highest, and look at compiler_options",
}


def _kind(entry: Any) -> str:
    return "set" if isinstance(entry, str) else "alarm"


Alarm = Annotated[
    Annotated[Literal["ppo"], Tag("set")] | Annotated[AlarmConfig, Tag("alarm")], Discriminator(_kind)
]


def alarms_of(entries: tuple[str | AlarmConfig, ...], stage: str) -> dict[str, AlarmConfig]:
    """Returns the alarms of a stage by name. A later alarm replaces an earlier alarm of the same name."""
    alarms = [alarm for entry in entries for alarm in (SETS[entry] if isinstance(entry, str) else (entry.whole,))]
    return {alarm.title: alarm for alarm in {alarm.title: alarm for alarm in alarms}.values() if alarm.stage in (None, stage)}
