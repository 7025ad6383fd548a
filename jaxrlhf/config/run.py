"""A whole run: the model, the mesh, and one section per stage."""

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxrlhf.config.base import (
    CHOICE,
    FREE,
    LONGER,
    REMAT,
    ROUNDING,
    NonNegativeFloat,
    NonNegativeInt,
    Overflow,
    PositiveFloat,
    PositiveInt,
    Remat,
    Settings,
)
from jaxrlhf.config.data import DemonstrationsConfig, PreferencesConfig, PromptsConfig
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

# What `compiler_options` may name: the programs that runs compile, each under the name that it is made with.
PROGRAMS = (
    "all", "rollout", "rollout_greedy", "merge", "annotate", "experience", "update", "reward", "sft_update",
    "sft_evaluate", "reward_model_update", "pair_scores",
)  # fmt: skip


class NewModelConfig(Settings):
    """A decoder from random weights, in place of a pretrained one."""

    vocabulary: Literal["assistant"] = Field("assistant", description="whose words the tokenizer knows: the builtin assistant world's")
    hidden_size: PositiveInt = Field(128, description="width of the residual stream")
    layers: PositiveInt = Field(3, description="number of blocks")
    heads: PositiveInt = Field(4, description="query heads")
    kv_heads: PositiveInt = Field(2, description="key and value heads")
    intermediate_size: PositiveInt = Field(384, description="width of the MLP")
    max_positions: PositiveInt = Field(512, description="longest sequence")

    @model_validator(mode="after")
    def _divisible(self) -> "NewModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads})")
        return self


class ModelConfig(Settings):
    """The base: exactly one of path, run and new."""

    path: str | None = Field(None, description="Hugging Face folder or hub id")
    run: str | None = Field(None, description="directory of a finished run: its base, tokenizer and adapters")
    new: NewModelConfig | None = Field(None, description="make a new decoder from random weights")
    tokenizer: str | None = Field(None, description="tokenizer folder or hub id; null: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the base in memory; auto: that of the checkpoint's tensors, float32 for a new model")
    attention: Literal["xla", "cudnn"] = Field("xla", description="what computes attention over whole sequences; cudnn: fused, on NVIDIA GPUs, in bfloat16 or float16", json_schema_extra=ROUNDING)
    matmul_precision: Literal["highest", "tf32"] = Field("highest", description="float32 products on NVIDIA GPUs, of every program; highest: float32, which a ratio of 1 in the first minibatch takes; tf32: faster, of numbers with 10 bits of mantissa. A base in bfloat16 or float16 leaves few of them: scalar heads, and LoRA pairs on lm_head. No matter on a CPU", json_schema_extra=ROUNDING)
    quantize: Literal["int8", "nf4"] | None = Field(None, description="keep the base's linear layers as 8-bit or 4-bit codes, under LoRA adapters; null: no, or as in run")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        given = [name for name in ("path", "run", "new") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, run, new; given: {', '.join(given) or 'none'}")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError("attention is cudnn, which takes no float32; give dtype bfloat16 or float16, or attention xla")
        if self.quantize is not None and self.new is not None:
            raise ValueError("quantize is for a base that stays as it is; one made with new is to be trained whole")
        return self


class MeshConfig(Settings):
    """Devices along each axis; -1 takes what is left."""

    data: int = Field(-1, ge=-1, description="copies of the base, each with its share of the batch", json_schema_extra=FREE)
    fsdp: int = Field(1, ge=-1, description="base split by rows, gathered layer by layer; batch split too", json_schema_extra=FREE)
    tensor: int = Field(1, ge=-1, description="layers split by heads and MLP width", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _one_filler(self) -> "MeshConfig":
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"axes are at least 1, and one of them may be -1; given {sizes}")
        return self


class CheckpointsConfig(Settings):
    """What is kept of a run while it goes, for each stage; may change when a run is continued, but for result."""

    keep: PositiveInt = Field(2, description="newest checkpoints that are kept", json_schema_extra=FREE)
    best: str | None = Field(None, description="metric whose best checkpoint is kept as well, such as reward/gold; null: none", json_schema_extra=CHOICE)
    best_is: Literal["highest", "lowest"] = Field("highest", description="which value of best is the best", json_schema_extra=CHOICE)
    result: Literal["last", "best"] = Field("last", description="which weights a stage with that metric hands on: of its last step, or of its best checkpoint")
    grace: PositiveFloat = Field(60.0, description="seconds after SIGTERM, SIGHUP or Ctrl-C in which the step under way may end and be saved", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _of_something(self) -> "CheckpointsConfig":
        if self.result == "best" and self.best is None:
            raise ValueError("result is best, but best names no metric; give one, such as best: reward/gold")
        return self


class HealthConfig(Settings):
    """When a run is not learning any more. A step whose loss or gradient is not finite changes nothing, and is counted."""

    patience: PositiveInt = Field(10, description="steps in a row that were not learnt from stop the run, with the last one's batch saved", json_schema_extra=FREE)
    max_kl: PositiveFloat | None = Field(None, description="a PPO iteration whose KL to the reference, nats per answer, is above this is not learnt from; null: no limit")
    max_length: PositiveFloat | None = Field(None, description="the same for tokens per answer, on average; null: no limit")


class SFTConfig(Settings):
    """Supervised fine-tuning: cross-entropy on the response only."""

    data: DemonstrationsConfig = Field(description="rows to imitate")
    heldout: NonNegativeInt = Field(64, description="rows kept aside to measure the loss on; at most a tenth of all")
    adapter: AdapterConfig | None = Field(None, description="what is trained; full: the result is the new base; null: the run's adapter")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer")
    epochs: PositiveInt = Field(1, description="passes over the rows")
    batch_size: PositiveInt = Field(16, description="sequences per optimizer step")
    microbatch_size: PositiveInt | None = Field(None, description="sequences per forward and backward pass; null: batch_size")
    max_length: PositiveInt = Field(512, description="tokens per sequence")
    overflow: Overflow = Field("cut", description="rows longer than max_length: cut their end, drop them, or stop")
    packing: bool = Field(True, description="several rows share a sequence, each attending to itself; false: length buckets")
    remat: Remat = Field("dots", description=REMAT, json_schema_extra=ROUNDING)
    save_every: PositiveInt = Field(100, description="steps between checkpoints", json_schema_extra=CHOICE)


class RewardModelConfig(Settings):
    """Reward model: pairwise log-sigmoid on the score at the last real token."""

    data: PreferencesConfig = Field(description="pairs to learn from")
    test_data: PreferencesConfig | None = Field(None, description="pairs to measure accuracy on; null: hold some out")
    heldout: PositiveInt = Field(128, description="pairs held out where test_data is null; at most a tenth of all")
    start: Literal["sft", "fresh"] = Field("sft", description="sft: start from a copy of the SFT adapter, if any; fresh: a new adapter")
    adapter: AdapterConfig | None = Field(None, description="what is trained; started from a LoRA adapter of SFT, full is a copy of base and adapter; null: the run's adapter")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer")
    epochs: PositiveInt = Field(1, description="passes over the pairs")
    batch_size: PositiveInt = Field(32, description="pairs per optimizer step")
    microbatch_size: PositiveInt | None = Field(None, description="pairs per forward and backward pass; null: batch_size")
    max_length: PositiveInt = Field(512, description="tokens per sequence")
    overflow: Overflow = Field("cut", description="sequences longer than max_length: cut the prompt's start, drop the pair, or stop")
    buckets: PositiveInt = Field(4, description="sequence lengths that batches are padded to, each compiled once")
    center_rewards_coef: NonNegativeFloat = Field(0.01, description="weight of (chosen + rejected)^2, which keeps scores around 0")
    remat: Remat = Field("dots", description=REMAT, json_schema_extra=ROUNDING)
    save_every: PositiveInt = Field(100, description="steps between checkpoints", json_schema_extra=CHOICE)


class PretrainingConfig(Settings):
    """The language-model mix of PPO-ptx: texts, or prompts with responses, that the policy is not to unlearn."""

    data: DemonstrationsConfig = Field(description="rows to imitate")
    batch_size: PositiveInt = Field(8, description="sequences per optimizer step")
    max_length: PositiveInt = Field(512, description="tokens per sequence; longer rows are cut")


class PPOStageConfig(Settings):
    """PPO: sample, score, update, again."""

    data: PromptsConfig = Field(description="prompts to answer")
    max_prompt_tokens: PositiveInt = Field(64, description="prompts are padded on the left to this length")
    overflow: Overflow = Field("stop", description="longer prompts: cut their start, drop them, or stop")
    iterations: PositiveInt = Field(100, description="rollouts", json_schema_extra=LONGER)
    batch_size: PositiveInt = Field(64, description="prompts per rollout; times sampling.samples_per_prompt answers")
    sampling: Sampling = Field(Sampling(), description="how answers are sampled")
    policy: str | None = Field(None, description="adapter folder (ours or PEFT's) that the policy starts from; null: the reference")
    reference: str | None = Field(None, description="adapter folder of the reference; null: the SFT adapter, else the base")
    reward: RewardConfig = Field(ModelRewardConfig(), description="the reward that is maximised")
    gold: str | None = Field(None, description="function that is measured but never trained on: module:function or path.py:function")
    score: ScoreConfig = Field(ScoreConfig(), description="what becomes of a score before it is a reward")
    resample: NonNegativeInt = Field(0, description="dynamic sampling (2503.14476): groups with equal scores give way to groups of further prompts, in at most so many more rollouts an iteration; metrics are of the groups kept, reward/drawn is of all")
    kl: KLConfig = Field(KLConfig(), description="penalty for leaving the reference")
    refresh_reference: PositiveInt | None = Field(None, description="the policy becomes the reference after every so many iterations; null: never")
    pretraining: PretrainingConfig | None = Field(None, description="rows whose language-model loss is part of every optimizer step (PPO-ptx); null: none")
    advantage: AdvantageConfig = Field(AdvantageConfig(), description="how rewards become advantages")
    adapter: AdapterConfig | None = Field(None, description="the policy's; a start from a LoRA adapter keeps that one's rank, or for full is merged into a copy of the base; null: the run's adapter")
    value_adapter: AdapterConfig | None = Field(None, description="the value model's, as adapter; null: the run's adapter")
    value_from: Literal["reward", "fresh"] = Field("reward", description="reward: start from the reward adapter, if any, of the same kind: with its head where it alone is the reward, score.normalise none or initial, else from its trunk with a head of 0; fresh: a new adapter")
    update: PPOConfig = Field(PPOConfig(), description="the update of one iteration")
    save_every: PositiveInt = Field(10, description="iterations between checkpoints", json_schema_extra=CHOICE)
    sample_every: PositiveInt = Field(10, description="iterations between samples written to samples.jsonl", json_schema_extra=FREE)
    evaluation_data: PromptsConfig | None = Field(None, description="held-out prompts for the final table; null: of data")
    evaluation_prompts: PositiveInt = Field(128, description="prompts for the final table, before and after training; taken in turn")

    @model_validator(mode="before")
    @classmethod
    def _kl_by_estimator(cls, given: Any) -> Any:
        """With GRPO the KL stands in the loss where the settings do not say (`PPOConfig.kl_loss`)."""
        if not isinstance(given, dict):
            return given
        advantage, update = given.get("advantage"), given.get("update", {})
        estimator = advantage.get("estimator") if isinstance(advantage, dict) else getattr(advantage, "estimator", None)
        if estimator != "grpo":
            return given
        if isinstance(update, dict):
            return given | {"update": {"kl_loss": "k3"} | update}
        if isinstance(update, PPOConfig) and update.kl_loss is None:
            return given | {"update": update.model_copy(update={"kl_loss": "k3"})}
        return given


class RunConfig(Settings):
    """A whole run: which stages, on which model, into which directory."""

    run_dir: str = Field(description="directory of the run; the same command continues it", json_schema_extra=FREE)
    seed: int = Field(0, ge=0, lt=2**32, description="the one seed")
    stages: tuple[Literal["sft", "reward_model", "ppo"], ...] = Field(
        ("sft", "reward_model", "ppo"), strict=False, min_length=1, description="stages in order"
    )
    model: ModelConfig = Field(description="the base model")
    mesh: MeshConfig = Field(MeshConfig(), description="devices along each axis")
    adapter: AdapterConfig = Field(AdapterConfig(), description="what every stage trains that does not say otherwise: LoRA, or with kind full the whole model, for policy, value and reward")
    sft: SFTConfig | None = Field(None, description="settings of the sft stage")
    reward_model: RewardModelConfig | None = Field(None, description="settings of the reward_model stage")
    ppo: PPOStageConfig | None = Field(None, description="settings of the ppo stage")
    compilation_cache: str | None = Field("auto", min_length=1, description="folder where compiled programs are kept for the next start; auto: JAX_COMPILATION_CACHE_DIR, else jaxrlhf/xla in the user's cache folder; null: nowhere", json_schema_extra=FREE)
    compiler_options: dict[str, Any] = Field({}, description=f"program -> option of XLA -> value, such as {{update: {{xla_gpu_triton_gemm_any: true}}}}; programs: {', '.join(PROGRAMS)}", json_schema_extra=ROUNDING)
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description="what is kept of the run while it goes")
    health: HealthConfig = Field(HealthConfig(), description="when a run is not learning any more")

    @field_validator("compiler_options")
    @classmethod
    def _options_of_programs(cls, given: dict[str, Any]) -> dict[str, Any]:
        for program, options in given.items():
            if program not in PROGRAMS:
                near = difflib.get_close_matches(program, PROGRAMS, n=1)
                known = f"the nearest is {near[0]}" if near else f"known ones: {', '.join(PROGRAMS)}"
                raise ValueError(f"there is no program {program}; {known}")
            if not isinstance(options, dict):
                raise ValueError(f"{program} takes options by name, such as {{xla_gpu_triton_gemm_any: true}}")
            for option, value in options.items():
                if not isinstance(value, bool | int | float | str):
                    raise ValueError(f"{program}.{option} must be true, false, a number or text")
        return given

    @model_validator(mode="after")
    def _sections(self) -> "RunConfig":
        for stage in self.stages:
            if getattr(self, stage) is None:
                raise ValueError(f"stages names {stage}, but there is no section {stage}")
        order = [s for s in ("sft", "reward_model", "ppo") if s in self.stages]
        if list(self.stages) != order:
            raise ValueError(f"stages run in the order sft, reward_model, ppo, each once; given {list(self.stages)}")
        return self

    def adapter_or(self, own: AdapterConfig | None) -> AdapterConfig:
        """A stage's own adapter settings, or the run's where it has none."""
        return self.adapter if own is None else own

    @property
    def sft_trains_base(self) -> bool:
        """Whether the sft stage trains the whole model: its result is then the base."""
        return self.sft is not None and "sft" in self.stages and self.adapter_or(self.sft.adapter).kind == "full"
