import dataclasses
import json
import sys

import numpy as np
import pytest

from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.completions import Completions, abstained_rows
from jaxrlhf.rewards.functions import FunctionReward, RewardFault, load_function
from jaxrlhf.rewards.load import FirstProcessReward

WORDS = ["red", "green", "blue", "one", "two"]


@pytest.fixture(scope="module")
def completions():
    """Three answers to prompts of one word; what stands past their end is not theirs."""
    tokenizer = build_word_tokenizer(WORDS)
    ids = {word: tokenizer.encode_prompt(word)[-1] for word in WORDS}
    junk, eos = ids["blue"], tokenizer.eos_id
    tokens = np.array(
        [
            [ids["one"], ids["red"], ids["green"], eos],
            [ids["two"], ids["green"], eos, junk],
            [ids["one"], eos, junk, junk],
        ]
    )
    response_mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    mask = np.concatenate([np.ones((3, 1), bool), response_mask], 1)
    zeros = np.zeros(3)
    rollout = Rollout(tokens, mask, response_mask, np.zeros((3, 3)), zeros.astype(bool), zeros)
    rows = [{"level": 1, "label": "a"}, {"level": 2}, {"level": 3, "label": "c"}]
    return Completions(rollout, ["one", "two", "one"], rows, tokenizer)


@pytest.fixture
def reward(tmp_path):
    """`reward(source)`: a FunctionReward from a file that holds this function `score`."""

    def make(source):
        path = tmp_path / "my_rewards.py"
        path.write_text(source)
        return FunctionReward(f"{path}:score", "ppo.reward.function")

    return make


def test_completions_are_the_real_tokens_without_special_ones(completions):
    assert completions.texts == [" red green", " green", ""]  # with the blank that parts them from their prompts
    assert completions.texts is completions.texts  # decoded once


def test_a_function_gets_prompts_completions_and_every_column(reward, completions):
    score = reward("seen = {}\ndef score(**given):\n    seen.update(given)\n    return [0.6, 1, True]")
    np.testing.assert_array_equal(score(completions), np.float32([0.6, 1, 1]))
    assert score(completions).dtype == np.float32
    assert score.function.__globals__["seen"] == {
        "prompts": ["one", "two", "one"],
        "completions": [" red green", " green", ""],
        "level": [1, 2, 3],
        "label": ["a", None, "c"],
    }


def test_without_kwargs_it_gets_what_it_names(reward, completions):
    score = reward("def score(level, completions, bonus=0.25):\n    return [x / 3 + bonus for x in level]")
    np.testing.assert_allclose(score(completions), np.float32([1 / 3, 2 / 3, 1]) + 0.25, rtol=1e-6)


def test_arrays_of_any_number_type_are_scores(reward, completions):
    for kind in ("float64", "int64", "bool", "float16"):
        score = reward(f"import numpy as np\ndef score(prompts):\n    return np.array([0, 1, 1], '{kind}')")
        np.testing.assert_array_equal(score(completions), np.float32([0, 1, 1]))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0, 2.0]", "shape (2,) for 3 completions"),
        ("return [[1.0], [2.0], [3.0]]", "shape (3, 1) for 3 completions"),
        ("return 1.0", "shape () for 3 completions"),
        ("return None", "no list of numbers"),
        ("return [1.0, float('nan'), 2.0]", "nan for completion 1 of 3; return None to give no score"),
        ("return [None, float('nan'), 2.0]", "nan for completion 1 of 3"),
        ("return [None, None]", "shape (2,) for 3 completions"),
        ("return [1.0, 2.0, -float('inf')]", "-inf for completion 2 of 3"),
        ("return ['good', 'bad', 'good']", "no list of numbers"),
        ("return ['0.5', '0.1', '0.2']", "no list of numbers"),
        ("return '123'", "no list of numbers"),
        ("return [1.0, [2.0], 3.0]", "no list of numbers"),
        ("return (x for x in [1.0, 2.0, 3.0])", "no list of numbers"),
        ("return {'a': 1.0}", "no list of numbers"),
        ("return [1j, 2.0, 3.0]", "no list of numbers"),
        ("return np.array(['0.5', '0.1', '0.2'], object)", "no list of numbers: an entry has the type str"),
        ("return np.array(['2026-01-01'] * 3, 'datetime64[D]')", "no list of numbers"),
        ("return torch.ones(3, requires_grad=True)", "no list of numbers: Can't call numpy() on Tensor"),
        ("raise KeyError('gold')", "raised KeyError: 'gold'"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("raise ValueError('first\\nsecond')", "raised ValueError: first"),
        ("raise type('PanicException', (BaseException,), {})('of Rust')", "raised PanicException: of Rust"),
    ],
)
def test_what_is_no_score_is_a_fault_that_names_the_function(reward, completions, body, words):
    if "torch" in body:
        pytest.importorskip("torch")
    imports = "import numpy as np\n" + "import torch\n" * ("torch" in body)
    score = reward(f"{imports}def score(prompts, completions):\n    {body}")
    with pytest.raises(RewardFault) as fault:
        score(completions)
    message = str(fault.value)
    assert words in message and score.name in message and "\n" not in message


@pytest.mark.parametrize("how", ["def", "async def"])
@pytest.mark.parametrize(
    ("body", "abstained"),
    [
        ("[0.5, None, 2]", [1]),
        ("[None] * 3", [0, 1, 2]),
        ("np.array([0.5, None, 2], object)", [1]),
        ("np.ma.array([0.5, 7.0, 2.0], mask=[0, 1, 0])", [1]),
        ("[0.5, 0.0, 2.0]", []),
    ],
)
def test_a_function_abstains_with_none_and_counts_0_there(reward, completions, how, body, abstained):
    scores = reward(f"import numpy as np\n{how} score(prompts):\n    return {body}")(completions)
    np.testing.assert_array_equal(np.flatnonzero(abstained_rows(scores)), abstained)
    expected = np.float32([0.5, 0, 2])
    expected[abstained] = 0
    np.testing.assert_array_equal(np.asarray(scores), expected)  # also for those who know nothing of masks
    assert scores.dtype == np.float32 and isinstance(scores, np.ma.MaskedArray) == bool(abstained)


def test_process_0_tells_the_others_where_a_reward_abstained(reward, completions):
    score = reward("def score(prompts):\n    return [0.5, None, 2]")
    shared = FirstProcessReward(score)
    assert shared.may_abstain and shared.name == score.name
    for got, expected in zip((shared(completions), score(completions)), (score(completions),) * 2):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
        np.testing.assert_array_equal(abstained_rows(got), [False, True, False])


def test_what_a_function_does_to_its_lists_changes_nothing_for_others(reward, completions):
    rows = [{"names": ["ada", "bo"]} for _ in range(3)]
    completions = dataclasses.replace(completions, rows=rows)
    score = reward(
        "def score(prompts, completions, names):\n"
        "    return [float(len(completions.pop()) + len(known.pop())) for known in names]"
    )
    for _ in range(2):
        np.testing.assert_array_equal(score(completions), np.float32([2, 8, 12]))
    assert completions.texts == [" red green", " green", ""] and rows == [{"names": ["ada", "bo"]}] * 3


def test_ctrl_c_is_no_fault_of_the_function(reward, completions):
    with pytest.raises(KeyboardInterrupt):
        reward("def score(prompts):\n    raise KeyboardInterrupt")(completions)


def test_a_column_that_the_data_has_not_is_a_fault(reward, completions):
    with pytest.raises(RewardFault, match=r"missing 1 required .*'gold_answer'"):
        reward("def score(completions, gold_answer):\n    return [1, 2, 3]")(completions)


def test_functions_of_modules_and_files(tmp_path):
    from jaxrlhf.algorithms.masked import masked_mean

    assert load_function("jaxrlhf.algorithms.masked:masked_mean", "x") is masked_mean
    # A file may define dataclasses, and may be called like a module that is loaded.
    for name in ("weighted.py", "json.py"):
        path = tmp_path / name
        path.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Weights:\n    short: float = 0.5\n"
            "def score(completions):\n    return [Weights().short for _ in completions]\n"
        )
        assert load_function(f"{path}:score", "x")(completions=["a"]) == [0.5]
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("score", "'score' is neither module:function nor path.py:function"),
        (":score", "neither module:function"),
        ("rewards.py:", "neither module:function"),
        ("rewards.py:two words", "neither module:function"),
        ("absent.py:score", "there is no file absent.py"),
        ("no_such_module_here:score", "cannot import no_such_module_here: ModuleNotFoundError"),
        ("jaxrlhf.rewards:score", "jaxrlhf.rewards has no function score; its functions are: none"),
        ("{folder}/good.py:scores", "has no function scores; its functions are: score"),
        ("{folder}/good.py:NUMBER", "has no function NUMBER"),
        ("{folder}/broken.py:score", "broken.py: SyntaxError"),
        ("{folder}/raising.py:score", "raising.py: ValueError: one"),
    ],
)
def test_a_function_that_cannot_be_found_is_named_in_one_line(tmp_path, spec, words):
    (tmp_path / "good.py").write_text("NUMBER = 1\ndef score(prompts):\n    return [0]\ndef _hidden(): pass\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "raising.py").write_text("raise ValueError('one\\ntwo')\n")
    with pytest.raises(UserError) as error:
        FunctionReward(spec.format(folder=tmp_path), "ppo.gold")
    message = str(error.value)
    assert message.startswith("ppo.gold: ") and words in message and "\n" not in message


def test_an_exception_that_cannot_be_printed_is_named_by_its_type(reward, completions):
    odd = "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\n"
    score = reward(odd + "def score(prompts):\n    raise Odd\n")
    with pytest.raises(RewardFault, match=r"score raised Odd: Odd$"):
        score(completions)
