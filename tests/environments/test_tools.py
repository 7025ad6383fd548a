"""Tools: schemas, arguments, faults that become answers, and the environment around a row."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrlhf.environments import python_tool as python_module
from jaxrlhf.environments.arithmetic import Arithmetic
from jaxrlhf.environments.check import find_problems
from jaxrlhf.environments.python_tool import python_tool
from jaxrlhf.environments.search import TextSearch, search_tool, shared_search
from jaxrlhf.environments.tool_calls import Call
from jaxrlhf.environments.tools import NO_CALLS_LEFT, Tool, ToolEnvironment, load_tools, run_call
from jaxrlhf.errors import UserError
from jaxrlhf.toy import builtin


def add(first: int, second: int = 1) -> int:
    """
    Adds two numbers.

    Args:
        first: A number.
        second: Another number.
    """
    return first + second


def misbehave(how: str) -> str:
    """
    Misbehaves.

    Args:
        how: In which way.
    """
    if how == "hang":
        while True:
            time.sleep(0.01)
    if how == "exit":
        raise SystemExit(3)
    if how == "timeout":
        raise TimeoutError("the server is slow")
    if how == "long":
        return "x" * 10**6
    raise KeyError("no such way\nsecond line")


def words(prompts, completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer)]


TOOLS = load_tools([add, misbehave])
ROW = {"prompt": "what is 2 + 3 ?", "answer": "5"}


def test_the_schema_is_that_of_transformers():
    from transformers.utils import get_json_schema

    schema = TOOLS["add"].schema
    assert schema == get_json_schema(add)
    assert schema["function"]["parameters"]["required"] == ["first"]
    assert schema["function"]["parameters"]["properties"]["second"]["type"] == "integer"


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (Call("add", {"first": 2, "second": 3}), "5"),
        (Call("add", {"first": "2"}), "3"),
        (Call("add", text="2 , 3"), "5"),
        (Call("add", text="2"), "3"),
    ],
)
def test_calls_run_with_converted_arguments(call, answer):
    assert run_call(TOOLS, call) == (answer, True)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (Call("subtract", {}), "error: no tool 'subtract'; the tools are: add, misbehave"),
        (Call("add", {}), "error: first: Field required; add takes first: integer, second: integer (required: first)"),
        (Call("add", {"first": "two"}), "error: first: Input should be a valid integer"),
        (Call("add", {"first": 1, "third": 1}), "error: third: Extra inputs are not permitted"),
        (Call("add", text="1, 2, 3"), "error: 3 arguments are too many"),
        (Call("add", text=""), "error: first: Field required"),
        (Call("", error="the call is not valid JSON"), "error: the call is not valid JSON"),
        (Call("misbehave", text="raise"), "error: KeyError: 'no such way"),
        (Call("misbehave", text="exit"), "error: SystemExit: 3"),
        (Call("misbehave", text="timeout"), "error: TimeoutError: the server is slow"),
        (Call("misbehave", text="hang"), "error: misbehave took more than 0.2 s"),
    ],
)
def test_bad_calls_get_an_error_as_their_answer(call, answer):
    text, succeeded = run_call(TOOLS, call, seconds=0.2)
    assert text.startswith(answer) and not succeeded and "\n" not in text


def test_long_answers_are_cut():
    text, succeeded = run_call(TOOLS, Call("misbehave", text="long"), max_chars=50)
    assert len(text) == 50 and text.endswith("(cut)") and succeeded


def test_functions_that_cannot_be_tools_are_refused():
    def untyped(x):
        """
        Does it.

        Args:
            x: A thing.
        """

    def undocumented(x: int) -> int:
        return x

    def starred(*xs: int) -> int:
        """
        Does it.

        Args:
            xs: Things.
        """

    for function in (untyped, undocumented, starred):
        with pytest.raises(UserError, match=rf"ppo\.tools: {function.__name__} cannot be a tool: "):
            Tool(function, "ppo.tools")
    with pytest.raises(UserError, match=r"ppo\.tools: functools\.partial.* cannot be a tool: it has no name"):
        Tool(functools.partial(add, second=2), "ppo.tools")
    with pytest.raises(UserError, match="two tools have the name add"):
        load_tools([add, add])
    with pytest.raises(UserError, match="has no function nothing"):
        load_tools(["jaxrlhf.environments.calculator:nothing"])


def test_a_tool_is_prepared_when_it_is_made():
    def prepared(x: int) -> int:
        """
        Does it.

        Args:
            x: A number.
        """
        return x

    asked = []
    prepared.prepare = lambda: asked.append(1)
    assert Tool(prepared).run(Call("prepared", {"x": 3})) == ("3", True) and asked == [1]

    def refuse():
        raise UserError("no sandbox works here")

    prepared.prepare = refuse
    with pytest.raises(UserError, match=r"^no sandbox works here$"):
        load_tools([prepared])
    prepared.prepare = {}.popitem
    with pytest.raises(UserError, match="tools: prepared cannot be prepared: KeyError"):
        load_tools([prepared])


# ---------------------------------------------------------------- the environment


def environment(**options):
    return ToolEnvironment([add, misbehave], "hermes", words, **options)


def call(name, arguments):
    return f'let me see <tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_an_episode_runs_calls_and_scores_the_answer():
    env = environment()
    messages, info = env.reset(options=ROW)
    assert messages == [{"role": "user", "content": "what is 2 + 3 ?"}]
    assert [tool["function"]["name"] for tool in info["tools"]] == ["add", "misbehave"]
    (message,), *rest = env.step(call("add", '{"first": 2, "second": 3}'))
    assert message == {"role": "tool", "name": "add", "content": "5", "tool_call_id": "call00001"}
    assert rest == [0.0, False, False, {}]
    both, *_ = env.step(call("add", "{}") + call("add", '{"first": 1}'))
    assert [m["content"][:5] for m in both] == ["error", "2"]
    assert env.step("it is 5")[1:] == (1.0, True, False, {"success": True, "calls": 3, "failed_calls": 1})
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("it is 5")


def test_calls_beyond_the_limit_get_an_error_and_then_end_the_episode():
    env = environment(max_calls=1, system="use the tools")
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    messages, _ = env.reset(options={"messages": chat, "answer": "5"})
    assert [m["role"] for m in messages] == ["system", "user"]
    env.step(call("add", '{"first": 4}'))
    assert env.step(call("add", '{"first": 4}'))[0][0]["content"] == NO_CALLS_LEFT
    _, reward, terminated, truncated, info = env.step(call("add", '{"first": 5}') + "it is 5")
    assert (reward, terminated, truncated, info["success"], info["calls"]) == (0.0, False, True, False, 2)
    env.reset(options=ROW)
    assert env.step("no")[1:3] == (0.0, True)


def test_the_question_is_the_whole_prompt_or_ends_with_the_last_turn_of_the_user():
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "tool", "assistant")]
    env = environment()
    assert env.reset(options={"messages": chat, "answer": "5"})[0] == chat[:3]
    assert env.reset(options={"prompt": chat[:2], "answer": "5"})[0] == chat[:2]
    with pytest.raises(UserError, match="messages with a turn of the user; its columns are: messages"):
        env.reset(options={"messages": chat[-1:]})


def test_the_reward_gets_what_a_reward_function_gets():
    seen = {}

    def reward(prompts, completions, answer, level):
        seen.update(prompts=prompts, completions=completions, answer=answer, level=level)
        return [None]

    env = ToolEnvironment([add], "hermes", reward, reward_options={"level": 3})
    env.reset(options=ROW)
    assert env.step(" 5")[1] == 0.0
    assert seen == {"prompts": ["what is 2 + 3 ?"], "completions": [" 5"], "answer": ["5"], "level": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToolEnvironment([add], "gpt", words), "parser: must be one of hermes, "),
        (lambda: ToolEnvironment([add], "hermes", "jaxrlhf.rewards.library:none"), "reward: .* has no function none"),
        (lambda: environment(max_calls=-1), "max_calls: must be at least 0"),
        (lambda: environment().reset(options={"answer": "5"}), "a row needs a prompt.*: answer"),
        (lambda: environment().reset(), "its columns are: none"),
        (lambda: environment().reset(options={"messages": ["x"]}), "must be objects with role and content"),
    ],
)
def test_faults_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---------------------------------------------------------------- arithmetic with a calculator


def answer_with_tool(env, row):
    env.reset(options=row)
    expression = " ".join(word for word in row["prompt"].split() if word.isdigit() or word in "+-*")
    (message,), *_ = env.step(f"calculator : {expression}")
    return env.step(message.get("content", ""))


def test_the_calculator_answers_every_row_and_the_demonstrations_answer_few():
    assert find_problems(Arithmetic()) == ([], [])
    rows, vocabulary = builtin.load("calculator", "test", 100), set(builtin.vocabulary("calculator")[0])
    env = Arithmetic()
    assert all(answer_with_tool(env, row)[4]["success"] for row in rows)
    solved = []
    for row in rows:
        env.reset(options=row)
        for message in row["messages"]:
            assert set(message["content"].split()) <= vocabulary
            if message["role"] == "assistant":
                observation, reward, *_ = env.step(message["content"])
            elif message["role"] == "tool":
                assert observation[0]["content"] == message["content"]  # the demonstration is what the tool says
        solved.append(reward)
    assert 0.1 < sum(solved) / len(rows) < 0.4


def test_bad_calls_of_arithmetic_get_a_word_of_the_vocabulary_and_without_tool_a_call_is_wrong():
    env = Arithmetic(max_calls=2)
    env.reset(seed=1)
    assert env.step("calculator : 1 + + *")[0][0]["content"] == "error"
    assert env.step("calculator : 1 2 - 2 4")[0][0]["content"] == "- 1 2"
    env = Arithmetic(tool=False)
    env.reset(seed=1)
    assert env.step("calculator : 1 + 1")[1:3] == (0.0, True)


# ---------------------------------------------------------------- search


def plain_bm25(passages, query, k1=1.5, b=0.75):
    """BM25 by its definition, one passage and one word at a time."""
    import math
    import re

    split = [re.findall(r"\w+", text.lower()) for text in passages]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words_ in split:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            n, tf = sum(word in other for other in split), words_.count(word)
            if tf:
                idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
                score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(words_) / mean))
        scores.append(score)
    return scores


def test_search_is_bm25(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("The cat sat on the mat.\n\nA dog barks at the cat, the cat runs.\n \nNothing.")
    (tmp_path / "below" / "b.md").write_text("Dogs and cats.\nThe dog sleeps all day on the mat with the other dog.")
    (tmp_path / "c.bin").write_bytes(b"\xff cat")
    index = TextSearch(tmp_path)
    passages = [text for _, text in index.passages]
    assert len(passages) == 4
    for query in ("cat", "the dog on the mat", "dog dog cat", "unknown", ""):
        assert index.scores(query).tolist() == pytest.approx(plain_bm25(passages, query))
    assert index.best("dog", 5)[0][0] == "below/b.md" and len(index.best("cat", 5)) == 2
    tool = Tool(search_tool(tmp_path, results=1, max_chars=12))
    assert tool.name == "search"
    assert tool.run(Call("search", {"query": "cat runs"})) == ("[a.txt] A dog barks ", True)
    assert tool.run(Call("search", {"query": "zebra"})) == ("nothing found", True)
    assert shared_search(tmp_path) is shared_search(str(tmp_path))
    assert shared_search(tmp_path, b=0.5) is not shared_search(tmp_path)
    before = shared_search(tmp_path)
    (tmp_path / "d.txt").write_text("A zebra.")
    assert shared_search(tmp_path) is not before and len(shared_search(tmp_path).passages) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no text to search"):
        TextSearch(tmp_path / "empty")


# ---------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def python():
    try:
        return Tool(python_tool(seconds=3.0, max_chars=300))
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(sum(range(10)))", "45"),
        ("x = 1", "(the program printed nothing)"),
        ("print('a')\n1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("print(open('/etc/passwd', 'w'))", "Error"),
        ("import socket; socket.create_connection(('127.0.0.1', 80), 1)", "Error"),
        ("print('y' * 10000)", "characters cut"),
    ],
)
def test_python_runs_in_the_sandbox_and_shows_its_output(python, code, output):
    text, succeeded = python.run(Call("python", {"code": code}))
    assert output in text and succeeded and len(text) <= 300


def test_python_that_does_not_end_is_ended_and_its_lines_are_kept(python):
    code = "print('begun')\nprint('y' * 1000)\nwhile True: pass"
    text, _ = python.run(Call("python", {"code": code}), seconds=30)
    assert text.startswith("begun\nyyy") and text.endswith("did not end within 3 s, or printed too much")
    assert "characters cut" in text and len(text) <= 300


def test_the_end_of_a_long_output_of_python_is_kept(python, capsys):
    tool = load_tools(["jaxrlhf.environments.python_tool:python"])["python"]
    text, _ = tool.run(Call("python", {"code": "print('first', 'y' * 10000, 'last')"}), seconds=30)
    assert text.startswith("first ") and text.endswith(" last") and "characters cut" in text and len(text) <= 2000


class FakePool:
    """Counts sandboxes, says that they are weak, and answers with the given lines."""

    made, lines = (), ()

    def __init__(self, config, key_path, say):
        time.sleep(0.05)
        FakePool.made = (*self.made, (config.sandbox, key_path))
        say("python_tool: code runs in the weaker sandbox")

    def run(self, request, seconds):
        return self.lines


@pytest.fixture
def fake_pool(monkeypatch):
    caches = python_module._sandbox, python_module._say, python_module._make_default
    monkeypatch.setattr(python_module, "SandboxPool", FakePool)
    monkeypatch.setattr(FakePool, "made", ())
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_tools_in_threads_share_one_sandbox(fake_pool):
    with ThreadPoolExecutor(4) as executor:
        tools = list(executor.map(lambda _: load_tools(["jaxrlhf.environments.python_tool:python"]), range(4)))
    assert len(tools) == 4 and FakePool.made == (("auto", "python_tool"),)


def test_a_weak_sandbox_is_said_once_and_faults_of_the_sandbox_are_named(fake_pool, monkeypatch, capsys):
    tools = [python_tool(), python_tool(max_chars=50), python_tool(sandbox="process")]
    assert FakePool.made == (("auto", "python_tool"), ("process", "python_tool"))
    assert capsys.readouterr().err == "python_tool: code runs in the weaker sandbox\n"
    monkeypatch.setattr(FakePool, "lines", [{"error": "there are no free user ids"}])
    assert Tool(tools[0]).run(Call("python", text="1")) == (
        "error: Fault: the sandbox failed: there are no free user ids", False
    )  # fmt: skip
    monkeypatch.setattr(FakePool, "lines", [])
    assert "did not end within 5 s" in tools[0]("1")
    with pytest.raises(UserError, match="python_tool: sandbox: Input should be 'auto', "):
        python_tool(sandbox="none")
