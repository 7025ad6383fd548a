"""Trains the classifier of configs/recipes/detoxification.yaml, in seconds on one core, and saves it as a folder.

    python configs/recipes/detoxification_classifier.py [--to runs/detoxification-classifier] [--steps 300]

It is a BERT of one layer with the labels harmless and toxic, trained on generated comments. Needs torch and
transformers. Prints its accuracy on new comments.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.toy.tasks.detoxification import TASK, comments

LABELS = ("harmless", "toxic")
BATCH = 64


def train(steps: int, tokenizer) -> BertForSequenceClassification:
    """Returns a classifier that learned `steps` batches of comments."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        loss = model(**batch_of(comments(rng, BATCH), tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def batch_of(rows: list[tuple[str, bool]], tokenizer) -> dict[str, torch.Tensor]:
    """Returns the model's inputs and labels of (text, whether it is toxic) rows."""
    texts, toxic = zip(*rows)
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return {name: encoded[name] for name in names} | {"labels": torch.tensor(toxic).long()}


def save_classifier(folder: str | Path, steps: int) -> float:
    """Trains a classifier and saves it with its tokenizer. Returns its accuracy on 1000 new comments."""
    tokenizer = build_word_tokenizer(TASK.words).fast
    model = train(steps, tokenizer)
    held_out = batch_of(comments(np.random.default_rng(1), 1000), tokenizer)
    labels = held_out.pop("labels")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        return float((model(**held_out).logits.argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="runs/detoxification-classifier", metavar="DIR", help="output folder")
    parser.add_argument("--steps", type=int, default=300, help="batches of 64 comments (default: 300)")
    given = parser.parse_args()
    accuracy = save_classifier(given.to, given.steps)
    print(f"saved in {given.to}; accuracy on 1000 new comments: {accuracy:.3f}")


if __name__ == "__main__":
    main()
