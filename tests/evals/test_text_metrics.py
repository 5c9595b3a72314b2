"""BLEU and ROUGE against the libraries called by hand, and the errors of their input files."""

import sys

import pytest

from llmjax.core.errors import RunError
from llmjax.evals import text_metrics

PREDICTIONS = ["the cat sat on the mat", "a quick brown fox jumps", "nothing in common"]
REFERENCES = [("the cat sat on a mat", "a cat is on the mat"), ("the quick brown fox jumped",), ("other words",)]


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    padded = [[r[0] for r in REFERENCES], [REFERENCES[0][1], None, None]]
    expected = sacrebleu.BLEU().corpus_score(PREDICTIONS, padded).score
    assert text_metrics.bleu(PREDICTIONS, REFERENCES) == {"bleu": expected}
    assert text_metrics.bleu(PREDICTIONS, [(p,) for p in PREDICTIONS])["bleu"] == pytest.approx(100)


def test_rouge_is_rouge_scores_best_reference():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    found = text_metrics.rouge(PREDICTIONS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        scorer = rouge_scorer.RougeScorer([name], use_stemmer=True)
        best = [max(scorer.score(r, p)[name].fmeasure for r in refs)
                for p, refs in zip(PREDICTIONS, REFERENCES, strict=True)]
        assert found[name] == pytest.approx(sum(best) / len(best))


def test_pairs_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prediction": "", "reference": "b"}\n\n{"prompt": "c", "references": ["d", "e"]}\n')
    assert text_metrics.read_pairs(path) == [text_metrics.TextPair(("b",), "", None),
                                             text_metrics.TextPair(("d", "e"), None, "c")]


@pytest.mark.parametrize(("content", "message"), [
    ('{"prediction": "a", "reference": "b"}\n{"prediction": "a"}\n', r":2: needs `reference`.*has prediction"),
    ('{"reference": "b"}', r":1: needs `prediction`"),
    ('{"prediction": 3, "reference": "b"}', r":1: needs `prediction`"),
    ('{"prediction": "a", "references": []}', r":1: needs `reference`"),
    ('{"prediction": "a", "references": "bc"}', r":1: needs `reference`"),
    ("[1]", r":1: a list"),
    ("{", r":1: not JSON"),
    ("\n", r"pairs.jsonl: no lines"),
])
def test_a_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        text_metrics.read_pairs(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match="nowhere.jsonl: no such file"):
        text_metrics.read_pairs(tmp_path / "nowhere.jsonl")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RunError, match=r"sacrebleu is not installed: pip install 'llmjax\[eval\]'"):
        text_metrics.bleu(["a"], [("a",)])
