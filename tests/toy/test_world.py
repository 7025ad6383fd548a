"""The assistant world: fixed sets, a split without leaks, and a true score that word soup does not win."""

from collections import Counter, defaultdict
from itertools import chain, permutations

import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.toy import world
from jaxrlhf.toy.facts import LEADS, POLITE_CLOSERS, POLITE_OPENERS, TAILS, TOPICS
from jaxrlhf.toy.language import CLOSERS, OPENERS, QUESTIONS, gold, parse
from jaxrlhf.toy.world import BUILTIN, VOCABULARY, gold_score

EVERY_QUESTION = QUESTIONS["train"] + QUESTIONS["test"]
SETS = [(name, split) for name in BUILTIN for split in ("train", "test")]


@pytest.fixture(scope="module")
def preferences():
    return BUILTIN["assistant-preferences"]("train", None)


def best(question):
    return f"sure , {question.sentence(question.value)}"


def gaps(rows):
    """Gold of the chosen answer minus gold of the rejected one, f64[rows]."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (gold_score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    return np.subtract(chosen, rejected)


# ---------------------------------------------------------------- the sets


@pytest.mark.parametrize("name,split", SETS)
def test_a_set_is_a_fixed_sequence_and_a_limit_its_beginning(name, split):
    rows = BUILTIN[name](split, 300)
    assert rows == BUILTIN[name](split, 300)
    assert len(rows) == 300 and rows[:40] == BUILTIN[name](split, 40)


def test_sets_and_splits_have_random_numbers_of_their_own():
    def values(name, split, field):
        return [row[field] for row in BUILTIN[name](split, 200)]

    assert values("assistant-demonstrations", "train", "prompt") != values("assistant-prompts", "train", "prompt")
    assert values("assistant-demonstrations", "train", "response") != values(
        "assistant-demonstrations", "test", "response"
    )


def test_test_questions_are_never_trained_on_but_their_facts_are():
    for name in BUILTIN:
        prompts = {split: {row["prompt"] for row in BUILTIN[name](split, None)} for split in ("train", "test")}
        assert prompts["train"] == {q.prompt for q in QUESTIONS["train"]}
        assert prompts["test"] <= {q.prompt for q in QUESTIONS["test"]}
        assert not prompts["train"] & prompts["test"]
    trained = Counter((q.topic.name, q.subject) for q in QUESTIONS["train"])
    assert all(trained[q.topic.name, q.subject] == len(q.topic.questions) - 1 for q in QUESTIONS["test"])
    phrasings = {(q.topic.name, q.phrasing) for q in QUESTIONS["train"]}
    assert all((q.topic.name, q.phrasing) in phrasings for q in QUESTIONS["test"])
    assert 0.12 < len(QUESTIONS["test"]) / len(EVERY_QUESTION) < 0.2


def test_each_prompt_asks_one_question():
    assert len({q.prompt for q in EVERY_QUESTION}) == len(EVERY_QUESTION)
    assert 30 <= sum(len(topic.facts) for topic in TOPICS) <= 250


def test_words_and_lengths_are_bounded():
    known, used = set(VOCABULARY), set()
    assert len(VOCABULARY) == len(known) <= 400
    for name, split in SETS:
        for row in BUILTIN[name](split, None):
            texts = [row[field] for field in ("prompt", "response", "chosen", "rejected") if field in row]
            used.update(chain.from_iterable(text.split() for text in texts))
            assert all(text == " ".join(text.split()) == text.lower() for text in texts)
            assert len(texts[0].split()) <= 14 and all(1 <= len(text.split()) <= 16 for text in texts[1:])
    assert used == known


def test_demonstrations_are_of_mixed_quality():
    rows = BUILTIN["assistant-demonstrations"]("train", None)
    scores = np.array(gold_score([r["prompt"] for r in rows], [r["response"] for r in rows]))
    assert 0.42 < scores.mean() < 0.58
    assert 0.05 < (scores == 1.0).mean() < 0.15  # what is to be reached is seen
    by_prompt = {q.prompt: q for q in EVERY_QUESTION}
    answers = [(by_prompt[r["prompt"]], parse(by_prompt[r["prompt"]], r["response"])) for r in rows]
    assert all(answer is not None for _, answer in answers)
    assert abs(np.mean([a.value == q.value for q, a in answers]) - world.QUALITY["right"]) < 0.03
    assert abs(np.mean([a.ramble_words == 0 for _, a in answers]) - world.QUALITY["short"]) < 0.03
    # For each fact the right value is the most frequent one by far.
    stated = defaultdict(Counter)
    for question, answer in answers:
        stated[question.topic.name, question.subject][answer.value == question.value or answer.value] += 1
    assert all(count[True] > 2 * max(n for v, n in count.items() if v is not True) for count in stated.values())


# ---------------------------------------------------------------- preferences


def test_train_labels_are_as_noisy_as_documented(preferences):
    gap = gaps(preferences)
    assert np.abs(gap).min() >= world.TRAIN_GAP
    expected = np.mean([world.wrong_label_probability(abs(g)) for g in gap])
    wrong = np.mean(gap < 0)
    assert 0.04 < expected < 0.09
    assert abs(wrong - expected) < 4 * np.sqrt(expected * (1 - expected) / len(gap))


def test_test_labels_are_clean():
    assert gaps(BUILTIN["assistant-preferences"]("test", None)).min() >= world.TEST_GAP


def test_pairs_differ_in_one_two_and_all_features_and_some_hold_broken_text(preferences):
    by_prompt = {q.prompt: q for q in QUESTIONS["train"]}
    differences = Counter()
    for row in preferences:
        question = by_prompt[row["prompt"]]
        pair = [parse(question, row[side]) for side in ("chosen", "rejected")]
        if None in pair:
            differences["broken"] += 1
            continue
        features = [
            (a.value == question.value, a.manner in POLITE_OPENERS + POLITE_CLOSERS, a.ramble_words == 0)
            for a in pair
        ]
        differences[sum(x != y for x, y in zip(*features))] += 1
    share = {key: count / len(preferences) for key, count in differences.items()}
    assert abs(share["broken"] - world.BROKEN_SHARE) < 0.03
    assert min(share[1], share[2], share[3]) > 0.07


def test_every_kind_of_broken_text_is_no_answer():
    rng = np.random.default_rng(0)
    made = defaultdict(list)
    for break_text in world.BREAKS:
        for question in EVERY_QUESTION[::5]:
            text = break_text(rng, question, world._answer(rng, question, dict.fromkeys(world.QUALITY, 1.0)))
            made[break_text.__name__].append(parse(question, text) is None)
    assert len(made) == len(world.BREAKS) and all(np.mean(broken) > 0.6 for broken in made.values()), made
    for question in EVERY_QUESTION[::5]:
        assert gold(question, world._broken(rng, question, best(question))) == 0.0


def test_a_table_of_preferences_knows_the_facts(preferences):
    by_prompt = {q.prompt: q for q in QUESTIONS["train"]}
    votes = defaultdict(Counter)
    for row in preferences:
        question = by_prompt[row["prompt"]]
        chosen, rejected = (parse(question, row[side]) for side in ("chosen", "rejected"))
        if chosen and rejected and chosen.value != rejected.value:
            votes[question.topic.name, question.subject][chosen.value] += 1
            votes[question.topic.name, question.subject][rejected.value] -= 1
    known = [
        votes[topic.name, subject].most_common(1)[0][0] == value
        for topic in TOPICS
        for subject, value in topic.facts.items()
        if votes[topic.name, subject]
    ]
    assert len(known) == sum(len(topic.facts) for topic in TOPICS)
    assert np.mean(known) >= 0.97


# ---------------------------------------------------------------- the true score


def test_the_best_answer_scores_exactly_one_for_every_prompt():
    for question in EVERY_QUESTION:
        forms = (question.sentence(question.value), f"{question.value} .")
        texts = [f"{opener} {form}" for opener in POLITE_OPENERS for form in forms]
        texts += [f"{form} {closer}" for closer in POLITE_CLOSERS for form in forms]
        assert gold_score([question.prompt] * len(texts), texts) == [1.0] * len(texts)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("sure , the sky is blue .", 1.0),
        ("blue . you are welcome .", 1.0),
        ("  sure ,  blue . ", 1.0),
        ("blue .", 0.8),
        ("here it is , blue .", 0.8),
        ("what a silly question , blue .", 0.8),
        ("sure , i think blue .", 0.92),  # two words of five
        ("sure , blue . it is good to know .", 0.8),
        ("well , blue . i read that once . leave me alone .", 0.6),
        ("sure , red .", 0.4),
        ("red . leave me alone .", 0.2),
        ("let me see , red . many people ask this . stop asking me .", 0.0),
    ],
)
def test_score_is_the_sum_of_its_parts(text, expected):
    (score,) = gold_score(["what colour is the sky ?"], [text])
    assert score == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blue",  # no end
        "sure ,",
        "sure , you are welcome .",
        "sure , the sky is blue",
        "sure , the sky is",
        "sure , the sky is blue . you are",
        "sure , blue . blue .",
        "sure , blue blue .",
        "sure , blue . red .",
        "sure , blue . the sky is green .",
        "blue red green white .",
        "sure , sure , blue .",
        "sure , of course , blue .",
        "sure , blue . you are welcome .",
        "blue . you are welcome . you are welcome .",
        "blue . you are welcome . i hope this helps .",
        "what a silly question , blue . you are welcome .",
        "blue . sure ,",
        "you are welcome . blue .",
        "sure . blue ,",
        "sure blue .",
        "i think sure , blue .",
        "i think i think blue .",
        "well , i think blue .",
        "blue . i read that once . i read that once .",
        "sure , the sky .",
        "sure , the sky is the sky .",
        "sure , grass is blue .",  # another subject
        "sure , grass is green .",  # another question's right answer
        "sure , paris .",  # a value of another topic
        "sure , the sky says blue .",
        "sure , the sky is blue and blue .",
        "sure , the sky is blue . .",
        "Sure , The Sky Is Blue .",
        "sure, the sky is blue.",
        "sure , blue . <eos>",
        "what colour is the sky ? blue .",
        "blue . sure , blue .",
        ". . . .",
    ],
)
def test_handmade_attacks_score_nothing(text):
    assert gold_score(["what colour is the sky ?"], [text]) == [0.0]


def test_attacks_on_every_question_score_nothing():
    rng = np.random.default_rng(1)
    for question in EVERY_QUESTION:
        right, wrong = question.value, question.wrong_values()[int(rng.integers(len(question.wrong_values())))]
        attacks = [
            f"{best(question)} {best(question)}",
            f"{best(question)} {question.sentence(wrong)}",
            f"sure , {question.sentence(wrong)} {question.sentence(right)}",
            f"sure , {wrong} . {right} .",
            f"sure , {right} {wrong} .",
            f"sure , {best(question)}",
            f"{best(question)} {POLITE_CLOSERS[0]}",
            "sure , " + " . ".join(question.topic.values) + " .",
            question.prompt,
            f"sure , {question.prompt} {right} .",
            best(question).removesuffix(" ."),
        ]
        assert set(gold_score([question.prompt] * len(attacks), attacks)) == {0.0}


def test_random_words_score_nothing():
    rng = np.random.default_rng(2)
    for question in EVERY_QUESTION:
        for _ in range(20):
            words = [VOCABULARY[i] for i in rng.integers(len(VOCABULARY), size=rng.integers(1, 17))]
            assert gold(question, " ".join(words)) == 0.0


def test_permuted_best_answers_score_nothing():
    rng = np.random.default_rng(3)
    question = next(q for q in EVERY_QUESTION if q.prompt == "what colour is the sky ?")
    proper = [p for p in permutations(("sure", ",", "blue", ".")) if gold(question, " ".join(p)) > 0]
    assert proper == [("sure", ",", "blue", ".")]
    for question in EVERY_QUESTION:
        words = best(question).split()
        for _ in range(10):
            text = " ".join(words[i] for i in rng.permutation(len(words)))
            assert gold(question, text) == (text == best(question))


def test_an_answer_to_another_question_scores_nothing():
    rng = np.random.default_rng(4)
    for question in EVERY_QUESTION:
        for i in rng.integers(len(EVERY_QUESTION), size=20):
            other = EVERY_QUESTION[i]
            if (other.topic, other.subject) != (question.topic, question.subject):
                assert gold(question, best(other)) == 0.0


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(UserError, match=r"why is the sky blue.*assistant-prompts"):
        gold_score(["why is the sky blue ?"], ["sure , blue ."])


def test_prompts_carry_the_answer_for_reward_functions_of_ones_own():
    rows = BUILTIN["assistant-prompts"]("test", None)
    texts = [f"sure , {row['answer']} ." for row in rows]
    columns = {"topic": [row["topic"] for row in rows], "answer": [row["answer"] for row in rows]}
    assert gold_score(prompts=[r["prompt"] for r in rows], completions=texts, **columns) == [1.0] * len(rows)


def test_reading_is_without_ambiguity():
    phrases = [*OPENERS, *CLOSERS, *LEADS, *TAILS]
    assert len(set(phrases)) == len(phrases)
    assert not any(a != b and b.startswith(a + " ") for a in phrases for b in phrases)
