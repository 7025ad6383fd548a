"""Settings of the step functions.

`records.py` registers the sections as pytrees. Fields that `number` makes are traced. Nested sections are also pytrees.
All other fields are static.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from jaxrlhf.config.base import (
    ROUNDING,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Remat,
    Settings,
    UnitFloat,
    number,
)
from jaxrlhf.config.evaluation import PlateauConfig


class AdapterConfig(Settings):
    """The trainable part on top of the frozen base."""

    kind: Literal["lora", "full"] = Field("lora", description="lora trains low-rank pairs of matrices; full trains a copy of every weight")
    rank: PositiveInt = Field(16, description="rank of each LoRA pair")
    alpha: PositiveFloat = Field(32.0, description="scale of LoRA: the product of each LoRA pair is multiplied by alpha / rank")
    rank_stabilised: bool = Field(False, description="multiplies the product of each LoRA pair by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, 2312.03732), so that higher ranks do not learn more slowly")
    target_modules: tuple[str, ...] = Field(("all-linear",), strict=False, min_length=1, description="modules that get a LoRA pair, given by last name (such as q_proj) or by path; all-linear means every linear layer of every block")


class Sampling(Settings):
    """How completions are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="longest completion, in tokens")
    temperature: NonNegativeFloat = number(1.0, "divides the logits in sampling and in training; 0 means greedy decoding")
    top_k: NonNegativeInt = Field(0, description="samples from the k most likely tokens; 0 disables it")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = number(None, "samples from the most likely tokens that together have about this probability, see top_p_rule; null disables it")
    top_p_rule: Literal["reach", "within"] = Field("reach", description="reach keeps the smallest number of most likely tokens whose total probability is at least top_p, like Hugging Face and vLLM; within keeps the largest number whose total probability is at most top_p, but at least one token, like openai/lm-human-preferences")
    min_p: UnitFloat | None = number(None, "samples from tokens that have at least min_p times the probability of the most likely token; null disables it")
    choices: tuple[str, ...] | None = Field(None, strict=False, min_length=2, description="restricts a completion to exactly one of these texts, such as labels; each is tokenized as a response in SFT, and a stop token follows; at each position the probabilities are those of the tokens that may follow, in sampling, scoring and training alike (docs/choices.md); top_k, top_p and min_p then remove some of these tokens; null allows every text")
    stop_tokens: tuple[int, ...] | None = Field(None, strict=False, description="token ids that end a completion; null means the stop tokens of the model, the tokenizer and the chat template")
    pad_token: NonNegativeInt | None = Field(None, description="token id that fills rows after the end of a completion; null means the model's pad token")
    samples_per_prompt: PositiveInt = Field(1, description="completions per prompt (a group), sampled after one prefill")
    slots: PositiveInt | None = Field(None, description="number of completions that decode at the same time, on all devices together; a completion that ends is replaced by the next one, so the memory of the caches does not grow with the batch; null decodes the whole batch at the same time", json_schema_extra=ROUNDING)
    prefill_chunk: PositiveInt | None = Field(None, description="number of prompt tokens that are read at a time before decoding; bounds the memory of activations when prompts are long, such as 2048 for prompts of 16384 tokens; null reads whole prompts", json_schema_extra=ROUNDING)
    merge_adapter: bool = Field(False, description="merges LoRA pairs of a 16-bit base into copies of its kernels for the time of a rollout; decoding is faster, because it has no products with pairs; the copies take as much memory as the kernels, and their rounding makes the sampled policy differ from the trained one (see gap/logprob_max); float32 kernels are always merged, quantized kernels never")

    @field_validator("choices", mode="before")
    @classmethod
    def _different_texts(cls, choices: Any) -> Any:
        for choice in choices if isinstance(choices, list | tuple) else ():
            if not isinstance(choice, str):
                raise ValueError(f"{choice!r} is not text; put it in quotes, as in '{choice}'")
            if not choice.strip():
                raise ValueError(f"the choice {choice!r} is empty; give some text")
            if choices.count(choice) > 1:
                raise ValueError(f"the choice {choice!r} is given more than once; give each choice once")
        return choices


class LearningRates(NamedTuple):
    """Default learning rates of a role."""

    full: float  # if every weight is trained, in a model of width `RATED_WIDTH` or more
    lora: float  # if LoRA pairs or only a scalar head are trained


# A step of Adam changes every weight by about the learning rate. So the output of a layer changes in proportion to the
# number of its inputs, and rates for small models are too large for large models. Full fine-tunes have the rates of
# TRL, OpenRLHF and verl. LoRA has rates that are at least 10 times as large, because wide models have a smaller lora_a.
# The guides of these libraries recommend the same. See docs/defaults.md.
LEARNING_RATES = {
    "sft": LearningRates(full=2e-5, lora=2e-4),
    "reward_model": LearningRates(full=1e-5, lora=1e-4),
    "policy": LearningRates(full=1e-6, lora=2e-5),
    "value": LearningRates(full=1e-5, lora=1e-4),
}


RATED_WIDTH = 896  # width of a 0.5B model; the rates suit this width and more; smaller widths get more (2203.03466)


class OptimizerConfig(Settings):
    """AdamW as in PyTorch, with a schedule and gradient clipping."""

    learning_rate: NonNegativeFloat | None = number(None, "peak learning rate; null means a default for LoRA or for a full fine-tune: sft 2e-4 or 2e-5, reward_model 1e-4 or 1e-5, policy 2e-5 or 1e-6, value model 1e-4 or 1e-5; a full fine-tune of a model with a width below 896 gets a proportionally higher rate")
    schedule: Literal["constant", "linear", "cosine", "plateau"] = Field("constant", description="learning rate after warm-up: constant, decreasing to 0 at the last step along a line or a cosine, or lowered when a metric stops improving (plateau)")
    plateau: PlateauConfig | None = Field(None, description="the metric of schedule plateau, and how the rate is lowered; the stages of a run do this, a loop of your own sets learning_rate")
    warmup_steps: NonNegativeInt = number(0, "number of optimizer steps of linear warm-up")
    total_steps: PositiveInt | None = number(None, "number of optimizer steps until the learning rate reaches 0; null means all optimizer steps of the stage")
    weight_decay: NonNegativeFloat = number(0.0, "decoupled weight decay of matrices")
    max_grad_norm: PositiveFloat = number(1.0, "largest global norm of the gradient; a larger gradient is scaled down to this norm")
    beta1: float = number(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta2: float = number(0.999, "Adam's decay of the second moment", ge=0, lt=1)
    epsilon: PositiveFloat = number(1e-8, "Adam's epsilon, added outside the root; typical gradients are about 1e-6 at 8B parameters, and the default is far below")

    @model_validator(mode="after")
    def _plateau(self) -> "OptimizerConfig":
        if (self.schedule == "plateau") != (self.plateau is not None):
            raise ValueError("schedule: plateau and the section plateau belong together: give both, such as plateau: {metric: evaluation/sft/loss, mode: lowest}, or neither")
        return self


# Defaults that depend on the loss. gspo has the bounds of its paper (2507.18071), because its mean over tokens keeps
# ratios near 1. cispo has no lower bound (2506.13585), and weights up to 5 as in ScaleRL (2510.13786). The gradient of
# pg is unbiased only on samples of the current policy, so pg makes one step per iteration.
BY_LOSS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "pg": {"epochs": 1, "minibatches": 1},
}


class PPOConfig(Settings):
    """The update of one iteration: PPO (1707.06347) as applied to language models (2403.17031)."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="number of passes over the completions of an iteration; with more than 1, large models leave the clip range")
    minibatches: PositiveInt | None = Field(None, description="number of minibatches (optimizer steps) per pass; null means the largest number up to 4 that divides the number of completions")
    microbatch_size: PositiveInt | None = Field(None, description="rows per forward and backward pass, and per pass that computes logprobs and values; null means a full minibatch; smaller values save memory")
    loss: Literal["clip", "gspo", "cispo", "pg"] = Field("clip", description="policy loss: PPO's clipped surrogate (clip), one ratio per completion (gspo), clipped weights (cispo), or plain policy gradient with one step per iteration (pg)")
    clip_low: NonNegativeFloat = number(0.2, "clips the ratio below 1 - clip_low; the default is 3e-4 for gspo; for cispo it is 1, which means no bound")
    clip_high: NonNegativeFloat = number(0.2, "clips the ratio above 1 + clip_high; the default is 4e-4 for gspo and 4 for cispo")
    dual_clip: Annotated[float, Field(gt=1)] | None = number(None, "limits the loss of a token with a negative advantage to dual_clip times the size of the advantage; null disables this limit")
    importance_cap: PositiveFloat | None = number(None, "upper limit of the importance weights that correct the gap between sampling and training logprobs; null uses no weights; if ppo.async is 1, the default is 2")
    importance_level: Literal["token", "sequence"] = Field("token", description="one importance weight per token or per completion")
    kl_loss: Literal["k1", "k2", "k3"] | None = Field(None, description="estimator of a KL term in the loss with weight kl.coef; k2 and k3 are better than k1, because the gradient of k1 is 0 in expectation; null puts the KL into the reward, with kl.estimator; if advantage.estimator is grpo, the default is k3: GRPO divides by the deviation of a group, and if the KL is in the reward, a group with equal scores learns only from the KL")
    mask_truncated: bool = Field(False, description="excludes truncated completions (without a stop token) from all losses, the entropy bonus and whitening, because a truncated completion is neither right nor wrong (overlong filtering, 2503.14476); the baselines of groups still include them")
    kl_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = number(10.0, "largest slope of one token's KL estimate, in loss, reward and metrics; at the default, k2 beyond |r| = 10 and k3 beyond r = log(11) continue as straight lines, so that one token far from the reference cannot outweigh a batch (verl and OpenRLHF clip the estimate at 10); null means no bound")
    log_ratio_bound: PositiveFloat | None = number(20.0, "clips log-ratios of policies to +- this value before exp, in losses, importance weights and metrics (20 as in verl); null means no bound; then a ratio may be infinite, and its step is skipped")
    value_clip: NonNegativeFloat = number(0.5, "clips values to the old values +- this number, in the scale of the scores, so that an iteration changes values at most this much")
    value_coef: NonNegativeFloat = number(0.1, "weight of the value loss")
    value_trunk: Literal["own", "policy"] = Field("own", description="own gives the value model a separate adapter; policy makes the value model a head on the policy's trunk, with one forward pass for both")
    value_warmup: NonNegativeInt = Field(0, description="number of iterations at the start that train only the value model")
    kl_stop: PositiveFloat | None = number(None, "largest approximate KL to the old policy, in nats per token; a minibatch with a larger KL and all later minibatches of the iteration are skipped; skipped steps do not advance schedules; null means no limit")
    pretraining_coef: NonNegativeFloat = number(1.0, "weight of the language-model loss on the rows of ppo.pretraining (PPO-ptx, 2203.02155)")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = number(None, "keeps a moving average of the policy's adapter; at each optimizer step the old average has this weight, and the policy the rest; null keeps no average")
    entropy_coef: NonNegativeFloat = number(0.0, "weight of the entropy bonus")
    aggregation: Literal["token", "sequence", "constant"] = Field("token", description="aggregation of the loss: mean over tokens (token), mean of the completions' means (sequence), or sum over response length x rows (constant)")
    packed: bool = Field(False, description="lays rows of unequal length side by side, in the update and in the passes that compute logprobs and values; each row attends only to itself; short rows then take fewer passes, each with the space of at most microbatch_size padded rows; false pads every row to full length", json_schema_extra=ROUNDING)
    remat: Remat = "dots"
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the policy")
    value_optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the value model")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_loss(cls, section: Any) -> Any:
        loss = section.get("loss") if isinstance(section, dict) else None
        return BY_LOSS.get(loss, {}) | section if isinstance(loss, str) else section


class ScoreConfig(Settings):
    """How scores become rewards. Scores are normalised, and then penalties in the normalised scale are subtracted."""

    normalise: Literal["none", "initial", "running", "batch"] = Field("none", description="scales scores to mean 0 and deviation 1; mean and deviation are those of the scores of completions before the first iteration (initial, 1909.08593), of all scores so far (running), or of the scores of the iteration (batch, whitening)")
    initial_completions: Annotated[int, Field(ge=1, le=1_000_000)] = Field(256, description="with normalise initial, the smallest number of completions from which mean and deviation are computed")
    clip: PositiveFloat | None = number(None, "clips normalised scores to +- this value; null disables clipping")
    missing_eos: Literal["subtract", "replace"] = Field("subtract", description="for completions that did not end: subtract subtracts missing_eos_penalty from the score; replace makes the score -missing_eos_penalty")
    missing_eos_penalty: NonNegativeFloat = number(0.0, "penalty for completions that did not end, see missing_eos")
    length_penalty: NonNegativeFloat = number(0.0, "subtracted from the score for each token beyond length_free")
    length_free: NonNegativeInt = number(0, "number of tokens without length_penalty")
    overlong_penalty: NonNegativeFloat = number(0.0, "subtracted from the score of a completion of max_new_tokens tokens; over the overlong_buffer tokens before, the penalty rises from 0 (2503.14476, equation 13)")
    overlong_buffer: NonNegativeInt = number(0, "tokens before max_new_tokens over which overlong_penalty rises")

    @model_validator(mode="after")
    def _complete(self) -> "ScoreConfig":
        if bool(self.overlong_penalty) != bool(self.overlong_buffer):
            raise ValueError("overlong_penalty and overlong_buffer belong together; give both, or neither")
        if self.length_free and not self.length_penalty:
            raise ValueError("length_free has no effect without length_penalty; give both, or neither")
        return self


class KLConfig(Settings):
    """The penalty for the KL divergence from the reference, and its adaptive coefficient (1909.08593, section 2.2)."""

    coef: NonNegativeFloat = number(0.05, "initial weight of the per-token KL in the reward")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator, with r = ref - policy: -r (k1), r^2/2 (k2), or exp(r)-1-r (k3)")
    target: PositiveFloat | None = number(None, "KL per completion, in nats, that the adaptive coefficient should reach; null keeps the coefficient fixed")
    horizon: PositiveInt = number(10000, "number of completions over which the coefficient adapts")


class AdvantageConfig(Settings):
    """How rewards become advantages."""

    estimator: Literal[
        "gae", "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"
    ] = Field("gae", description="advantage estimator; rloo, grpo, dr_grpo and reinforce_plus_plus_baseline compare the completions of a prompt, see sampling.samples_per_prompt; only gae has a value model")
    gamma: UnitFloat = number(1.0, "discount, see gamma_per")
    gamma_per: Literal["token", "turn"] = Field("token", description="whether gamma discounts at each token, or at the last token of each turn of an episode with ppo.environment")
    lam: UnitFloat = number(1.0, "lambda of generalised advantage estimation; if lambda is below 1, a final score reaches the first tokens of a long completion only through the value model, because 0.95^320 is 7e-8")
    whiten_rewards: bool = Field(False, description="with gae, scales rewards to deviation 1 over the global batch before estimation")
    whiten_advantages: bool | None = Field(None, description="scales advantages to mean 0 and deviation 1 over the global batch; null means true for gae and reinforce, else false")
