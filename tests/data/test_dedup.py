"""Near duplicates against a plain Jaccard, planted ground truth, and datasketch's MinHash."""

import random
import re

import datasketch
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmjax.data import dedup, shingles
from llmjax.data.clean import clean
from llmjax.data.dedup import SKETCH_SIZE, near_duplicates, sketch
from llmjax.data.read import decode
from llmjax.data.shingles import WORDS, Ragged, jaccard, shingle_sets

VOCABULARY = [f"w{i}" for i in range(5000)]


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def loops(request, monkeypatch):
    """Everything holds with and without the compiled loops."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        for module in (shingles, dedup):
            monkeypatch.setattr(module, "compiled", lambda: None)


def plain_shingles(text: str) -> set[tuple[str, ...]]:
    """The definition: words without case or punctuation, Chinese and Japanese characters one by one."""
    words = re.findall(r"[\u3000-\u9fff]|[^\W\u3000-\u9fff]+", text.lower())
    return {tuple(words[i:i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))} if words else set()


def plain_jaccard(a: str, b: str) -> float:
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b)


def candidates(texts: list[str], *, threshold: float) -> list[tuple[int, int]]:
    """Pairs of texts that agree on a band, each once, in order."""
    keys = dedup.band_keys(sketch(shingle_sets(texts)), threshold=threshold).view(np.int64)
    buckets = [pa.table({"order": np.arange(len(texts)), "band": band}) for band in keys.T]
    return sorted({(row["a"], row["b"]) for table in buckets for row in dedup.bucket_pairs(table).to_pylist()})


def edited(words: list[str], share: float, rng: random.Random) -> str:
    return " ".join(rng.choice(VOCABULARY) if rng.random() < share else word for word in words)


def pairs_of_every_similarity(num: int, *, length: int, seed: int) -> list[str]:
    """Texts 2i and 2i + 1 are an original and a copy with a share of its words replaced."""
    rng = random.Random(seed)
    texts = []
    for i in range(num):
        words = rng.choices(VOCABULARY, k=length)
        texts += [" ".join(words), edited(words, 0.2 * i / num, rng)]
    return texts


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.sampled_from("ab c_1 .,\n-—“”«»éßЖ한中文字。")), min_size=1, max_size=6))
def test_shingles_are_the_plain_ones(texts):
    found = shingle_sets(texts)
    assert np.diff(found.offsets).tolist() == [len(plain_shingles(t)) for t in texts]
    for a, b in zip(range(len(texts)), range(1, len(texts)), strict=False):
        if len(found[a]) and len(found[b]):
            assert jaccard(found[a], found[b]) == pytest.approx(plain_jaccard(texts[a], texts[b]))


def test_shingles_do_not_depend_on_what_is_hashed_beside_them(monkeypatch):
    texts = pairs_of_every_similarity(10, length=30, seed=1) + ["", "one two", "ONE, two!"]
    together = shingle_sets(texts)
    monkeypatch.setattr(shingles, "CHUNK_BYTES", 1)
    alone = shingle_sets(texts)
    np.testing.assert_array_equal(together.values, alone.values)
    np.testing.assert_array_equal(together.offsets, alone.offsets)
    np.testing.assert_array_equal(together[len(texts) - 1], together[len(texts) - 2])


def test_long_words_are_cut_and_documents_never_share_a_word():
    joined = Ragged.concatenate(list(shingles.word_chunks(["ab", "cd" * 40, "", "é-é x"])), np.uint64)
    assert np.diff(joined.offsets).tolist() == [1, 2, 0, 3]
    assert joined[3][0] == joined[3][1] != joined[3][2]


def test_the_compiled_loops_give_the_numbers_of_numpy(data_dir):
    loops = pytest.importorskip("llmjax.data.compiled")
    raw = (data_dir / "books" / "entre_nous_fr.txt").read_bytes() + "漢字かな “quoted” a…b\xa0ÿ x\u2060y".encode()
    text, offsets = np.frombuffer(raw, np.uint8), np.array([0, 0, 70_000, 70_001, len(raw)])
    text = np.char.lower(text.view("S1")).view(np.uint8)
    for plain, fast in zip(shingles._hash_words(text, offsets), loops.hash_words(text, offsets), strict=True):
        np.testing.assert_array_equal(plain, fast)


def test_sketches_estimate_jaccard_as_well_as_datasketch():
    texts = pairs_of_every_similarity(60, length=300, seed=2)
    sets = shingle_sets(texts)
    sketches = sketch(sets)
    ours, theirs = [], []
    for a in range(0, len(texts), 2):
        true = plain_jaccard(texts[a], texts[a + 1])
        assert jaccard(sets[a], sets[a + 1]) == pytest.approx(true)
        first, second = (datasketch.MinHash(num_perm=SKETCH_SIZE) for _ in range(2))
        first.update_batch([s.tobytes() for s in sets[a]])
        second.update_batch([s.tobytes() for s in sets[a + 1]])
        ours.append((sketches[a] == sketches[a + 1]).mean() - true)
        theirs.append(first.jaccard(second) - true)
    # A mean of 100 Bernoulli bins has a standard error of at most 0.05; 60 pairs leave 0.0065 for the bias.
    assert abs(np.mean(ours)) < 0.02
    assert np.std(ours) < 0.06
    assert np.std(ours) < 1.5 * np.std(theirs)


def test_sketches_of_small_sets_are_full_and_equal_for_equal_sets():
    sets = shingle_sets(["one", "ONE!", "two words", ""])
    sketches = sketch(sets)
    np.testing.assert_array_equal(sketches[0], sketches[1])
    assert not (sketches[0] == sketches[2]).any()
    assert len(set(sketches[3])) == 1  # a text without words stays empty


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_candidates_hold_nearly_every_pair_above_the_threshold_and_few_others(threshold):
    texts = pairs_of_every_similarity(300, length=120, seed=3)
    true = {(a, a + 1) for a in range(0, len(texts), 2) if plain_jaccard(texts[a], texts[a + 1]) >= threshold}
    found = candidates(texts, threshold=threshold)
    assert len(true & set(found)) >= 0.97 * len(true) > 10
    assert found == sorted(set(found))
    assert len(found) <= len(texts)


def test_planted_near_duplicates_are_found_exactly():
    rng = random.Random(4)
    originals = [rng.choices(VOCABULARY, k=400) for _ in range(60)]
    texts = [" ".join(words) for words in originals]
    copies = {}  # index -> index of its original
    for original, words in enumerate(originals[::3]):
        for share in (0.0, 0.005, 0.01):
            copies[len(texts)] = 3 * original
            texts.append(edited(words, share, rng).upper())
    texts += [edited(words, 0.3, rng) for words in originals[:20]]  # related, but below the threshold
    found = near_duplicates(texts, threshold=0.7)
    assert {i: match.kept for i, match in found.items()} == copies
    for i, match in found.items():
        assert match.jaccard == pytest.approx(plain_jaccard(texts[i], texts[match.kept]))


def test_pairs_below_the_threshold_are_never_duplicates():
    texts = pairs_of_every_similarity(300, length=120, seed=7)
    true = {a + 1: a for a in range(0, len(texts), 2) if plain_jaccard(texts[a], texts[a + 1]) >= 0.7}
    close = {a + 1 for a in range(0, len(texts), 2) if 0.6 <= plain_jaccard(texts[a], texts[a + 1]) < 0.7}
    seconds = {b for _, b in candidates(texts, threshold=0.7)}
    found = {i: match.kept for i, match in near_duplicates(texts, threshold=0.7).items()}
    assert close & seconds
    assert found.items() <= true.items()
    assert len(found) >= 0.97 * len(true)


def test_a_chain_is_one_group_and_its_first_text_stays():
    rng = random.Random(5)
    words = rng.choices(VOCABULARY, k=400)
    chain = [words]
    for link in range(4):  # each link replaces another stretch: neighbours are alike, the ends are not
        chain.append(chain[-1][:link * 60] + rng.choices(VOCABULARY, k=60) + chain[-1][link * 60 + 60:])
    texts = [" ".join(words) for words in chain]
    assert plain_jaccard(texts[0], texts[4]) < 0.7 <= plain_jaccard(texts[3], texts[4])
    found = near_duplicates(texts, threshold=0.7)
    assert {i: match.kept for i, match in found.items()} == {1: 0, 2: 0, 3: 0, 4: 0}


def test_a_crowd_of_copies_is_one_group():
    rng = random.Random(6)
    words = rng.choices(VOCABULARY, k=500)
    found = near_duplicates([edited(words, 0.01, rng) for _ in range(200)], threshold=0.7)
    assert {i: match.kept for i, match in found.items()} == dict.fromkeys(range(1, 200), 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", "...", "a", "A.", "b", "a b c d e f", "a b c d e f g", "日本語の文"]),
                max_size=12))
def test_groups_on_tiny_texts_equal_the_plain_quadratic_algorithm(texts):
    group = list(range(len(texts)))
    for b in range(len(texts)):
        for a in range(b):
            if plain_shingles(texts[a]) and plain_shingles(texts[b]) and plain_jaccard(texts[a], texts[b]) >= 0.9:
                group = [group[a] if g == group[b] else g for g in group]
    found = near_duplicates(texts, threshold=0.9)
    assert {i: match.kept for i, match in found.items()} == {i: g for i, g in enumerate(group) if g != i}


def test_exact_duplicates_name_the_first():
    table = pa.table({"order": [10, 20, 30, 40, 50, 60], "doc_id": list("abacba")})
    assert dedup.exact_duplicates(table).to_pylist() == [
        {"order": 30, "kept": 10}, {"order": 50, "kept": 20}, {"order": 60, "kept": 10}]


def test_a_copy_of_a_near_duplicate_points_at_what_stays():
    rng = random.Random(8)
    words = rng.choices(VOCABULARY, k=400)
    texts = [" ".join(words), edited(words, 0.01, rng)]
    table = pa.table({"order": [7, 3, 9], "doc_id": ["b", "a", "b"], "text": [texts[1], texts[0], texts[1]]})
    found = dedup.find(dedup.signatures(table, threshold=0.7), threshold=0.7).to_pylist()
    assert [(row["order"], row["kept"], row["jaccard"] is None) for row in found] == [(7, 3, False), (9, 3, True)]


def test_the_steps_of_an_engine_give_what_one_machine_finds():
    texts = pairs_of_every_similarity(60, length=200, seed=9) * 2
    table = pa.table({"order": np.arange(len(texts)) * 5, "doc_id": [str(i) for i in range(len(texts))], "text": texts})
    signed = dedup.signatures(table, threshold=0.7)
    sides = {row["order"]: row for row in signed.to_pylist()}
    pairs = sorted({(5 * a, 5 * b) for a, b in candidates(texts, threshold=0.7)})
    joined = pa.table({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]}
                      | {f"{name}_{side}": pa.array([sides[pair[i]][name] for pair in pairs], signed[name].type)
                         for name in ("shingles", "sketch") for i, side in enumerate("ab")})
    found = dedup.components(dedup.verify(joined, threshold=0.7))
    assert found.equals(dedup.find(signed, threshold=0.7).select(["order", "kept"]))


def test_two_editions_of_a_book_are_near_duplicates(data_dir):
    paths = sorted((data_dir / "books").glob("*.txt"))
    texts = [clean(decode(path.read_bytes())[0], "prose") for path in paths]
    found = near_duplicates(texts, threshold=0.7)
    assert {paths[i].stem: paths[match.kept].stem for i, match in found.items()} == {
        "devils_dictionary_older_edition": "devils_dictionary",
        "news_from_nowhere_older_edition": "news_from_nowhere"}
