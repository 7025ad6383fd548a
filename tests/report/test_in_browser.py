"""The report of a real run in headless Chromium: curves are drawn, no text of a model runs or is read as HTML."""

import itertools
import json

import pytest
from browser import CHROMIUM, Page

from jaxrlhf.config import RunConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.hf.weights import save_pretrained
from jaxrlhf.report.page import write_report
from jaxrlhf.stages.run import run_stages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

HOSTILE = "</script><script>document.title='taken'</script><img/src=x/onerror=document.title='taken'>"
WORDS = ["hello", HOSTILE, "🙂", "שלום", "\u202eback", "{{title}}", "--><!--", "__proto__"]
STOP = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_decoder):
    """The directory of a run whose answers are random words of `WORDS`. Its name has to be escaped too."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = build_word_tokenizer(WORDS)
    base = make_decoder(vocabulary=tokenizer.vocab_size, stop_tokens=(STOP,))
    save_pretrained(str(folder / "model"), base, tokenizer=tokenizer)
    rows = [json.dumps({"prompt": f"{a} {b}"}) for a, b in itertools.product(WORDS, WORDS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    run_stages(RunConfig.model_validate({
        "run_dir": str(folder / "run <b>&amp;"), "stages": ["ppo"], "model": {"path": str(folder / "model")},
        "ppo": {
            "data": {"path": str(folder / "prompts.jsonl")}, "iterations": 12, "batch_size": 8, "max_prompt_tokens": 8,
            "sampling": {"max_new_tokens": 12}, "adapter": {"rank": 2, "target_modules": ["q_proj"]},
            "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 5}},
            "update": {"epochs": 1, "minibatches": 2}, "evaluation": {"prompts": 8}, "sample_every": 4,
        },
    }))  # fmt: skip
    return folder / "run <b>&amp;"


@pytest.fixture(scope="module")
def page():
    page = Page()
    yield page
    page.close()


def complaints(page):
    """Messages, exceptions and requests since the last call, but for the report itself and images in it."""
    found = []
    for event in page.events:
        method, about = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            found.append(event)
        if method == "Network.requestWillBeSent":
            url = about["request"]["url"]
            found += [] if url.startswith("data:") or url.endswith("/report.html") else [event]
    page.events.clear()
    return found


def scroll_through(page):
    """Scrolls to every chart and waits until it is drawn."""
    for i in range(page.value("document.querySelectorAll('.plot').length")):
        page.value(f"document.querySelectorAll('.plot')[{i}].scrollIntoView({{behavior: 'instant'}})")
        page.until(f"document.querySelectorAll('.plot')[{i}].dataset.drawn")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_report_of_a_run(page, run, width, dark):
    page.events.clear()
    page.open(run / "report.html", width, dark)
    early = page.value("document.querySelectorAll('[data-drawn]').length")
    scroll_through(page)
    charts = page.value("document.querySelectorAll('.plot').length")
    assert charts >= 12 and early < charts, "charts are drawn when they come into view"
    assert page.value("document.querySelectorAll('.plot .scatterlayer path.js-line, .plot .hm image').length") >= charts
    assert page.value("document.querySelectorAll('.plot.failed').length") == 0
    assert page.value("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    assert page.value("document.title").startswith(run.name), "no text of the run ran as a script"
    assert page.value("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    shown = page.value("document.getElementById('main').innerText")
    for word in (HOSTILE, "🙂", "שלום", "{{title}}", "--><!--"):
        assert word in shown, "text of the model is text"
    assert page.value("document.querySelectorAll('main img, main script, main b b').length") == 0
    assert complaints(page) == [], "no message, no exception, no request"


def test_the_keyboard(page, run):
    page.events.clear()
    page.open(run / "report.html", 1280)
    focused = "document.activeElement"
    page.press("Tab")
    assert page.value(f"{focused}.className") == "skip", "the first stop leads past the navigation"
    page.press("Tab")
    assert page.value(f"{focused}.id") == "theme"
    before = page.value("document.documentElement.dataset.theme")
    page.press("Enter")
    assert page.value("document.documentElement.dataset.theme") != before
    outline = page.value(f"getComputedStyle({focused}).outlineStyle + getComputedStyle({focused}).outlineWidth")
    assert outline == "solid3px", "one sees where the focus is"
    seen = []
    for _ in range(200):
        page.press("Tab")
        seen.append(page.value(f"{focused}.tagName + ' ' + ({focused}.getAttribute('role') ?? '')"))
        if "option" in seen[-1]:
            break
    assert {"A ", "SUMMARY ", "SELECT ", "INPUT "} <= set(seen) and "option" in seen[-1]
    token = "document.querySelector('.facts dt').textContent"
    page.press("Home")
    first = page.value(token)
    page.press("ArrowRight")
    assert first.startswith("token 1 of") and page.value(token).startswith("token 2 of")
    assert page.value("[...document.querySelectorAll('button, select, input, summary')].every((e) => e.tabIndex === 0)")
    assert complaints(page) == []


def test_every_chart_has_words_and_numbers(page, run):
    page.open(run / "report.html", 1280)
    assert page.value("[...document.querySelectorAll('.plot')].every((p) => p.getAttribute('aria-label').length > 30)")
    page.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.until("[...document.querySelectorAll('details')].every((d) => d.querySelector('td'))")
    steps = page.value("[...document.querySelector('#curves figure tbody').rows].map((r) => +r.cells[0].textContent)")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [line["step"] for line in metrics]


def test_several_runs_and_evaluations_by_hand(page, write_run, tmp_path):
    """Two seeds and another setting; evaluations, calibration and margins as their stages write them."""
    sample = {
        "prompt": "p", "completion": "ab", "score": 1,
        "tokens": ["a", "b"], "values": [0, 1], "advantages": [-1, None],
    }  # fmt: skip
    bins = [{"confidence": c, "accuracy": c - 0.05, "pairs": 20} for c in (0.6, 0.8, 0.95)]
    samples = [
        {"stage": "reward_model", "step": 9, "calibration": bins, "margins": [-1, 0.5, 2]},
        *({"stage": "ppo", "step": i, "evaluation": {"samples": [sample], "scores": [i, 1, 2]}} for i in (2, 4)),
        {"stage": "ppo", "step": 4, "before": [{"prompt": "p", "completion": "", "score": 0}], "after": [sample]},
    ]
    folders = []
    for i in range(4):
        steps = [{"kl/k1": t * i, "reward/score": t, "evaluation/reward/score": t} for t in range(5)]
        folders.append(write_run(f"run{i}", steps, samples, f"seed: {i}\nppo: {{iterations: {i // 2}}}\n"))
    write_report(folders, tmp_path / "report.html")
    page.events.clear()
    page.open(tmp_path / "report.html", 390)
    scroll_through(page)
    titles = page.value("[...document.querySelectorAll('figure h3')].map((h) => h.textContent)")
    assert {"Calibration of the reward model", "Margins", "Scores of evaluations", "Reward against KL"} <= set(titles)
    bands = "document.querySelectorAll('#curves .plot')[0].data.filter((trace) => trace.fill === 'toself').length"
    assert page.value(bands) == 4, "two pairs of seeds, each in training and evaluation"
    page.value("document.querySelector('.card button').click()")
    assert page.value("document.querySelectorAll('.card li').length") == 4, "before, two evaluations, after"
    assert page.value("document.querySelector('input[value=ratio]').disabled"), "no logprobs after an update here"
    assert page.value("document.documentElement.scrollWidth") <= 390
    assert complaints(page) == []
