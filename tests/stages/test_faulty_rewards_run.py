"""A reward that fails in the middle of a run loses nothing: the culprit is named, and the same command goes on.

Two runs, one of a Python function and one of an HTTP server, fail once in each way, a step further on every time, and
are continued with the reward mended; a third is never disturbed. All three end with the same bytes.
"""

import contextlib
import dataclasses
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

ITERATIONS = 8
BEFORE_FIRST = 2  # iterations that end well before the first fault
SAVE_EVERY = 4  # so that one of the faults meets a checkpoint of its step
FEW = {"rank": 2, "target_modules": ["q_proj"]}
CONFIG = {
    "model": {
        "new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 32}
    },
    "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": ITERATIONS, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": FEW, "value_adapter": FEW,
        "kl": {"target": 0.001}, "update": {"epochs": 2, "minibatches": 1}, "evaluation": {"prompts": 4},
        "save_every": SAVE_EVERY, "sample_every": 1,
    },
}  # fmt: skip

# The file is read anew by every run, so `calls` counts that run's.
FUNCTION = """
import asyncio, json
from pathlib import Path

mood, calls = json.loads((Path(__file__).parent / "mood.json").read_text()), 0

def score(completions, **columns):
    global calls
    calls += len(completions) > 2  # the trial before training has two rows
    scores = [float(len(text.split())) for text in completions]
    if calls <= mood["good_calls"]:
        return scores
    if mood["fault"] == "raises":
        raise ConnectionError("no answer from the judge")
    if mood["fault"] == "hangs":
        return asyncio.sleep(3600)
    if mood["fault"] == "raises at the end":
        raise KeyError("gold")
    return {"nan": [*scores[:2], float("nan"), scores[3]], "too few": scores[:3], "text": "1.0"}[mood["fault"]]
"""

# What fails -> what the message says after the function's name.
OF_FUNCTION = {
    "raises": " raised ConnectionError: no answer from the judge",
    "nan": " returned nan for completion 2 of 4",
    "too few": " returned shape (3,) for 4 completions; it must return one number per completion",
    "text": " returned no list of numbers: an entry has the type str",
    "hangs": " raised TimeoutError: the call took longer than 0.2 s",
    "raises at the end": " raised KeyError: 'gold'",
}


@dataclasses.dataclass
class Server:
    """A real server that gives `good_calls` batches their scores, and then has its trouble."""

    port: int = 0
    good_calls: int = 10**9
    trouble: str = ""
    requests: int = 0
    sent: int = 0

    def __enter__(self):
        handler = type("Bound", (Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads, self.http.handle_error = True, lambda *_: None
        self.port, self.released, self.closed = self.http.server_address[1], threading.Event(), threading.Event()
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def close(self):
        if not self.closed.is_set():
            self.closed.set()
            self.http.shutdown()
            self.http.server_close()

    def __exit__(self, *_):
        self.released.set()
        self.close()


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self):
        state, request = self.server_state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.requests += len(request["completions"]) > 2  # the trial before training has two rows
        scores = [float(len(text.split())) for text in request["completions"]]
        late = state.requests - state.good_calls
        if late <= 0 or (state.trouble == "500 twice" and late > 2):
            self.reply({"scores": scores})
        elif state.trouble == "down":  # it dies while it is asked, and nothing listens there any more
            state.close()
            self.connection.close()
        elif state.trouble == "slow":
            state.released.wait(60)
        elif state.trouble.startswith("500"):
            self.reply({"detail": "out of memory"}, 500)
        elif state.trouble == "endless":
            self.reply_endlessly()
        else:
            self.reply("<html>sorry</html>")

    def reply(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    def reply_endlessly(self):
        self.send_response(200)
        self.send_header("Content-Length", str(10**10))
        self.end_headers()
        while not self.server_state.released.is_set():  # ends when the client hangs up
            self.wfile.write(b" " * 65536)
            self.server_state.sent += 65536

    def log_message(self, *_):
        pass


OF_SERVER = {
    "down": ": ConnectError: All connection attempts failed (tried 3 times)",
    "slow": ": no answer within 1 s (tried 3 times)",
    "garbage": ": the response is not JSON: Expecting value: line 1 column 1 (char 0)",
    "500 forever": ": status 500 (tried 3 times)",
    "endless": ": the response is longer than 10000000 bytes",
}


@dataclasses.dataclass
class Link:
    """One run of the chain: what it ended with, and what it left."""

    stderr: str
    records: list[dict]
    saved: int | None
    status: int | None = None  # of the command
    error: BaseException | None = None  # of the function
    sent: int = 0

    @property
    def message(self) -> str:
        return str(self.error) if self.status is None else self.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for all runs, which compile equal programs once together."""
    folder = tmp_path_factory.mktemp("faulty")
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def config_of(folder, reward):
    return RunConfig.model_validate(
        CONFIG | {"run_dir": str(folder / "run"), "ppo": CONFIG["ppo"] | {"reward": reward}}
    )


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def run_once(folder, config, processes=None) -> Link:
    """Runs until the end or the fault, in this process or, given `processes`, by the command."""
    status, error, shown = None, None, io.StringIO()
    if processes:
        (folder / "config.yaml").write_text(dump_config(config))
        command = processes.start("-m", "jaxrlhf.train", "--config", folder / "config.yaml")
        status = command.wait()
        shown = io.StringIO(command.errors)
    else:
        with contextlib.redirect_stderr(shown):
            try:
                run_stages(config)
            except RewardFault as fault:
                error = fault
    steps = [int(path.name) for path in (folder / "run/checkpoints/ppo").iterdir() if path.name.isdigit()]
    return Link(shown.getvalue(), lines(folder), max(steps, default=None), status, error)


def chain(folder, config, faults, fail, processes):
    """A link per fault, each a step further, then one with the reward mended; `fail` sets up the reward's next run.

    The first is the command's. A fault "at the end" comes when all steps are done, while their result is measured."""
    links, reached = {}, 0
    for fault in faults:
        good_calls = ITERATIONS - reached if fault.endswith("at the end") else 1 if reached else BEFORE_FIRST
        with fail(fault, good_calls) as state:
            links[fault] = run_once(folder, config, None if reached else processes)
            links[fault].sent = getattr(state, "sent", 0)
        reached += good_calls
    return links


@pytest.fixture(scope="module")
def of_function(shared, processes):
    """The runs of a function that fails in every way, in turn."""
    folder = shared / "function"
    folder.mkdir()
    (folder / "judge.py").write_text(FUNCTION)
    config = config_of(folder, {"kind": "function", "function": f"{folder / 'judge.py'}:score", "timeout": 0.2})

    @contextlib.contextmanager
    def fail(fault, good_calls):
        yield (folder / "mood.json").write_text(json.dumps({"fault": fault, "good_calls": good_calls}))

    links = chain(folder, config, OF_FUNCTION, fail, processes)
    with fail(None, 10**9):
        links["mended"] = run_once(folder, config)
    return folder, links


@pytest.fixture(scope="module")
def of_server(shared, processes):
    """The runs of a server that fails in every way, in turn, always at one URL."""
    folder = shared / "server"
    folder.mkdir()
    with Server() as first:
        port = first.port
    url = f"http://127.0.0.1:{port}/score"
    config = config_of(folder, {"kind": "http", "url": url, "timeout": 1.0, "retries": 2})
    links = chain(folder, config, OF_SERVER, lambda fault, good_calls: Server(port, good_calls, fault), processes)
    with Server(port, 1, "500 twice"):
        links["500 twice"] = run_once(folder, config)
    return folder, links, url


@pytest.fixture(scope="module")
def straight(shared):
    """The run that nothing disturbs."""
    folder = shared / "straight"
    folder.mkdir()
    (folder / "judge.py").write_text(FUNCTION)
    (folder / "mood.json").write_text(json.dumps({"fault": None, "good_calls": 10**9}))
    run_once(folder, config_of(folder, {"kind": "function", "function": f"{folder / 'judge.py'}:score"}))
    return folder


def lasting(record):
    """A line of metrics without what clocks and memory say."""
    passing = ("seconds", "time", "tokens_per_second/", "memory/")
    return {name: x for name, x in record.items() if not name.startswith(passing)}


def check_link(link, reached, straight):
    """The run stopped with a fault of one line after `reached` steps, and all of them are there."""
    assert "\n" not in link.message
    if link.status is None:
        assert isinstance(link.error, RewardFault)
    else:
        assert link.status == 1 and link.message.startswith("error: ")
        assert link.message.endswith("; the same command continues from the last checkpoint, if any")
    assert link.saved == reached
    assert [lasting(record) for record in link.records] == [lasting(record) for record in lines(straight)[:reached]]


@pytest.mark.parametrize("fault", OF_FUNCTION)
def test_a_function_that_fails_is_named_and_loses_no_step(of_function, straight, fault):
    folder, links = of_function
    assert f"reward function {folder / 'judge.py'}:score{OF_FUNCTION[fault]}" in links[fault].message
    reached = ITERATIONS if fault.endswith("at the end") else BEFORE_FIRST + list(OF_FUNCTION).index(fault)
    check_link(links[fault], reached, straight)


@pytest.mark.parametrize("trouble", OF_SERVER)
def test_a_server_that_fails_is_named_and_loses_no_step(of_server, straight, trouble):
    _, links, url = of_server
    link, said = links[trouble], OF_SERVER[trouble]
    assert f"reward server {url}{said}" in link.message
    check_link(link, BEFORE_FIRST + list(OF_SERVER).index(trouble), straight)
    assert link.stderr.count("; trying again in ") == (2 if "(tried 3 times)" in said else 0)
    assert link.sent < 100_000_000, "10 GB were promised, and 10 MB are read at most"


def test_a_server_that_fails_twice_and_then_answers_stops_nothing(of_server):
    _, links, url = of_server
    link = links["500 twice"]
    assert link.error is None and len(link.records) == ITERATIONS
    told = [line for line in link.stderr.splitlines() if "trying again" in line]
    assert len(told) == 2 and all(f"reward server {url}: status 500; trying again in " in line for line in told)


def test_mended_and_continued_is_bit_identical(of_function, of_server, straight):
    assert of_function[1]["mended"].error is None
    files = ["roles/policy/adapter.safetensors", "roles/value/adapter.safetensors", "roles/finished.json"]
    for folder in (of_function[0], of_server[0]):
        for file in files:
            assert (folder / "run" / file).read_bytes() == (straight / "run" / file).read_bytes(), (folder.name, file)
        for name in ("metrics.jsonl", "samples.jsonl"):
            ours, undisturbed = ([lasting(x) for x in lines(where, name)] for where in (folder, straight))
            assert ours == undisturbed, (folder.name, name)
