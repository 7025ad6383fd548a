"""Near-duplicates: found as by comparing every row with every other, and as a plain Jaccard similarity says."""

import itertools
import random

from broken import WORDS

from jaxrlhf.curation.similarity import LEAST_TRIPLES, TEMPLATE_ROWS, Sketches, clusters, words


def sketched(texts):
    sketches = Sketches()
    for text in texts:
        sketches.add(text)
    return sketches


def triples(text):
    found = words(text)
    return {*zip(found, found[1:], found[2:])}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def test_pairs_are_those_of_all_comparisons():
    rng = random.Random(0)
    texts = []
    for _ in range(150):
        base = rng.choices(WORDS, k=60)
        texts.append(" ".join(base))
        changes = rng.randrange(7)  # 0 gives equal texts
        for place in rng.sample(range(60), changes):
            base[place] = "zebra"
        texts.append(" ".join(base))
    found = set(sketched(texts).pairs(0.8, equal=True))
    sets = list(map(triples, texts))
    wanted = {(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= 0.8}
    assert found == wanted and 50 < len(wanted) < 140


def test_what_makes_short_texts_the_same():
    same = [("Who is it?", "who is  it"), ("Ｈｅｌｌｏ there", "hello there"), ("你好，世界", "你好世界")]
    other = [("2 + 3", "2 - 3"), ("1.5 m", "15 m"), ("the red fox ran", "the red dog ran"), ("a > b", "a < b")]
    for one, two in same:
        assert sketched([one, two]).pairs() == [(0, 1)]
    for one, two in other:
        assert sketched([one, two]).pairs() == []


def test_every_side_must_be_near():
    rng = random.Random(0)
    prompt, answers = " ".join(rng.choices(WORDS, k=300)), [" ".join(rng.choices(WORDS, k=20)) for _ in range(2)]
    sketches = Sketches()
    for answer in answers:
        sketches.add(prompt, answer)
    sketches.add(prompt.upper(), answers[0])
    assert sketches.pairs() == [(0, 2)]


def test_common_instructions_do_not_count():
    rng = random.Random(0)
    instruction = " ".join(rng.choices(WORDS, k=200))
    texts = [f"{instruction} {' '.join(rng.choices(WORDS, k=2 * LEAST_TRIPLES))}" for _ in range(TEMPLATE_ROWS + 1)]
    assert jaccard(*map(triples, texts[:2])) > 0.8 and sketched(texts).pairs() == []
    assert len(sketched(texts[:5]).pairs()) >= 4


def test_clusters_connect_pairs():
    assert clusters(6, [(1, 3), (3, 4), (0, 5)]) == [0, 1, 2, 1, 1, 0]
