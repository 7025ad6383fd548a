"""code_tests: which tests a completion passes, and what rows and settings may hold. Attacks are in test_sandbox."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.code_tests import CodeTestsReward, code_of, read_tests
from jaxrlhf.rewards.completions import Completions, abstained_rows
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.sandbox.remote_objects import Peer, Remote
from jaxrlhf.rewards.sandbox.unit_tests import count_tests
from jaxrlhf.rewards.trial import try_rewards


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def reward(said):
    return CodeTestsReward(CodeTestsRewardConfig(seconds=30.0, workers=2), "ppo.reward", said.append)


def of(texts, rows):
    completions = Completions(None, ["p"] * len(texts), rows, None)
    completions.__dict__["texts"] = list(texts)
    return completions


MAXIMUM = "def maximum(values):\n    return max(values)"
# Parts of the file: === NAME | SCORE, code, ---, tests
CASES = re.findall(
    r"^=== (.*) \| (.*)\n((?s:.*?))^---\n((?s:.*?))(?=^===|\Z)",
    Path(__file__).with_name("code_cases.txt").read_text(),
    re.MULTILINE,
)


def test_shares_of_tests(reward):
    scores = reward(of([code for _, _, code, _ in CASES], [{"tests": tests} for *_, tests in CASES]))
    expected = {name: pytest.approx(float(Fraction(share))) for name, share, *_ in CASES}
    assert len(CASES) == 21 and dict(zip(expected, scores.tolist())) == expected
    assert not abstained_rows(scores).any()


def test_rows_without_tests_abstain_and_all_or_nothing(reward):
    whole = CodeTestsReward(CodeTestsRewardConfig(score="all", seconds=30.0), "ppo.reward")
    half, right = ["assert maximum([1]) == 1", "assert maximum([2]) == 1"], ["assert maximum([1])"]
    rows = [{"tests": half}, {"tests": None}, {"tests": right}]
    for one, expected in ((reward, [0.5, 0, 1]), (whole, [0, 0, 1])):
        scores = one(of([MAXIMUM] * 3, rows))
        assert np.asarray(scores).tolist() == expected and abstained_rows(scores).tolist() == [False, True, False]
    assert reward(of([], [])).shape == (0,)


def test_blanks_before_the_first_line_are_no_indentation(reward):
    rows = [{"tests": ["assert one() == 1"]}] * 2
    assert reward(of([" def one(): return 1", "\n  def one():\n    return 1"], rows)).tolist() == [1, 1]


def test_head_of_a_function_and_check_as_in_humaneval():
    config = CodeTestsRewardConfig(column="test", prefix="prompt", entry_point="entry_point", seconds=30.0)
    row = {
        "entry_point": "triple",
        "test": "def check(candidate):\n    assert candidate(2) == 6\n    assert candidate('a') == 'aaa'\n",
    }
    completions = of(["    return x * 3\n", "    return x + 4\n"], [row] * 2)
    completions.prompts[:] = ["def triple(x):\n"] * 2
    reward = CodeTestsReward(config, "ppo.reward")
    reward.check_rows(completions.prompts, completions.rows, "ppo.reward")
    assert reward(completions).tolist() == [1, 0]


def test_a_batch_that_takes_too_long_has_no_scores():
    reward = CodeTestsReward(CodeTestsRewardConfig(seconds=2.0, batch_seconds=1.0, workers=1), "ppo.reward")
    scores = reward(of([MAXIMUM] * 2, [{"tests": ["assert maximum([1]) == 1"]}] * 2))
    assert abstained_rows(scores).tolist() == [True, True]


def test_the_weaker_sandbox_says_so_once():
    said = []
    reward = CodeTestsReward(CodeTestsRewardConfig(sandbox="process"), "ppo.reward", said.append)
    assert len(said) == 1 and "\n" not in said[0]
    assert re.match(r"ppo\.reward: code runs in the weaker sandbox: .*; bubblewrap is stronger", said[0])
    assert reward.sandbox.kind != "bubblewrap"


def test_only_bubblewrap_says_nothing(reward, said):
    assert (reward.sandbox.kind == "bubblewrap") == (said == [])


def test_an_interpreter_that_does_not_exist():
    with pytest.raises(UserError, match=r"\Appo\.reward\.sandbox: no sandbox works: [^\n]*nowhere[^\n]*\Z"):
        CodeTestsReward(CodeTestsRewardConfig(python="/nowhere/python", sandbox="process"), "ppo.reward")


BAD = [
    ([], "must hold Python text, a list of asserts or a list of {input, output}"),
    (3, "must hold Python text"),
    ([1], "must hold Python text"),
    ("x = 1", "has no assert and no test function"),
    ("assert (", "is not Python: line 1"),
    ([{"input": "a"}], "must have a text input and a text output"),
    ([{"input": 1, "output": "2"}], "must have a text input and a text output"),
]


@pytest.mark.parametrize(("tests", "words"), BAD)
def test_tests_that_cannot_be_used(reward, tests, words):
    rows = [{"tests": ["assert f(1)"]}, {"tests": tests}]
    with pytest.raises(UserError) as caught:
        reward.check_rows(["p", "q"], rows, "ppo.reward")
    assert str(caught.value).startswith("ppo.reward.column: prompt 2: the column tests ") and words in str(caught.value)
    with pytest.raises(RewardFault, match=r"\Areward code_tests: row 1: the column tests [^\n]*\Z"):
        reward(of(["", ""], rows))


def test_columns_that_are_missing(reward):
    reward.check_rows(["p", "q"], [{"tests": None}, {"tests": ["assert f(1)"]}], "ppo.reward")
    words = "ppo.reward.column: the data has no column tests; the columns are: a, b, prompt"
    with pytest.raises(UserError, match=words):
        reward.check_rows(["p", "q"], [{"a": 1}, {"b": 1}], "ppo.reward")


def test_two_rows_are_tried_before_the_run(reward):
    tokenizer = build_word_tokenizer(["add", "two", "numbers"])
    ids = [np.array(tokenizer.encode_prompt(text), np.int32) for text in ("add two", "add numbers")]

    def prompts(tests):
        return PromptSet(ids, ["add two", "add numbers"], [None] * 2, [{"tests": tests}] * 2, 8, 0, None)

    try_rewards({"ppo.reward": reward}, prompts(["assert add(1, 2) == 3"]), tokenizer)
    with pytest.raises(UserError, match=r"\Appo\.reward: the reward failed on [^\n]* the column tests"):
        try_rewards({"ppo.reward": reward}, prompts(3), tokenizer)


def test_code_blocks():
    assert code_of("a = 1") == "a = 1"
    assert code_of("```\nfirst\n```\nand\n```Python\nlast\n  more\n```\n") == "last\n  more"
    assert code_of("```py\ncut off") == "cut off"


def test_counts():
    assert read_tests("assert a\nassert b", "tests") == {"sources": ["assert a\nassert b"]}
    assert count_tests(["assert a\nassert b"]) == 2
    assert count_tests(["assert a; assert b", "assert c"]) == 2
    assert count_tests(["def test_a():\n    assert a", "def test_b():\n    assert b"]) == 2
    assert count_tests(["def check(f):\n    assert f(1)\ncheck(g)\nprint(2)"]) == 1


def test_the_judge_gives_the_code_no_way_to_its_names():
    """Requests of the tested code may only call functions of the tests that it got as arguments."""
    peer = Peer.__new__(Peer)
    peer.objects = {}

    def secret():
        return 2

    (key,) = peer.write(secret).values()
    assert peer.answer(key, "call", [], {})[0] == 2
    for method, args in (("get", ["__globals__"]), ("get", ["f"]), ("set", ["x", 1]), ("getattr", ["__globals__"])):
        with pytest.raises(TypeError, match="can only call functions of the tests"):
            peer.answer(key, method, args, {})
    with pytest.raises(KeyError):
        peer.answer(key + 1, "call", [], {})
    remote = Remote(peer, 0)
    assert (remote == 2, remote != 2, 2 in [remote]) == (False, True, False)
    for operation in (lambda: remote - 2, lambda: 2 - remote, lambda: remote < 2, lambda: remote > 2):
        with pytest.raises(TypeError):
            operation()
