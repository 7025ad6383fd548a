"""Where scores come from: one section per kind of reward, each with its own settings."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from jaxrlhf.config.base import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings


class FunctionRewardConfig(Settings):
    """A Python function."""

    kind: Literal["function"] = Field("function", description="a Python function")
    function: str = Field(description="module:function or path.py:function, called with prompts=, completions= and the row's other columns=")
    options: dict[str, Any] = Field({}, description="keywords of every call, such as {pattern: '####'}")
    columns: dict[str, str] = Field({}, description="keyword of the function -> column of the data that it gets")
    timeout: PositiveFloat = Field(30.0, description="seconds for one call of an async function")


class HTTPRewardConfig(Settings):
    """A server."""

    kind: Literal["http"] = Field("http", description="a server")
    url: str = Field(description="gets {prompts, completions, columns} as JSON, answers {scores: [numbers]}")
    timeout: PositiveFloat = Field(30.0, description="seconds for one request")
    retries: NonNegativeInt = Field(4, description="further tries after time-outs, lost connections, 429 and 5xx")
    token_env: str | None = Field(None, description="environment variable with a bearer token")
    batch_size: PositiveInt = Field(16, description="answers per request")


class _Reader(Settings):
    """What the kinds share that read answers with a model and tokenizer of their own."""

    kind: Literal["model", "classifier"]
    template: str | None = Field(None, description="spells input text, with {prompt} and {completion} in it; null: the answer right behind the prompt")
    batch_size: PositiveInt = Field(16, description="answers per forward pass of a model at path")
    max_length: PositiveInt = Field(512, description="tokens that a model at path reads at most, within its positions; longer: the start is cut off")

    @model_validator(mode="after")
    def _spelt(self) -> "_Reader":
        if self.template is not None and (self.input not in ("auto", "text") or "{completion}" not in self.template):
            raise ValueError("template holds {completion}, and {prompt} where that is wanted; it needs input: text")
        return self


class ModelRewardConfig(_Reader):
    """The run's reward adapter, or a reward model in a folder."""

    kind: Literal["model"] = Field("model", description="the run's reward adapter, or the decoder at path")
    path: str | None = Field(None, description="folder or hub id of a *ForSequenceClassification decoder with one label and its own tokenizer; null: the run's reward adapter")
    input: Literal["auto", "text", "completion", "chat"] = Field("auto", description="what the model at path reads. text: prompt and answer as one; completion: the answer alone; chat: its chat template; auto: chat for chats if it has a template, else text")
    end_at_eos: bool | None = Field(None, description="answers that ended end as in the stage reward_model, with the turn's end of the reward model's chat template, or its EOS; null: in texts yes, chats as their template ends them")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the weights at path in memory; auto: that of its tensors")


class ClassifierRewardConfig(_Reader):
    """A text classifier of any architecture, by transformers with torch, on the CPU."""

    kind: Literal["classifier"] = Field("classifier", description="a text classifier of any architecture, by transformers with torch on the CPU")
    path: str = Field(description="folder or hub id of a *ForSequenceClassification model with its own tokenizer")
    label: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] | None = Field(None, description="name or number of the label that is scored; null: the only one")
    score: Literal["logit", "probability", "log_probability"] = Field("logit", description="what of the label is the score")
    input: Literal["auto", "text", "completion", "pair", "chat"] = Field("auto", description="what the classifier reads. text: prompt and answer as one; completion: the answer alone; pair: two segments; chat: its chat template; auto: chat for chats if it has a template, else text")


def _tag(given: Any) -> str | None:
    """The kind of a reward, spelt so that it is no setting's name; a section without one is of kind model."""
    if isinstance(given, dict):
        return f"kind={given.get('kind', 'model')}"
    return f"kind={given.kind}" if isinstance(given, Settings) else None


class _Weighted(Settings):
    """What a part of a sum has beside the settings of its kind."""

    weight: FiniteFloat = Field(1.0, description="the part's scores are multiplied by it; 0: only measured")


class FunctionPart(_Weighted, FunctionRewardConfig):
    """A function in a sum."""


class HTTPPart(_Weighted, HTTPRewardConfig):
    """A server in a sum."""


class ModelPart(_Weighted, ModelRewardConfig):
    """A reward model in a sum."""


class ClassifierPart(_Weighted, ClassifierRewardConfig):
    """A classifier in a sum."""


RewardPart = Annotated[
    Annotated[ModelPart, Tag("kind=model")]
    | Annotated[FunctionPart, Tag("kind=function")]
    | Annotated[ClassifierPart, Tag("kind=classifier")]
    | Annotated[HTTPPart, Tag("kind=http")],
    Discriminator(_tag),
]


class SumRewardConfig(Settings):
    """Several rewards, weighted and added up."""

    kind: Literal["sum"] = Field("sum", description="several rewards, weighted and added up")
    parts: dict[str, RewardPart] = Field(min_length=1, description="name -> a reward of another kind, with a weight (1; 0: only measured); each is logged as reward/NAME")


RewardConfig = Annotated[
    Annotated[ModelRewardConfig, Tag("kind=model")]
    | Annotated[FunctionRewardConfig, Tag("kind=function")]
    | Annotated[ClassifierRewardConfig, Tag("kind=classifier")]
    | Annotated[HTTPRewardConfig, Tag("kind=http")]
    | Annotated[SumRewardConfig, Tag("kind=sum")],
    Discriminator(_tag),
]
ReadingRewardConfig = ModelRewardConfig | ClassifierRewardConfig
