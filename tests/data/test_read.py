"""Sources and reading: encodings, JSONL, provenance, and what is refused."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.read import Document, Removal, UndecodableError, decode, read
from llmjax.data.registry import find_sources


def read_all(spec: str) -> list[Document | Removal]:
    return [item for source in find_sources(spec, field="data.sources", licence="mine") for item in read(source)]


@pytest.mark.parametrize(("raw", "text", "encoding"), [
    ("naïve".encode(), "naïve", "utf-8"),
    (b"\xef\xbb\xbfmarked", "marked", "utf-8"),
    ("héé".encode("utf-16"), "héé", "utf-16"),
    ("één land, geïsoleerd".encode("latin-1"), "één land, geïsoleerd", "latin-1"),
    ("“quoted” — café".encode("cp1252"), "“quoted” — café", "cp1252"),
    ("Ein größeres Übel ".encode() + b"\xc3 x", "Ein größeres Übel \ufffd x", "utf-8, damaged"),
])
def test_decode_finds_the_encoding(raw, text, encoding):
    assert decode(raw) == (text, encoding)


@pytest.mark.parametrize(("raw", "reason"), [
    (b"\x7fELF\0\0\1", "binary"),
    ("Это русский текст без пробелов".encode("koi8-r"), "undecodable"),
])
def test_decode_refuses_what_is_no_latin_text(raw, reason):
    with pytest.raises(UndecodableError, match=reason):
        decode(raw)


def test_python_files_follow_their_cookie(tmp_path):
    (tmp_path / "good.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-thing\n")
    (tmp_path / "lying.py").write_bytes(b"# coding: utf-8\nname = '\xe9'\n")
    good, lying, unknown = read_all(f"{tmp_path}/*.py")
    assert isinstance(good, Document)
    assert (good.text.splitlines()[1], good.encoding) == ("name = 'é'", "iso-8859-1")
    assert [(item.id.rpartition("/")[2], item.reason) for item in (lying, unknown)] == [
        ("lying.py", "undecodable"), ("unknown.py", "undecodable")]


def test_jsonl_keeps_ids_lines_and_stated_licences(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [{"id": "x", "text": "one"}, {"id": 7, "text": "two", "license": "MIT"}]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    assert [(d.id, d.text, d.licence, d.path) for d in read_all(str(path))] == [
        ("x", "one", "mine", f"{path}:1"), ("7", "two", "MIT", f"{path}:3")]


@pytest.mark.parametrize(("line", "message"), [
    ('{"id": 1, "text": ', r":1: not a line of JSON"),
    ('{"id": 1}', r":1: a document is a JSON object with a string 'text'"),
    ('["text"]', r":1: a document is a JSON object"),
    ('{"text": "t"}', r":1: a document needs an 'id'"),
])
def test_bad_jsonl_names_its_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(RunError, match=message):
        read_all(f"{tmp_path}/a.jsonl")


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b'{"id": 1, "text": "t"}\n', mtime=0)[:-9]])
def test_broken_gzip_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(RunError, match="not a whole gzip file"):
        read_all(f"{tmp_path}/a.jsonl.gz")


def test_sources_that_do_not_exist_or_do_not_fit(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(RunError, match=r"data.sources: 'stdlub' is no file, .* not one of stdlib"):
        read_all("stdlub")
    with pytest.raises(RunError, match="matches none"):
        read_all(f"{tmp_path}/*.txt")
    with pytest.raises(ConfigError, match="suffixes"):
        read_all(f"{tmp_path}/a.pdf")
    with pytest.raises(ConfigError, match=r"is a folder; name files or a glob"):
        read_all(str(tmp_path))


def test_globs_are_sorted_and_several_sources_keep_their_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read_all(f" {tmp_path}/c.md, {tmp_path}/*.txt ,")] == ["c.md", "a.txt", "b.txt"]


def test_stdlib_is_the_running_interpreters_without_tests_or_installed_packages():
    (source,) = find_sources("stdlib", field="data.sources", licence="unused")
    ids = [file.id for file in source.files]
    assert source.licence == "PSF-2.0"
    assert "json/decoder.py" in ids
    assert len(ids) == len(set(ids))
    assert all(Path(sysconfig.get_path("stdlib"), id_).is_file() for id_ in ids)
    assert not [id_ for id_ in ids if {"site-packages", "test", "tests", "idle_test"} & set(Path(id_).parts)]
    assert not [item for item in read(source) if isinstance(item, Removal)]
