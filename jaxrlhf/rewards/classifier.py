"""Text classifiers as rewards. transformers' `*ForSequenceClassification` models of any architecture are supported.

torch runs the model on the CPU, and nothing here uses the accelerator. The score is the logit, probability or log
probability of one label. The probability of a single label is the sigmoid of its logit. If several labels may apply to
the same text, each probability is also a sigmoid. Otherwise probabilities are a softmax over all labels. Pickled
weights and remote code are not supported, on purpose.
"""

import inspect
import os
from typing import Any

import numpy as np

from jaxrlhf.config import ClassifierRewardConfig
from jaxrlhf.data import hub
from jaxrlhf.data.chats import Chat, ChatTemplate
from jaxrlhf.data.sources import HUB_ID
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.errors import UserError, one_line
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.reading import Reading, batches, check_tokenizer, finite, readings


class ClassifierReward:
    """A reward (see `completions.Reward`) from a folder or hub id that `AutoModelForSequenceClassification` reads.

    A text of more than `max_length` tokens loses its start but keeps its special tokens. If the input has two
    segments, the longer segment is cut first. Rows of similar length share a forward pass and are padded on the right.
    """

    def __init__(self, config: ClassifierRewardConfig, key_path: str):
        """Loads model and tokenizer. Raises `UserError` if settings cannot be used.

        `key_path` is the config section. Error messages contain it.
        """
        self.config, self.name = config, str(config.path)
        self.model = _load_model(self.name, key_path)
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.tokenizer = _load_tokenizer(config, self.vocab_size, key_path)
        if getattr(self.model.config, "pad_token_id", None) is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders need it to find the last real token
        self.chats = ChatTemplate(self.tokenizer, self.name)
        self.inputs = set(inspect.signature(self.model.forward).parameters)
        self.label = _label(config, self.model.config, key_path)
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.max_length = min([config.max_length, *(limit for limit in limits if limit is not None and limit > 0)])
        self._check_forward(key_path)

    def __call__(self, completions: Completions) -> np.ndarray:
        return finite(self.name, self.scores(readings(completions, self.config, self.chats.exists)))

    def scores(self, readings: list[Reading]) -> np.ndarray:
        """Returns the scores f32[B] of B readings."""
        try:
            encoded = [self._encode(prompt, text) for prompt, text in readings]
            # If there is no pad token, a batch has one row.
            size = self.config.batch_size if self.tokenizer.pad_token_id is not None else 1
            scores = np.empty(len(readings), np.float32)
            for rows in batches([len(row["input_ids"]) for row in encoded], size):
                scores[rows] = self._forward([encoded[i] for i in rows])
        except Exception as error:
            raise RewardFault(f"reward {self.name}: {type(error).__name__}: {one_line(error)}") from error
        return scores

    def _encode(self, prompt: str | Chat | None, text: str) -> dict[str, list[int]]:
        """Returns the model's inputs for one reading. An input name maps to a list with one number per token."""
        first, second = (text, None) if prompt is None else (prompt, text)
        is_chat = not isinstance(first, str)
        if is_chat:
            first, second = self.chats.whole_text(first.followed_by(text), ""), None
        # In a chat, the template has already written the special tokens.
        limits = {"truncation": True, "max_length": self.max_length, "add_special_tokens": not is_chat}
        outputs = self.tokenizer(first, second, **limits)
        # Some tokenizers return segment ids that the model does not accept.
        encoded = {name: ids for name, ids in outputs.items() if name in self.inputs}
        if max(outputs["input_ids"], default=0) >= self.vocab_size:  # text may contain any added token
            kept = [i for i, token in enumerate(outputs["input_ids"]) if token < self.vocab_size]
            encoded = {name: [ids[i] for i in kept] for name, ids in encoded.items()}
        if not encoded["input_ids"]:  # the text is empty and has no special tokens, but the model needs one token
            encoded = {name: [int(name == "attention_mask")] for name in encoded}
        return encoded

    def _forward(self, encoded: list[dict[str, list[int]]]) -> np.ndarray:
        """Returns the scores f32[B] of one batch."""
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
        """Returns the scores [B] of the configured label, computed from the logits [B, labels] of all labels."""
        import torch

        independent = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        if self.config.score == "probability":
            logits = torch.sigmoid(logits) if independent else torch.softmax(logits, dim=1)
        elif self.config.score == "log_probability":
            logits = torch.nn.functional.logsigmoid(logits) if independent else torch.log_softmax(logits, dim=1)
        return logits[:, self.label]

    def _check_forward(self, key_path: str) -> None:
        """Scores a text of `max_length` tokens. Raises `UserError` if the model does not accept this length."""
        special = self.tokenizer.num_special_tokens_to_add(pair=self.config.input == "pair")
        if self.max_length <= special:
            raise UserError(
                f"{key_path}.max_length: must be at least {special + 1}, not {self.max_length}; each input has "
                f"{special} special tokens"
            )
        try:
            self.scores([(None, "a " * self.max_length)])
        except RewardFault as error:
            raise UserError(
                f"{key_path}.max_length: the model cannot score a text of {self.max_length} tokens: {error}"
            ) from error


def _load_model(path: str, key_path: str) -> Any:
    """Loads the classifier in float32 on the CPU. Raises UserError if a weight is missing."""
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
    except ImportError:
        raise UserError(f"{key_path}.kind: classifier needs torch; run pip install torch") from None
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder) and (os.path.exists(folder) or not HUB_ID.fullmatch(path)):
        raise UserError(f"{key_path}.path: {path}: no such folder; give a folder, or a hub id such as owner/name")
    try:
        if not os.path.isdir(folder):
            folder = hub.download(path, ["*.json", "*.safetensors"])
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # the library raises many types of errors for missing, pickled or broken files
        raise UserError(f"{key_path}.path: {path} cannot be loaded as a text classifier: {one_line(error)}") from error
    if loading["missing_keys"]:
        # transformers fills missing tensors with random weights.
        missing = sorted(loading["missing_keys"])[0]
        raise UserError(
            f"{key_path}.path: {path} has no tensor {missing}; use a folder of a *ForSequenceClassification model"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{key_path}.path: {path}: tensor {name} has NaN or infinite values; use other weights")
    return model.eval()


def _load_tokenizer(config: ClassifierRewardConfig, vocab_size: int, key_path: str) -> Any:
    """Loads the classifier's tokenizer. The tokenizer pads on the right and truncates on the left."""
    try:
        tokenizer = load_tokenizer(config.path)
    except UserError as error:
        raise UserError(f"{key_path}.path: {error}") from error
    check_tokenizer(tokenizer, vocab_size, config, key_path)
    tokenizer.fast.padding_side, tokenizer.fast.truncation_side = "right", "left"
    return tokenizer.fast


def _label(config: ClassifierRewardConfig, model: Any, key_path: str) -> int:
    """Returns the index of the label that the config names."""
    names = {int(number): str(name) for number, name in model.id2label.items()}
    listed = ", ".join(f"{name!r} ({number})" for number, name in sorted(names.items()))
    if config.label is None:
        if len(names) != 1:
            raise UserError(
                f"{key_path}.label: {config.path} has {len(names)} labels; set label to one of them: {listed}"
            )
        return 0
    matches = [number for number, name in names.items() if name == config.label]
    matches += [number for number in names if str(number) == config.label]
    if not matches:
        raise UserError(f"{key_path}.label: {config.path} has no label {config.label!r}; the labels are {listed}")
    return matches[0]
