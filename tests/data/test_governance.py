"""The registry stops a build for what it does not know or allow, names it, and keeps holdouts out by path and bytes."""

import datetime
import json

import pytest

from llmjax.core.errors import RunError
from llmjax.core.sections import CurationConfig, DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.data.governance import Registry
from llmjax.data.registry import find_sources

TODAY = datetime.date(2026, 6, 1)
BASE = 'provenance = "somewhere"\ncontact = "me@example.org"\n'


def write(folder, **entries: str):
    text = 'licences = ["MIT", "CC0-1.0"]\n' + "".join(f"[{name}]\n{BASE}{body}\n" for name, body in entries.items())
    (folder / "sources.toml").write_text(text)
    return folder / "sources.toml"


@pytest.fixture
def registry(tmp_path):
    for name in ("a", "exam"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": f"the text of {name} " * 9}) + "\n")
    return write(tmp_path, **{
        "source.good": 'files = ["a.jsonl"]\nlicence = "MIT"',
        "source.closed": 'files = ["a.jsonl"]\nlicence = "CC-BY-NC-4.0"',
        "source.old": 'files = ["a.jsonl"]\nlicence = "MIT"\nretention = 2026-01-01',
        "source.lapsed": 'files = ["a.jsonl"]\nlicence = "MIT"\ncontract = "C-17"\nexpires = 2026-06-01',
        "source.leaky": 'files = ["*.jsonl"]\nlicence = "MIT"',
        "source.unlisted": 'files = ["a.jsonl"]\nlicence = "MIT"\nopt_outs = "missing.txt"',
        "holdout.exam": 'files = ["exam.jsonl"]\nlicence = "CC-BY-NC-4.0"'})


@pytest.mark.parametrize(("name", "role", "message"), [
    ("unknown", "source", "'unknown' is not registered"), ("closed", "source", "'closed' is under CC-BY-NC-4.0, which"),
    ("old", "source", "'old': its retention ended on 2026-01-01"),
    ("lapsed", "source", "'lapsed': its contract ended on 2026-06-01"),
    ("exam", "source", "'exam' is registered .* as a holdout; it is never read as a source"),
    ("good", "holdout", "'good' is registered .* as a source; it is never read as a holdout")])
def test_what_may_not_be_used_stops_with_its_name(registry, name, role, message):
    with pytest.raises(RunError, match=message):
        Registry.load(registry).allowed(name, role, today=TODAY)


def test_what_is_allowed_carries_its_terms(registry):
    (source,) = find_sources("good", field="data.sources", licence="", registry=str(registry))
    assert (source.name, source.licence, source.provenance) == ("good", "MIT", "somewhere")
    assert Registry.load(registry).allowed("lapsed", "source", today=datetime.date(2026, 5, 31)).contract == "C-17"
    (exam,) = find_sources("exam", field="data.holdouts", licence="", registry=str(registry))  # a licence of tests
    assert exam.holdout


def test_holdouts_are_refused_by_path_and_by_bytes(registry):
    with pytest.raises(RunError, match=r"'leaky': .*exam.jsonl is a registered holdout"):
        find_sources("leaky", field="data.sources", licence="", registry=str(registry))
    exam = registry.with_name("exam.jsonl")
    exam.with_name("z.jsonl").write_bytes(exam.read_bytes())
    registry.write_text(registry.read_text().replace('files = ["*.jsonl"]', 'files = ["z.jsonl"]'))
    with pytest.raises(RunError, match=r"'leaky': .*z.jsonl has the bytes of the holdout .*exam.jsonl"):
        find_sources("leaky", field="data.sources", licence="", registry=str(registry))


@pytest.mark.parametrize(("body", "message"), [
    ('files = ["a"]', "source 'x' lacks licence"),
    ('files = ["a"]\nlicence = "MIT"\nlicense = "MIT"', "unknown fields license"),
    ('files = ["a"]\nlicence = "MIT"\npii = "maybe"', "pii='maybe', which is none of none, redact, drop"),
    ("files = [", "cannot be read")])
def test_a_malformed_registry_says_where(tmp_path, body, message):
    with pytest.raises(RunError, match=message):
        Registry.load(write(tmp_path, **{"source.x": body}))


def test_a_missing_list_of_opt_outs_stops_the_build(registry):
    with pytest.raises(RunError, match=r"'unlisted': its opt-outs .*missing.txt are missing"):
        find_sources("unlisted", field="data.sources", licence="", registry=str(registry))


def test_a_build_heeds_opt_outs_and_the_pii_policy(tmp_path):
    texts = {"x": "the first of the documents, mail a@b.org " * 9, "y": "one that opted out " * 9, "z": "kept " * 30}
    lines = [json.dumps({"id": id_, "text": text, "url": f"u/{id_}"}) for id_, text in texts.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "out.txt").write_text("u/y\n")
    registry = write(tmp_path, **{
        "source.s": 'files = ["a.jsonl"]\nlicence = "MIT"\npii = "drop"\nopt_outs = "out.txt"'})
    config = DataConfig(sources="s", holdout_fraction=0, min_bytes=1, curation=CurationConfig(registry=str(registry)))
    manifest = build(config, TokenizerConfig(vocab_size=300), tmp_path / "built")
    assert manifest.dropped == {"opted_out": 1, "pii": 1}
    with pytest.raises(RunError, match="'elsewhere.jsonl' is not registered"):
        build(DataConfig(sources="elsewhere.jsonl", curation=config.curation), TokenizerConfig(), tmp_path / "other")
