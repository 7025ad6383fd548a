"""Async functions, options and columns of FunctionReward, and its early checks of the library's functions."""

import dataclasses
import sys
import time

import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, abstained_rows
from jaxrlhf.rewards.event_loop import run_async
from jaxrlhf.rewards.functions import FunctionReward, RewardFault

LIBRARY = "jaxrlhf.rewards.library"


@pytest.fixture
def completions():
    completions = Completions(None, ["p", "q"], [{"answer": "4", "gold": 4}, {"answer": "5", "gold": 6}], None)
    completions.__dict__["texts"] = [" it is 4", " it is 6"]
    return completions


@pytest.fixture
def reward(tmp_path):
    def make(source, **settings):
        path = tmp_path / "my_rewards.py"
        path.write_text(source)
        return FunctionReward(f"{path}:score", "ppo.reward.function", **settings)

    return make


ASYNC = """
import asyncio
lock = asyncio.Lock()
loops = set()
async def one(n):
    async with lock:
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return n / 2
async def score(gold):
    return list(await asyncio.gather(*map(one, gold)))
"""


def test_an_async_function_is_awaited_always_on_the_same_loop(reward, completions):
    score = reward(ASYNC)
    for _ in range(3):
        np.testing.assert_array_equal(score(completions), np.float32([2, 3]))
    assert len(score.function.__globals__["loops"]) == 1


def test_an_async_function_within_a_running_loop(reward, completions):
    async def notebook():
        return score(completions)

    score = reward(ASYNC)
    import asyncio

    np.testing.assert_array_equal(asyncio.run(notebook()), np.float32([2, 3]))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('gold')", "raised KeyError: 'gold'"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("await asyncio.gather(inner())", "raised SystemExit: 1"),
        ("await asyncio.sleep(60)", "raised TimeoutError: the call took longer than 0.05 s"),
        ("time.sleep(0.4)", "raised TimeoutError: the call took longer than 0.05 s"),
        ("raise asyncio.CancelledError", "raised CancelledError"),
        ("return [1.0]", "shape (1,) for 2 completions"),
        ("return ['1', '2']", "no list of numbers"),
    ],
)
def test_faults_of_an_async_function(reward, completions, body, words):
    source = f"import asyncio, sys, time\nasync def inner():\n    sys.exit(1)\nasync def score(prompts):\n    {body}\n"
    with pytest.raises(RewardFault) as fault:
        reward(source, timeout=0.05 if "sleep" in body else 5.0)(completions)
    assert words in str(fault.value) and "\n" not in str(fault.value)
    # The loop survives it, or the next call gets another.
    np.testing.assert_array_equal(reward(ASYNC, timeout=5.0)(completions), np.float32([2, 3]))


def test_a_time_out_cancels_the_function():
    import asyncio

    ended = []

    async def long():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        run_async(long(), 0.02)
    start = time.monotonic()
    while not ended and time.monotonic() < start + 2:
        time.sleep(0.001)
    assert ended


def test_a_process_ends_though_a_thread_of_an_async_function_does_not(processes):
    """A call in `asyncio.to_thread` that never returns, such as a request without a time-out."""
    code = (
        "import asyncio, threading\n"
        "from jaxrlhf.rewards.event_loop import run_async\n"
        "async def score():\n    return await asyncio.to_thread(threading.Event().wait)\n"
        "async def fine():\n    return await asyncio.gather(*(asyncio.to_thread(abs, -n) for n in range(100)))\n"
        "assert run_async(fine(), 30) == list(range(100))\n"
        "run_async(score(), 0.05)\n"
    )
    done = processes.run("-c", code, status=1, seconds=60)
    assert done.errors.splitlines()[-1] == "TimeoutError: the call took longer than 0.05 s"


def test_an_error_in_a_thread_of_an_async_function_is_its_own(reward, completions):
    source = "import asyncio\nasync def score(gold):\n    return await asyncio.to_thread(lambda: [1 / 0])\n"
    with pytest.raises(RewardFault, match="raised ZeroDivisionError: division by zero"):
        reward(source)(completions)


def test_options_reach_every_call_and_go_before_columns(reward, completions):
    source = "def score(prompts, gold, bonus=0.0):\n    return [bonus + (gold if gold == 9 else 0) for _ in prompts]"
    with_options = reward(source, options={"bonus": 0.5, "gold": 9})
    np.testing.assert_array_equal(with_options(completions), np.float32([9.5, 9.5]))
    required = reward("def score(prompts, scale):\n    return [scale] * len(prompts)", options={"scale": 3})
    required.check_columns({"answer"}, "ppo.reward")  # an option fills what no column does
    np.testing.assert_array_equal(required(completions), [3, 3])


def test_columns_are_renamed(completions):
    score = FunctionReward(f"{LIBRARY}:numeric_answer", "ppo.gold", columns={"answer": "gold"})
    score.check_columns({"gold"}, "ppo.gold")
    np.testing.assert_array_equal(score(completions), [1, 1])
    np.testing.assert_array_equal(FunctionReward(f"{LIBRARY}:numeric_answer", "ppo.gold")(completions), [1, 0])
    with pytest.raises(UserError, match="the data has no column gold; the columns are: answer"):
        score.check_columns({"answer"}, "ppo.gold")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"bonsu": 1}}, "accepts no option 'bonsu'; it accepts: bonus"),
        ({"options": {"prompts": 1}}, "accepts no option 'prompts'"),
        ({"columns": {"gold": "x"}}, "accepts no column 'gold'"),
    ],
)
def test_keywords_that_the_function_does_not_take(reward, settings, words):
    with pytest.raises(UserError, match=words):
        reward("def score(prompts, bonus=0):\n    return [0 for _ in prompts]", **settings)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("regex_format", {}, "pattern"),
        ("regex_format", {"pattern": "("}, "not a regular expression"),
        ("regex_format", {"pattern": 3}, "not a regular expression"),
        ("regex_format", {"pattern": "a", "mode": "part"}, "mode must be full or search, not 'part'"),
        ("length", {"target": -1}, "target must be a whole number of at least 0, not -1"),
        ("length", {"target": 2.5}, "target must be a whole number of at least 0, not 2.5"),
        ("length", {"target": 5, "unit": "tokens"}, "unit must be words or characters, not 'tokens'"),
        ("length", {"target": 5, "floor": 1}, "floor must be a number of at most 0, not 1"),
        ("repetition", {"n": 0}, "n must be a whole number of at least 1, not 0"),
        ("json_validity", {"required": "name"}, "required must be a list of texts, not 'name'"),
        ("multiple_choice", {"letters": "abcd"}, "letters such as 'ABCD', not 'abcd'"),
        ("label_accuracy", {"labels": ["a", "A"]}, "labels must be a list of different, non-empty texts"),
        ("label_accuracy", {"label": ["a"], "pick": "best"}, "pick must be first or last or only, not 'best'"),
        ("numeric_answer", {"tolerance": float("nan")}, "tolerance must be a number of at least 0, not nan"),
        ("exact_match", {"normalize": "lowre"}, "normalize must be none or strip or lower or squad, not 'lowre'"),
        ("exact_match", {"normalise": "lower"}, "accepts no option 'normalise'"),
        ("rouge", {"metric": "rouge9"}, "rougeLsum, not 'rouge9'"),
        ("bleu", {"tokenize": "flores200"}, "none, not 'flores200'"),
        ("chrf", {"beta": 0}, "beta must be a whole number of at least 1, not 0"),
    ],
)
def test_options_of_the_library_are_checked_when_the_reward_is_made(name, options, words):
    with pytest.raises(UserError) as error:
        FunctionReward(f"{LIBRARY}:{name}", "ppo.gold", options)
    message = str(error.value)
    assert message.startswith("ppo.gold: ") and words in message and "\n" not in message


def test_a_column_never_fills_an_option_of_the_library(completions):
    rows = [{"n": 1, "unit": "x"}, {"n": 2, "unit": "y"}]
    odd = Completions(None, completions.prompts, rows, None)
    odd.__dict__["texts"] = ["a b a b a b", "a b c d"]
    np.testing.assert_allclose(FunctionReward(f"{LIBRARY}:repetition", "ppo.gold", {"n": 2})(odd), [-3 / 5, 0])


@pytest.mark.parametrize(
    ("name", "module"),
    [("rouge", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics"), ("chrf", "sacrebleu.metrics")],
)
def test_a_package_that_is_missing_is_named_before_anything_runs(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"ppo.gold: .* is not installed; run pip install 'jaxrlhf\[rewards\]'"):
        FunctionReward(f"{LIBRARY}:{name}", "ppo.gold")


def test_a_row_whose_column_holds_nothing_of_use_is_named_and_one_without_has_no_score(completions):
    reward = FunctionReward(f"{LIBRARY}:numeric_answer", "ppo.gold")
    odd = Completions(None, completions.prompts, [{"answer": "4"}, {"answer": "four"}], None)
    odd.__dict__["texts"] = completions.texts
    with pytest.raises(RewardFault, match=r"numeric_answer raised ValueError: column answer, row 1 must be a number"):
        reward(odd)
    without = dataclasses.replace(odd, rows=[{"answer": "4"}, {}])
    without.__dict__["texts"] = completions.texts
    np.testing.assert_array_equal(abstained_rows(reward(without)), [False, True])
