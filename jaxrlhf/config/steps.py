"""What the step functions take.

Fields made with `number` are traced (changing one compiles nothing), nested sections are trees of their own, and
everything else is structure (static): `records.py` registers the sections as pytrees so.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from jaxrlhf.config.base import (
    REMAT,
    ROUNDING,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Remat,
    Settings,
    UnitFloat,
    names,
    number,
)


class AdapterConfig(Settings):
    """What is trained on top of the frozen base."""

    kind: Literal["lora", "full"] = Field("lora", description="lora: low-rank pairs; full: a copy of every weight")
    rank: PositiveInt = Field(16, description="rank of each LoRA pair")
    alpha: PositiveFloat = Field(32.0, description="LoRA scale: the pair's product is multiplied by alpha / rank")
    rank_stabilised: bool = Field(False, description="alpha / sqrt(rank) instead (rsLoRA, 2312.03732): higher ranks do not learn slower")
    target_modules: tuple[str, ...] = names(
        ("all-linear",), "modules with a LoRA pair, by last name (q_proj, ...) or path; all-linear: every layer's", min_length=1
    )


class Sampling(Settings):
    """How answers are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="tokens sampled per prompt at most")
    temperature: NonNegativeFloat = number(1.0, "divides the logits, in training too; 0: greedy")
    top_k: NonNegativeInt = Field(0, description="keep the k most likely tokens; 0: off")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = number(
        None, "keep the likeliest tokens that together have this probability, see top_p_rule; null: off"
    )
    top_p_rule: Literal["reach", "within"] = Field(
        "reach", description="reach: the fewest tokens with at least top_p, as Hugging Face and vLLM count; within: the most with at most top_p, always one, as openai/lm-human-preferences does"
    )
    min_p: UnitFloat | None = number(
        None, "keep tokens at least this likely relative to the most likely; null: off"
    )
    stop_tokens: tuple[int, ...] | None = Field(
        None, strict=False, description="token ids that end an answer; null: all that model, tokenizer and chat template name"
    )
    pad_token: NonNegativeInt | None = Field(None, description="token id after the end; null: the model's own")
    samples_per_prompt: PositiveInt = Field(1, description="answers to each prompt: a group, from one prefill")
    max_compactions: NonNegativeInt = Field(
        4, description="how often the rows that decoding computes are halved as answers end; each compiles the step once more; 0: off", json_schema_extra=ROUNDING
    )


class LearningRates(NamedTuple):
    """Learning rates by what is trained."""

    full: float  # every weight, of a model of width `RATED_WIDTH` or more
    lora: float  # low-rank pairs, or a scalar head alone: the base under them stays as it is


# Adam's step is about as large as the learning rate in every weight, so what a layer's output moves by grows with its
# inputs: rates that carry small models break large ones. Whole models at the rates of TRL, OpenRLHF and verl; LoRA, whose
# lora_a shrinks with the width, at 10 times as much or more, as their guides say. docs/defaults.md has the sources.
LEARNING_RATES = {
    "sft": LearningRates(full=2e-5, lora=2e-4),
    "reward_model": LearningRates(full=1e-5, lora=1e-4),
    "policy": LearningRates(full=1e-6, lora=2e-5),
    "value": LearningRates(full=1e-5, lora=1e-4),
}


RATED_WIDTH = 896  # of the least of the models that the rates are for, 0.5B; narrower ones get more (2203.03466)


class OptimizerConfig(Settings):
    """AdamW as PyTorch computes it, with a schedule and a clipped gradient norm."""

    learning_rate: NonNegativeFloat | None = number(
        None, "peak learning rate; null, for LoRA and for whole models: sft 2e-4 and 2e-5, reward_model 1e-4 and 1e-5, policy 2e-5 and 1e-6, value model 1e-4 and 1e-5; whole models narrower than 896 in proportion more"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up: constant, or decay to 0 at the last step")
    warmup_steps: NonNegativeInt = number(0, "optimizer steps of linear warm-up", lt=2**31)
    total_steps: PositiveInt | None = number(None, "optimizer steps until decay reaches 0; null: the stage's", lt=2**31)
    weight_decay: NonNegativeFloat = number(0.0, "decoupled weight decay")
    max_grad_norm: PositiveFloat = number(1.0, "the gradient's global norm is clipped here")
    beta1: float = number(0.9, "Adam's first decay", ge=0, lt=1)
    beta2: float = number(0.999, "Adam's second decay", ge=0, lt=1)
    epsilon: PositiveFloat = number(1e-8, "Adam's epsilon, added outside the root; far below the gradients, which at 8B parameters are about 1e-6 each")


# What a loss decides where the settings do not say. gspo: the mean over an answer's tokens keeps ratios close to 1, and
# these are the bounds of its paper (2507.18071). cispo: no lower bound (2506.13585), and weights up to 5 as in
# ScaleRL (2510.13786). pg: its gradient is right on samples of the policy itself, which one step ends.
BY_LOSS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "pg": {"epochs": 1, "minibatches": 1},
}


class PPOConfig(Settings):
    """The update of one iteration: schulman et al. 1707.06347 as applied to language models in 2403.17031."""

    epochs: PositiveInt = Field(1, description="passes over the samples of an iteration; more move large models out of the clip range")
    minibatches: PositiveInt | None = Field(None, description="optimizer steps per pass; null: 4, or the most below that into which the answers divide")
    microbatch_size: PositiveInt | None = Field(None, description="rows per forward and backward pass, in scoring too; null: a whole minibatch")
    loss: Literal["clip", "gspo", "cispo", "pg"] = Field(
        "clip", description="clip: PPO; gspo: one ratio per answer; cispo: clipped weights; pg: plain policy gradient, one step an iteration"
    )
    clip_low: NonNegativeFloat = number(0.2, "the ratio is clipped below 1 - clip_low; not given: with gspo 3e-4, with cispo 1, which is no bound")
    clip_high: NonNegativeFloat = number(0.2, "the ratio is clipped above 1 + clip_high; not given: with gspo 4e-4, with cispo 4")
    dual_clip: Annotated[float, Field(gt=1)] | None = number(
        None, "where the advantage is negative, the loss is at most this times its size; null: off"
    )
    importance_cap: PositiveFloat | None = number(
        None, "weights for the gap between sampling and training logprobs, cut off here; null: no weights"
    )
    importance_level: Literal["token", "sequence"] = Field("token", description="one such weight per token or per answer")
    kl_loss: Literal["k1", "k2", "k3"] | None = Field(
        None, description="estimator of a KL term in the loss, weighted by kl.coef (k1's gradient is 0 in expectation: prefer k2 or k3); null: the KL is part of the reward, by kl.estimator, but for advantage.estimator grpo k3: it divides by a group's deviation, and where all scores of a group are equal KL in the reward would be all that is left"
    )
    mask_truncated: bool = Field(
        False, description="answers that did not end are left out of the update: of the losses of policy, value and KL, of the entropy bonus and of whitening; their scores still count in the baselines of groups (2503.14476's overlong filtering: what was cut off is neither right nor wrong)"
    )
    kl_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = number(
        10.0, "steepest slope of one token's KL estimate, in the loss, in the reward and in metrics: k2 past |r| = 10 and k3 past r = log(11) go on as straight lines, so that one token far from the reference cannot outweigh a batch (verl and OpenRLHF hold the estimate within 10); null: no bound"
    )
    log_ratio_bound: PositiveFloat | None = number(
        20.0, "log-ratios of policies are held within +- this before exp, in losses, importance weights and metrics (20, as in verl); null: no bound, ratios may then be infinite and their steps are skipped"
    )
    value_clip: NonNegativeFloat = number(0.5, "values are clipped to the old ones +- this, in the scores' own scale: an iteration brings them no nearer than by this")
    value_coef: NonNegativeFloat = number(0.1, "weight of the value loss")
    value_trunk: Literal["own", "policy"] = Field(
        "own", description="own: the value model is an adapter of its own; policy: a head on the policy's trunk, one forward pass for both"
    )
    value_warmup: NonNegativeInt = Field(0, description="first iterations in which only the value model learns")
    kl_stop: PositiveFloat | None = number(
        None, "the rest of an iteration's steps is left out once a minibatch's approximate KL to the old policy is above this; they do not count for schedules either; null: off"
    )
    pretraining_coef: NonNegativeFloat = number(1.0, "weight of the language-model loss on ppo.pretraining's rows (PPO-ptx, 2203.02155), where given")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = number(
        None, "keeps a moving average of the policy's adapter, by this much of the old one per optimizer step; null: none"
    )
    entropy_coef: NonNegativeFloat = number(0.0, "weight of the entropy bonus")
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token", description="mean over tokens; mean of the answers' means; or sum over response length x rows"
    )
    buckets: Annotated[int, Field(ge=1, le=8)] = Field(
        1, description="lengths that answers are cut to, in scoring and in the update: a microbatch goes through at the least of them that holds its longest answer, rows of like length together; each, at most 8, compiles the passes once more; 1: all at full length", json_schema_extra=ROUNDING
    )
    remat: Remat = Field("dots", description=REMAT, json_schema_extra=ROUNDING)
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the policy")
    value_optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the value model")

    @model_validator(mode="before")
    @classmethod
    def _by_loss(cls, given: Any) -> Any:
        loss = given.get("loss") if isinstance(given, dict) else None
        return BY_LOSS.get(loss, {}) | given if isinstance(loss, str) else given


class ScoreConfig(Settings):
    """What becomes of a score before it is a reward: its scale first, then penalties in that scale."""

    normalise: Literal["none", "initial", "running", "batch"] = Field(
        "none", description="scores to mean 0 and deviation 1; initial: of answers before the first iteration (1909.08593); running: of all so far; batch: of the iteration's (whitening)"
    )
    initial_completions: PositiveInt = Field(256, description="normalise=initial: answers that gain and bias are fitted on, at least")
    clip: PositiveFloat | None = number(None, "scores are held within +- this, after they are normalised; null: off")
    missing_eos: Literal["subtract", "replace"] = Field(
        "subtract", description="an answer that did not end; subtract: missing_eos_penalty is taken off its score; replace: its score becomes -missing_eos_penalty"
    )
    missing_eos_penalty: NonNegativeFloat = number(0.0, "see missing_eos")
    length_penalty: NonNegativeFloat = number(0.0, "taken off the score for each token beyond length_free")
    length_free: NonNegativeInt = number(0, "tokens without length_penalty", lt=2**31)
    overlong_penalty: NonNegativeFloat = number(0.0, "taken off the score at max_new_tokens, rising over overlong_buffer tokens before it (2503.14476, equation 13)")
    overlong_buffer: NonNegativeInt = number(0, "tokens before max_new_tokens over which overlong_penalty rises", lt=2**31)

    @model_validator(mode="after")
    def _complete(self) -> "ScoreConfig":
        if bool(self.overlong_penalty) != bool(self.overlong_buffer):
            raise ValueError("overlong_penalty and overlong_buffer go together: give both, or none")
        if self.length_free and not self.length_penalty:
            raise ValueError("length_free has no effect without length_penalty")
        return self


class KLConfig(Settings):
    """The penalty for leaving the reference, and its coefficient's controller (1909.08593, section 2.2)."""

    coef: NonNegativeFloat = number(0.05, "initial weight of the per-token KL in the reward")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator on r = ref - policy: -r, r^2/2, exp(r)-1-r")
    target: PositiveFloat | None = number(None, "KL per answer that an adaptive coefficient aims at; null: fixed coefficient")
    horizon: PositiveInt = number(10000, "answers over which the adaptive coefficient reacts", lt=2**31)


class AdvantageConfig(Settings):
    """How rewards become advantages."""

    estimator: Literal[
        "gae", "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"
    ] = Field("gae", description="rloo, grpo, dr_grpo and reinforce_plus_plus_baseline compare sampling.samples_per_prompt answers; only gae has a value model")
    gamma: UnitFloat = number(1.0, "discount")
    lam: UnitFloat = number(1.0, "lambda of generalised advantage estimation; below 1 a final score reaches the first tokens of a long answer only through the value model: 0.95^320 is 7e-8")
    whiten_rewards: bool = Field(False, description="gae: rewards are scaled to deviation 1, over the whole batch, before it")
    whiten_advantages: bool | None = Field(None, description="advantages are scaled to mean 0 and deviation 1 over the whole batch; null: gae's and reinforce's are")
