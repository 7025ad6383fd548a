"""Settings of a run: the model, the mesh, and one section per stage."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from jaxrlhf.config.alarms import Alarm
from jaxrlhf.config.base import (
    CHOICE,
    FREE,
    LARGEST,
    LONGER,
    ROUNDING,
    FiniteFloat,
    NonNegativeFloat,
    Overflow,
    PositiveFloat,
    PositiveInt,
    Remat,
    Seconds,
    Settings,
    UnitFloat,
)
from jaxrlhf.config.data import DemonstrationsConfig, PreferencesConfig, PromptsConfig, SourceConfig, not_streamed
from jaxrlhf.config.environment import EnvironmentConfig
from jaxrlhf.config.evaluation import (
    ImprovementConfig,
    PPOEvaluationConfig,
    RewardModelEvaluationConfig,
    SFTEvaluationConfig,
)
from jaxrlhf.config.model import ModelConfig
from jaxrlhf.config.paths import CachePath, FolderPath, FunctionPath
from jaxrlhf.config.rewards import ModelRewardConfig, RewardConfig
from jaxrlhf.config.steps import (
    AdapterConfig,
    AdvantageConfig,
    KLConfig,
    OptimizerConfig,
    PPOConfig,
    Sampling,
    ScoreConfig,
)

# Keys of `compiler_options`: the names of the programs that runs compile, and "all" for every program.
PROGRAMS = (
    "all", "rollout", "rollout_greedy", "merge", "annotate", "experience", "update", "reward", "sft_update",
    "sft_evaluate", "reward_model_update", "pair_scores",
)  # fmt: skip

# Default cap of importance weights if the policy that samples is one update behind. The weight of a token is the ratio of
# the policy before the update to the policy that sampled. Without a cap, a few tokens would dominate a batch; 2 is the cap
# of truncated importance sampling (F. Yao et al., 2025). AReaL (2505.24298) corrects in the same way, with a cap of 5.
ASYNC_CAP = 2.0


class PartMeshConfig(Settings):
    """Number of devices along each axis of one of PPO's two meshes, each of which has a part of the devices."""

    data: PositiveInt = Field(1, description="devices that each hold a copy of the base and a share of the batch", json_schema_extra=FREE)
    fsdp: PositiveInt = Field(1, description="devices that share the batch and the weights", json_schema_extra=FREE)
    context: PositiveInt = Field(1, description="devices that share the positions of each sequence in scoring and training; in sampling they share rows", json_schema_extra=FREE)
    tensor: PositiveInt = Field(1, description="devices that share each layer's heads and MLP width", json_schema_extra=FREE)


class MeshConfig(Settings):
    """Number of devices along each mesh axis; -1 takes the remaining devices."""

    data: int = Field(-1, ge=-1, le=LARGEST, description="devices that each hold a copy of the base and a share of the batch", json_schema_extra=FREE)
    fsdp: int = Field(1, ge=-1, le=LARGEST, description="devices that share the batch and the weights; the weights are gathered layer by layer", json_schema_extra=FREE)
    context: int = Field(1, ge=-1, le=LARGEST, description="devices that share the positions of each sequence in scoring and training, and its heads in attention; for sequences of 8,192 tokens and more; in sampling these devices share rows", json_schema_extra=FREE)
    tensor: int = Field(1, ge=-1, le=LARGEST, description="devices that share each layer's heads and MLP width", json_schema_extra=FREE)
    rollout: PartMeshConfig | None = Field(None, description="mesh on which PPO samples: the first devices; give it together with update; null samples on the mesh above", json_schema_extra=FREE)
    update: PartMeshConfig | None = Field(None, description="mesh on which PPO scores and learns: the devices after those of rollout; null learns on the mesh above", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _one_filler(self) -> "MeshConfig":
        sizes = {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"each axis must be at least 1, or -1 on at most one axis; given {sizes}")
        if (self.rollout is None) != (self.update is None):
            raise ValueError("rollout and update are the two meshes of PPO; give both sections, or neither")
        return self


class CheckpointsConfig(Settings):
    """Settings that say which checkpoints each stage keeps, and which checkpoint is the result of the stage."""

    keep: PositiveInt = Field(2, description="number of latest checkpoints to keep", json_schema_extra=FREE)
    best: str | None = Field(None, description="metric, such as reward/gold; the checkpoint with the best value of this metric is kept too; null keeps only the latest checkpoints", json_schema_extra=CHOICE)
    best_is: Literal["highest", "lowest"] = Field("highest", description="whether the highest or the lowest value of the metric in best is the best value", json_schema_extra=CHOICE)
    result: Literal["last", "best"] = Field("last", description="which weights are the result of a stage: the weights of its last step (last), or of its best checkpoint (best) if the stage logs the metric named by best")
    grace: Seconds = Field(60.0, description="seconds after SIGTERM, SIGHUP or Ctrl-C in which the current step may finish and be saved", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _best_metric(self) -> "CheckpointsConfig":
        if self.result == "best" and self.best is None:
            raise ValueError("result is best, but best names no metric; give a metric, such as best: reward/gold")
        return self


class HealthConfig(Settings):
    """Settings that stop a run that no longer learns.

    Steps whose loss or gradient is not finite are skipped and counted.
    """

    patience: PositiveInt = Field(10, description="the run stops after this number of skipped steps in a row; the batch of the last skipped step is saved", json_schema_extra=FREE)
    max_kl: PositiveFloat | None = Field(None, description="KL to the reference, in nats per completion, above which a PPO iteration is skipped; null sets no limit")
    max_length: PositiveFloat | None = Field(None, description="mean completion length, in tokens, above which a PPO iteration is skipped; null sets no limit")


class _SupervisedConfig(Settings):
    """Settings of the stages that train on a fixed data set."""

    data: SourceConfig
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer")
    epochs: PositiveInt = Field(1, description="passes over the data")
    max_steps: PositiveInt | None = Field(None, description="largest number of optimizer steps; the stage ends earlier if all epochs are done; needed with data.streaming, where the number of rows is not known; null means no limit")
    batch_size: PositiveInt
    microbatch_size: PositiveInt | None = Field(None, description="rows per forward and backward pass; null is batch_size; smaller values save memory")
    max_length: PositiveInt = Field(512, description="longest sequence, in tokens")
    remat: Remat = "dots"
    save_every: PositiveInt = Field(100, description="optimizer steps between checkpoints", json_schema_extra=CHOICE)
    early_stopping: ImprovementConfig | None = Field(None, description="ends the stage when a metric stops improving; null runs all epochs")

    @model_validator(mode="after")
    def _stream(self) -> "_SupervisedConfig":
        """Raises ValueError if the stage lacks a setting that a stream needs."""
        if getattr(self.data, "streaming", False):
            if self.max_steps is None:
                raise ValueError(
                    "data.streaming needs max_steps, because the number of rows is not known; learning rates and "
                    "progress depend on the number of steps"
                )
            if self.data.shuffle_buffer < self.batch_size:
                raise ValueError(
                    f"data.shuffle_buffer ({self.data.shuffle_buffer}) must be at least batch_size ({self.batch_size})"
                )
            if self.evaluation.every is not None and self.evaluation.data is None:
                raise ValueError("evaluation.every needs evaluation.data, because no rows of a stream are held out")
        return self


class SFTConfig(_SupervisedConfig):
    """Supervised fine-tuning: cross-entropy on the response only."""

    data: DemonstrationsConfig = Field(description="demonstrations to learn from")
    evaluation: SFTEvaluationConfig = Field(SFTEvaluationConfig(), description="evaluation on held-out rows")
    adapter: AdapterConfig | None = Field(None, description="settings of the trained adapter; if kind is full, the result is the new base; null uses the run's adapter settings")
    batch_size: PositiveInt = Field(16, description="sequences per optimizer step")
    overflow: Overflow = Field("cut", description="rows longer than max_length lose their end (cut), are dropped (drop), or stop the run (stop)")
    packing: bool = Field(True, description="packs several rows into one sequence to avoid padding; each row attends only to itself; false sorts rows into length buckets")


class RewardModelConfig(_SupervisedConfig):
    """Reward model: pairwise log-sigmoid loss on the score at the last token that is not padding."""

    data: PreferencesConfig = Field(description="preference pairs to learn from")
    evaluation: RewardModelEvaluationConfig = Field(RewardModelEvaluationConfig(), description="evaluation on held-out pairs")
    start: Literal["sft", "fresh"] = Field("sft", description="sft starts from a copy of the SFT adapter if there is one; fresh starts from a new adapter")
    adapter: AdapterConfig | None = Field(None, description="settings of the trained adapter; if kind is full, it starts from a copy of the base, and a LoRA adapter of SFT is merged into this copy; null uses the run's adapter settings")
    batch_size: PositiveInt = Field(32, description="pairs per optimizer step")
    overflow: Overflow = Field("cut", description="pairs longer than max_length lose the start of the prompt (cut), are dropped (drop), or stop the run (stop)")
    buckets: PositiveInt = Field(4, description="number of sequence lengths to which batches are padded; the update is compiled once for each length")
    center_rewards_coef: NonNegativeFloat = Field(0.01, description="weight of (chosen + rejected)^2, which keeps scores near 0")


class PretrainingConfig(Settings):
    """Data for the language-model loss of PPO-ptx: texts, or prompts with responses.

    This loss keeps the policy from unlearning these data.
    """

    data: Annotated[DemonstrationsConfig, AfterValidator(not_streamed)] = Field(description="rows to learn from")
    batch_size: PositiveInt = Field(8, description="sequences per optimizer step")
    max_length: PositiveInt = Field(512, description="longest sequence, in tokens; longer rows are cut")


class SuccessCurriculumConfig(Settings):
    """A curriculum by the policy's own success: prompts are drawn with weights p (1 - p), where p is the estimated probability that the policy solves the prompt."""

    solved_at: FiniteFloat = Field(1.0, description="a completion with at least this score solves its prompt")
    decay: UnitFloat = Field(0.9, description="at each draw of a prompt, its earlier counts are multiplied by this, because the policy changes")


class PPOStageConfig(Settings):
    """PPO: iterations of sampling, scoring and updating."""

    data: PromptsConfig | None = Field(None, description="prompts to sample completions for; with environment, the rows that reach its reset as options; null needs an environment, whose episodes then differ by their seeds alone")
    environment: EnvironmentConfig | None = Field(None, description="environment that answers the policy over several turns and gives the rewards (docs/environments.md); also module:function or path.py:function; null samples one completion per prompt")
    success_curriculum: SuccessCurriculumConfig | None = Field(None, description="draws prompts that the policy solves sometimes more often than those that it solves always or never (docs/data.md); null draws each prompt once in every pass")
    max_prompt_tokens: PositiveInt = Field(64, description="longest prompt, in tokens; shorter ones are padded on the left")
    overflow: Overflow = Field("stop", description="prompts longer than max_prompt_tokens lose their start (cut), are dropped (drop), or stop the run (stop)")
    iterations: PositiveInt = Field(100, description="number of iterations, each with one rollout and one update", json_schema_extra=LONGER)
    batch_size: PositiveInt = Field(64, description="prompts per rollout, each with sampling.samples_per_prompt completions")
    sampling: Sampling = Field(Sampling(), description="how completions are sampled")
    async_: Annotated[int, Field(ge=0, le=1)] = Field(0, alias="async", description="number of updates by which the policy that samples is behind: 1 samples the next iteration while an iteration is scored and learnt; importance weights correct the difference (update.importance_cap, by default 2 then); 0 samples with the latest policy (docs/overlap.md)")
    policy: FolderPath | None = Field(None, description="adapter folder (written by jaxrlhf or PEFT) from which the policy starts; null starts from the reference")
    reference: FolderPath | None = Field(None, description="adapter folder of the reference; null uses the SFT adapter, or the base if there is none")
    reward: RewardConfig | None = Field(ModelRewardConfig(), description="the reward to maximise; null if there is an environment, which gives the rewards")
    gold: FunctionPath | None = Field(None, description="function whose score is logged but never trained on, as module:function or path.py:function")
    score: ScoreConfig = Field(ScoreConfig(), description="how scores become rewards")
    resample: Annotated[int, Field(ge=0, le=1000)] = Field(0, description="largest number of additional rollouts per iteration; their groups replace groups with equal scores (dynamic sampling, 2503.14476); metrics are about the kept groups, except reward/drawn, which is about all groups")
    kl: KLConfig = Field(KLConfig(), description="penalty for the KL divergence from the reference")
    refresh_reference: PositiveInt | None = Field(None, description="the policy becomes the new reference each time after this number of iterations; null keeps the first reference")
    pretraining: PretrainingConfig | None = Field(None, description="data whose language-model loss is added to every optimizer step (PPO-ptx); null adds no such loss")
    advantage: AdvantageConfig = Field(AdvantageConfig(), description="how rewards become advantages")
    adapter: AdapterConfig | None = Field(None, description="settings of the policy's adapter; a policy that starts from a LoRA adapter keeps the rank of that LoRA adapter; if kind is full, the LoRA adapter is merged into a copy of the base; null uses the run's adapter settings")
    value_adapter: AdapterConfig | None = Field(None, description="settings of the value model's adapter; null uses the run's adapter settings")
    value_from: Literal["reward", "fresh"] = Field("reward", description="where the value model starts; reward starts from the reward adapter, if it has the same kind (its head is kept if the reward adapter is the only reward and score.normalise is none or initial, else the head is 0); fresh starts from a new adapter")
    update: PPOConfig = Field(PPOConfig(), description="the update of one iteration")
    save_every: PositiveInt = Field(10, description="iterations between checkpoints", json_schema_extra=CHOICE)
    sample_every: PositiveInt = Field(10, description="number of iterations between records of samples.jsonl; the first and the last iteration are always recorded", json_schema_extra=FREE)
    evaluation: PPOEvaluationConfig = Field(PPOEvaluationConfig(), description="evaluation on held-out prompts")
    early_stopping: ImprovementConfig | None = Field(None, description="ends the stage when a metric stops improving; null runs all iterations")

    @field_validator("environment", mode="before")
    @classmethod
    def _factory_alone(cls, environment: Any) -> Any:
        return {"factory": environment} if isinstance(environment, str) else environment

    @model_validator(mode="before")
    @classmethod
    def _rewards_of_environment(cls, section: Any) -> Any:
        """Sets `reward` to None if there is an environment and no reward is given."""
        if isinstance(section, dict) and section.get("environment") is not None and "reward" not in section:
            return section | {"reward": None}
        return section

    @model_validator(mode="after")
    def _origin_of_prompts_and_rewards(self) -> "PPOStageConfig":
        """Raises ValueError if prompts or rewards are missing, or come from two places."""
        if self.environment is None:
            if self.data is None:
                raise ValueError("data is missing; give prompts (data: {path: FILE}), or an environment")
            if self.reward is None:
                raise ValueError("reward is null, but only an environment gives rewards without it; give a reward")
        elif self.reward is not None:
            raise ValueError("reward and environment both give the rewards; leave reward out")
        elif self.data is None and self.evaluation.data is not None:
            raise ValueError("evaluation.data gives rows to the environment, but data is missing; give both, or neither")
        return self

    @property
    def response_tokens(self) -> int:
        """R: the largest number of tokens of a completion, or of an episode after its first observation."""
        environment, turn = self.environment, self.sampling.max_new_tokens
        if environment is None:
            return turn
        default = turn if environment.max_turns == 1 else 2 * environment.max_turns * turn
        return environment.max_episode_tokens or default

    @model_validator(mode="after")
    def _curriculum(self) -> "PPOStageConfig":
        """Raises ValueError if the curriculum by success does not fit other settings."""
        if self.success_curriculum is not None:
            if self.environment is not None:
                raise ValueError("success_curriculum orders prompts, but an environment makes its own; leave it out")
            if self.data.streaming:
                raise ValueError("success_curriculum needs all prompts in memory; leave data.streaming out")
            if any(source.curriculum is not None for source in (self.data, *self.data.mix_with)):
                raise ValueError("success_curriculum and data.curriculum both order the prompts; give one of them")
            if self.async_:
                raise ValueError("success_curriculum needs the scores before the next prompts are drawn; set async: 0")
        return self

    @model_validator(mode="before")
    @classmethod
    def _cap_if_behind(cls, section: Any) -> Any:
        """Sets `update.importance_cap` to `ASYNC_CAP` if `async` is 1 and `importance_cap` is not given."""
        if not isinstance(section, dict) or section.get("async") != 1:
            return section
        update = section.get("update", {})
        if isinstance(update, dict):
            return section | {"update": {"importance_cap": ASYNC_CAP} | update}
        if isinstance(update, PPOConfig) and "importance_cap" not in update.model_fields_set:
            return section | {"update": update.model_copy(update={"importance_cap": ASYNC_CAP})}
        return section

    @model_validator(mode="before")
    @classmethod
    def _kl_by_estimator(cls, section: Any) -> Any:
        """Sets `update.kl_loss` to k3 if the estimator is grpo and `kl_loss` is not given (see `PPOConfig.kl_loss`)."""
        if not isinstance(section, dict):
            return section
        advantage, update = section.get("advantage"), section.get("update", {})
        estimator = advantage.get("estimator") if isinstance(advantage, dict) else getattr(advantage, "estimator", None)
        if estimator != "grpo":
            return section
        if isinstance(update, dict):
            return section | {"update": {"kl_loss": "k3"} | update}
        if isinstance(update, PPOConfig) and update.kl_loss is None:
            return section | {"update": update.model_copy(update={"kl_loss": "k3"})}
        return section


class ProfileConfig(Settings):
    """Steps to record with jax's profiler, on devices and host, into profile/STAGE of the run directory."""

    steps: tuple[PositiveInt, ...] = Field(strict=False, min_length=2, max_length=2, description="first and last step to record, counted from 1; the first step after each start of the program compiles, and is recorded only if the first of these numbers is 1; otherwise the recording begins one step later", json_schema_extra=FREE)
    stage: Literal["sft", "reward_model", "ppo"] | None = Field(None, description="stage to record; null records these steps of every stage", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _ordered(self) -> "ProfileConfig":
        if self.steps[0] > self.steps[1]:
            raise ValueError(
                f"steps is {list(self.steps)}, but the first step must not be larger than the last; give the first "
                "step, then the last step"
            )
        return self


class RunConfig(Settings):
    """A run: its stages, model and directory."""

    run_dir: FolderPath = Field(description="directory of the run; the same command resumes it", json_schema_extra=FREE)
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random numbers")
    stages: tuple[Literal["sft", "reward_model", "ppo"], ...] = Field(("sft", "reward_model", "ppo"), strict=False, min_length=1, description="stages to run, in this order")
    model: ModelConfig = Field(description="the base model")
    mesh: MeshConfig = Field(MeshConfig(), description="number of devices along each mesh axis")
    adapter: AdapterConfig = Field(AdapterConfig(), description="default settings of the adapters of every stage; kind full trains the full model instead of a LoRA adapter")
    sft: SFTConfig | None = Field(None, description="settings of the sft stage")
    reward_model: RewardModelConfig | None = Field(None, description="settings of the reward_model stage")
    ppo: PPOStageConfig | None = Field(None, description="settings of the ppo stage")
    compilation_cache: CachePath | None = Field("auto", description="folder in which compiled programs are cached between starts; auto is JAX_COMPILATION_CACHE_DIR, or jaxrlhf/xla in the user's cache folder; null disables the cache", json_schema_extra=FREE)
    compiler_options: dict[str, Any] = Field({}, description=f"XLA options by program, such as {{update: {{xla_gpu_triton_gemm_any: true}}}}; programs are {', '.join(PROGRAMS)}", json_schema_extra=ROUNDING)
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description="which checkpoints are kept, and which one is the result of a stage")
    health: HealthConfig = Field(HealthConfig(), description="when to stop a run that no longer learns")
    report: bool = Field(True, description="writes report.html in the run directory at checkpoints (at most once a minute) and at the end of the run", json_schema_extra=FREE)
    alarms: tuple[Alarm, ...] = Field(("ppo",), strict=False, description="alarms on metrics; ppo is the shipped set (docs/alarms.md); [] disables all", json_schema_extra=FREE)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field((), strict=False, description="services that also get metrics, settings and samples (docs/trackers.md)", json_schema_extra=FREE)
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(None, description="port on which process 0 serves the latest metrics to Prometheus; null opens no port", json_schema_extra=FREE)
    profile: ProfileConfig | None = Field(None, description="steps to record with jax's profiler; null records nothing", json_schema_extra=FREE)

    @field_validator("compiler_options")
    @classmethod
    def _options_of_programs(cls, options: dict[str, Any]) -> dict[str, Any]:
        for program, of_program in options.items():
            if program not in PROGRAMS:
                near = difflib.get_close_matches(program, PROGRAMS, n=1)
                known = f"did you mean {near[0]}?" if near else f"programs are {', '.join(PROGRAMS)}"
                raise ValueError(f"there is no program {program}; {known}")
            if not isinstance(of_program, dict):
                raise ValueError(
                    f"{program} must be a mapping of option names, such as {{xla_gpu_triton_gemm_any: true}}"
                )
            for option, value in of_program.items():
                if not isinstance(value, bool | int | float | str):
                    raise ValueError(f"{program}.{option} must be true, false, a number or text")
        return options

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names {name} twice; give each tracker once")
        return names

    @model_validator(mode="after")
    def _sections(self) -> "RunConfig":
        for stage in self.stages:
            if getattr(self, stage) is None:
                raise ValueError(
                    f"stages names {stage}, but the section {stage} is missing; add the section, or leave {stage} out "
                    "of stages"
                )
        if list(self.stages) != [s for s in ("sft", "reward_model", "ppo") if s in self.stages]:
            raise ValueError(
                f"stages must be in the order sft, reward_model, ppo, each at most once, not {list(self.stages)}"
            )
        return self

    def adapter_or(self, own: AdapterConfig | None) -> AdapterConfig:
        """Returns a stage's own adapter settings, or else the default adapter settings of the run."""
        return self.adapter if own is None else own

    @property
    def sft_trains_base(self) -> bool:
        """Whether the sft stage is a full fine-tune, whose result is the new base."""
        return self.sft is not None and "sft" in self.stages and self.adapter_or(self.sft.adapter).kind == "full"
