"""The texts of `sampling.choices` become tokens as responses of SFT do, or are refused with one line."""

import copy
import re

import jax
import pydantic
import pytest

from jaxrlhf.config import DemonstrationsConfig, Sampling
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.stages.choices import load_choices

WORDS = build_word_tokenizer(["blue", "red", "green", "sky", ".", "the"])


def load(choices, tokenizer=WORDS, prompts=("the sky",), says=None, limit=4, **sampling):
    model = DecoderConfig(tokenizer.vocab_size, 8, 8, 1, 1, 1, 8, 64, stop_tokens=tokenizer.stop_ids)
    sampling = Sampling(choices=choices, max_new_tokens=limit, **sampling)
    says = [] if says is None else says
    return load_choices(sampling, model, tokenizer, list(prompts), says.append)


def beginnings(choices):
    """The choices as tokens, read from the trie."""
    choices = jax.device_get(choices)
    found, stop = [], int(choices.tokens[-1])

    def walk(node, path):
        below = choices.first[node]
        for index in choices.allowed[node].nonzero()[0]:
            if choices.tokens[index] == stop:
                found.append((*path, stop))
            else:
                walk(below, (*path, int(choices.tokens[index])))
                below += 1

    walk(0, ())
    return sorted(found)


def test_the_tokens_are_those_of_sft(stories260k, tmp_path):
    """Labels of one and several tokens, one the beginning of another, with and without a blank before them."""
    tokenizer = load_tokenizer(str(stories260k))
    for choices in (("good", "good story", "bad", "unknown"), (" good", " good story", " bad")):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f'{{"prompt": "Once upon a time:", "response": "{text}"}}\n' for text in choices))
        examples, _ = load_demonstrations(DemonstrationsConfig(path=str(file)), tokenizer, 64, "stop")
        wanted = sorted(tuple(example.response_ids.tolist()) for example in examples)
        assert len({len(answer) for answer in wanted}) > 1
        assert beginnings(load(choices, tokenizer, ["Once upon a time:"] * 3, limit=30)) == wanted


def test_without_choices_there_is_no_trie():
    assert load(None) is None


def test_lengths_are_told():
    says = []
    assert load(("blue", "red green"), says=says, limit=3) is not None and says == []
    load(("blue", "red green"), says=says, limit=7)
    assert says == [
        "ppo.sampling.max_new_tokens: is 7, but the longest choice has 3 tokens with its stop token; 3 takes less time "
        "and memory"
    ]


def test_prompts_that_change_the_tokens_are_told():
    """The tokens after most prompts are used."""
    odd, says = copy.copy(WORDS), []
    odd.encode_pairs = lambda pairs: (
        ([], [4, 5, 2] if (prompt, choice) == ("sky", "red green") else WORDS.encode_pair(prompt, choice)[1])
        for prompt, choice in pairs
    )
    found = load(("blue", "red green"), odd, ["the sky", "sky", "the"], says, limit=3)
    assert beginnings(found) == beginnings(load(("blue", "red green"), limit=3))
    assert says == [
        "ppo.sampling.choices: choices such as 'red green' have other tokens after 1 of the first 3 prompts than after "
        "the rest; those after the rest are used; let all prompts end alike"
    ]


REFUSED = {
    "other tokens than": (dict(choices=("zzz", "blue")), "choices: the tokenizer has no tokens for 'zzz'"),
    "same": (dict(choices=("blue red", "blue  red")), "choices: 'blue red' and 'blue  red' have the same tokens"),
    "short": (dict(choices=("blue", "red green blue"), limit=3),
              "max_new_tokens: is 3, but the choice 'red green blue' has 4 tokens with its stop token; give 4"),
    "no stop": (dict(choices=("blue", "red"), stop_tokens=(5,)),
                r"choices: each choice ends with \S+ \(id 2\), which sampling.stop_tokens lacks"),
    "stop inside": (dict(choices=("blue", "red ."), stop_tokens=(2, WORDS.fast.convert_tokens_to_ids("."))),
                    r"choices: 'red \.' contains the stop token \., so it would end there"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_choices_that_cannot_be_answers_are_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(UserError, match=rf"ppo\.sampling\.{message}") as caught:
        load(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["yes", " "], "the choice ' ' is empty"),
        (["yes", "no", "yes"], "the choice 'yes' is given more than once"),
        ([True, False], "True is not text; put it in quotes"),
        ([1, 2], "1 is not text; put it in quotes, as in '1'"),
        (["yes"], "at least 2 items"),
    ],
)
def test_lists_that_are_no_choices_are_refused(choices, message):
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        Sampling(choices=choices)
