"""Personal data and secrets: what is planted is found, check digits decide, and real books hold almost none."""

import random

import pytest

from llmjax.data.pii import PersonalData, find, redact
from llmjax.data.read import decode
from llmjax.data.stage import documents_schema

PLANTED = {
    "email": ["john.doe@example.com", "a_b+c@mail.co.uk", "x1@sub.domain.org"],
    "ip": ["8.8.8.8", "142.250.74.14", "2001:4860:4860::8888"],
    "phone": ["+49 30 1234567", "+1 (212) 555-0143", "(212) 555-0143", "212-555-0143"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "card": ["4111 1111 1111 1111", "5500-0055-5555-5559"],
    "ssn": ["123-45-6789"],
    "secret": ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "aB3" * 12, "hf_" + "Zx9" * 11,
               "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"],
}
HARMLESS = ["127.0.0.1", "192.168.1.1", "version 1.2.3.4.5", "4111 1111 1111 1112", "DE89 3704 0044 0532 0130 01",
            "000-12-3456", "foo@bar", "1234567890123", "12:30:45", "in 1890-1914", "http://host:8080/path", "§ 212-555",
            "password = getpass()", "token: <redacted>", "+15 degrees", "ISBN 978-3-16-148410-0"]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PLANTED.items() for value in values])
def test_each_kind_is_found_where_it_stands(kind, value):
    text = f"Write to {value}, please; nothing else."
    (finding,) = find(text)
    assert (finding.kind, text[finding.start:finding.stop]) == (kind, value)
    assert redact(text, [finding]) == f"Write to <{kind.upper()}>, please; nothing else."


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_stays(text):
    assert find(text) == []


def test_only_the_secret_of_an_assignment_or_address_goes():
    text = 'api_key = "s3cr3tV4lu3x9Q"; url = postgres://bob:hunter22@db/x'
    assert redact(text, find(text)) == 'api_key = "<SECRET>"; url = postgres://bob:<SECRET>@db/x'


def test_planted_in_real_books_recall_and_precision_are_one_and_redacting_twice_changes_nothing(data_dir):
    rng = random.Random(0)
    books = [decode((data_dir / "books" / name).read_bytes())[0] for name in (
        "american_adventures.txt", "jack_sheppard.txt", "entre_nous_fr.txt")]
    natural = {book[finding.start:finding.stop] for book in books for finding in find(book)}
    assert natural == {"(801) 596-1887", "business@pglaf.org", "gbnewby@pglaf.org"}  # Project Gutenberg's own
    planted = found = 0
    for book in books:
        lines = book[40_000:-40_000].split("\n")  # without them
        values = [rng.choice(values) for values in PLANTED.values() for _ in range(15)]
        for value in values:
            lines.insert(rng.randrange(len(lines)), f"he wrote {value} and left")
        text = "\n".join(lines)
        findings = find(text)
        planted += len(values)
        found += sum(text[f.start:f.stop] in values for f in findings)
        assert len(findings) == len(values)
        assert find(redact(text, findings)) == []
    assert found == planted


def test_the_stage_counts_redacts_and_drops():
    import pyarrow as pa

    rows = {field.name: [None if field.nullable else ""] * 2 for field in documents_schema()}
    table = pa.table(rows | {"order": [0, 1], "text": ["mail a@b.org", "clean"]}, schema=documents_schema())
    redacted = PersonalData("redact")(table)
    assert (redacted["text"].to_pylist(), redacted["pii"].to_pylist()) == (["mail <EMAIL>", "clean"], [1, 0])
    assert PersonalData("drop")(table)["reason"].to_pylist() == ["pii", None]
