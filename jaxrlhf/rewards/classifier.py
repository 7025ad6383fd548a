"""Text classifiers of any architecture as rewards: transformers' `*ForSequenceClassification` with torch on the CPU.

The score is of one label: its logit, or its probability or the logarithm of that (over all labels by softmax; by
sigmoid where it is the only label or labels do not exclude each other). Nothing here touches the accelerator.

Not here: pickled weights and models that bring their own code.
"""

import inspect
import os
from typing import Any

import numpy as np

from jaxrlhf.config import ClassifierRewardConfig
from jaxrlhf.data.chats import Chat, ChatTemplate
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sources import HUB_ID, one_line
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.reading import Reading, batches, chats_read, finite, readings


class ClassifierReward:
    """A reward (see `completions.Reward`) from a folder or hub id that `AutoModelForSequenceClassification` reads.

    Texts longer than `max_length` lose their start, special tokens excepted; of two segments the longer one first.
    Rows of about the same length share a forward pass, padded on the right.
    """

    def __init__(self, config: ClassifierRewardConfig, key_path: str):
        """`key_path` is the section of the settings, for messages. Raises `UserError` where they cannot be used."""
        self.config, self.name = config, str(config.path)
        self.model = _load_model(self.name, key_path)
        self.tokenizer = _load_tokenizer(self.name, self.model, key_path)
        self.chats = ChatTemplate(self.tokenizer, self.name)
        self.rows = self.model.get_input_embeddings().num_embeddings
        self.inputs = set(inspect.signature(self.model.forward).parameters)
        self.label = _label(config, self.model.config, key_path)
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.max_length = min([config.max_length, *(limit for limit in limits if limit is not None and limit > 0)])
        if config.input == "chat" and not self.chats.exists:
            raise UserError(f"{key_path}.input: chat, but the tokenizer of {self.name} has no chat template; try text")
        self._check_forward(key_path)

    def check_prompts(self, prompts: PromptSet) -> None:
        """`UserError` where the chat template refuses a chat."""
        chats = chats_read(prompts.texts, prompts.chats, self.config, self.chats.exists)
        for number, chat in enumerate(chats, start=1):
            self.chats.whole_text(chat.followed_by("a"), f"prompt {number}: ")

    def __call__(self, completions: Completions) -> np.ndarray:
        return finite(self.name, self.scores(readings(completions, self.config, self.chats.exists)))

    def scores(self, read: list[Reading]) -> np.ndarray:
        """Scores f32[B] of B readings."""
        try:
            encoded = [self._encode(prompt, text) for prompt, text in read]
            # Without a pad token there is no batch.
            size = self.config.batch_size if self.tokenizer.pad_token_id is not None else 1
            scores = np.empty(len(read), np.float32)
            for rows in batches([len(row["input_ids"]) for row in encoded], size):
                scores[rows] = self._forward([encoded[i] for i in rows])
        except Exception as error:
            raise RewardFault(f"reward {self.name}: {type(error).__name__}: {one_line(error)}") from error
        return scores

    def _encode(self, prompt: str | Chat | None, text: str) -> dict[str, list[int]]:
        """Ids of one reading, and what else the model takes, one number per token."""
        first, second = (text, None) if prompt is None else (prompt, text)
        is_chat = not isinstance(first, str)
        if is_chat:
            first, second = self.chats.whole_text(first.followed_by(text), ""), None
        # The template has written a chat's special tokens.
        limits = {"truncation": True, "max_length": self.max_length, "add_special_tokens": not is_chat}
        given = self.tokenizer(first, second, **limits)
        # A plain tokenizer also tells segments, which not every model knows.
        encoded = {name: ids for name, ids in given.items() if name in self.inputs}
        if max(given["input_ids"], default=0) >= self.rows:  # a text may spell out any added token
            kept = [i for i, token in enumerate(given["input_ids"]) if token < self.rows]
            encoded = {name: [ids[i] for i in kept] for name, ids in encoded.items()}
        if not encoded["input_ids"]:  # an empty text, and no special tokens: something must be read
            encoded = {name: [int(name == "attention_mask")] for name in encoded}
        return encoded

    def _forward(self, encoded: list[dict[str, list[int]]]) -> np.ndarray:
        """Scores f32[B] of one batch."""
        import torch

        fills = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        width = max(len(row["input_ids"]) for row in encoded)
        inputs = {
            name: torch.tensor([row[name] + [fills.get(name, 0)] * (width - len(row[name])) for row in encoded])
            for name in encoded[0]
        }
        with torch.inference_mode():
            logits = self.model(**inputs).logits.float()
        return self._score_of(logits).numpy()

    def _score_of(self, logits: Any) -> Any:
        """Returns the scored label's scores [B], computed from all labels' logits [B, labels]."""
        import torch

        alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        if self.config.score == "logit":
            return logits[:, self.label]
        if self.config.score == "probability":
            return (torch.sigmoid(logits) if alone else torch.softmax(logits, dim=1))[:, self.label]
        logarithm = torch.nn.functional.logsigmoid(logits) if alone else torch.log_softmax(logits, dim=1)
        return logarithm[:, self.label]

    def _check_forward(self, key_path: str) -> None:
        """Scores a text that is as long as texts may be: what does not fit the model shows before the run."""
        special = self.tokenizer.num_special_tokens_to_add(pair=self.config.input == "pair")
        if self.max_length <= special:
            raise UserError(f"{key_path}.max_length: {self.max_length}, but {special} are special tokens; give more")
        try:
            self.scores([(None, "a " * self.max_length)])
        except RewardFault as error:
            raise UserError(f"{key_path}.max_length: no text of {self.max_length} tokens: {error}") from error


def _load_model(path: str, key_path: str) -> Any:
    """The classifier in float32 on the CPU, all of its weights found."""
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
    except ImportError:
        raise UserError(f"{key_path}.kind: classifier needs torch: pip install torch") from None
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder) and (os.path.exists(folder) or not HUB_ID.fullmatch(path)):
        raise UserError(f"{key_path}.path: {path}: no such folder; want one, or a hub id like owner/name")
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # not found, refused, pickled, broken: the library raises what it meets
        raise UserError(f"{key_path}.path: {path} is no text classifier to be used here: {one_line(error)}") from error
    if found["missing_keys"]:
        # transformers would go on with random weights in their place.
        missing = sorted(found["missing_keys"])[0]
        raise UserError(f"{key_path}.path: {path} has no tensor {missing}; want a *ForSequenceClassification folder")
    return model.eval()


def _load_tokenizer(path: str, model: Any, key_path: str) -> Any:
    """The classifier's tokenizer, set up to pad on the right and to cut on the left."""
    try:
        loaded = load_tokenizer(path)
    except UserError as error:
        raise UserError(f"{key_path}.path: {error}") from error
    if loaded is None:
        raise UserError(f"{key_path}.path: {path} has no tokenizer files")
    rows = model.get_input_embeddings().num_embeddings
    if loaded.text_size > rows:
        raise UserError(f"{key_path}.path: the tokenizer of {path} has {loaded.text_size} tokens, the model {rows}")
    tokenizer = loaded.fast
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders find a text's end by it
    return tokenizer


def _label(config: ClassifierRewardConfig, model: Any, key_path: str) -> int:
    """Number of the label that is scored."""
    names = {int(number): str(name) for number, name in model.id2label.items()}
    listed = ", ".join(f"{name!r} ({number})" for number, name in sorted(names.items()))
    if config.label is None:
        if len(names) != 1:
            raise UserError(f"{key_path}.label: {config.path} has {len(names)} labels, name one: {listed}")
        return 0
    found = [number for number, name in names.items() if config.label in (name, str(number))]
    exact = [number for number in found if names[number] == config.label] or found
    if not exact:
        raise UserError(f"{key_path}.label: {config.path} has no label {config.label!r}; it has {listed}")
    return exact[0]
