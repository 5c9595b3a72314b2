"""Readers of structured formats, each against a file that another library wrote."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.core.errors import RunError
from llmjax.data.clean import clean
from llmjax.data.dedup import near_duplicates
from llmjax.data.formats import decode_page
from llmjax.data.read import batches
from llmjax.data.registry import find_sources


def rows(spec: str, *, field: str = "data.sources") -> list[dict]:
    return [row for source in find_sources(spec, field=field, licence="mine") for file in source.files
            for table in batches(source, file) for row in table.to_pylist()]


def test_parquet_files_and_folders_keep_what_they_know(tmp_path):
    folder = tmp_path / "petastorm"
    folder.mkdir()
    pq.write_table(pa.table({"id": ["a", None], "text": [b"one", b"zwei \xc3\xa4"], "license": ["MIT", None],
                             "author": ["Ann", None], "label": [1, 2]}), folder / "part-00000.parquet")
    pq.write_table(pa.table({"text": ["three"]}), folder / "part-00001.parquet")
    (folder / "_common_metadata").write_bytes(b"PAR1")
    (folder / "_SUCCESS").touch()
    found = rows(str(folder))
    assert [(r["id"], r["text"], r["licence"], r["author"]) for r in found] == [
        ("a", "one", "MIT", "Ann"), (f"{folder}/part-00000.parquet:1", "zwei ä", "mine", None),
        (f"{folder}/part-00001.parquet:0", "three", "mine", None)]
    assert found[1]["path"].endswith("part-00000.parquet:1")


def test_parquet_without_text_or_whole_bytes_is_one_clear_error(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="a column 'text', not only body"):
        rows(f"{tmp_path}/a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(RunError, match="not a whole Parquet file"):
        rows(f"{tmp_path}/a.parquet")


def test_a_batch_holds_what_was_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": "x" * 100}) + "\n" for i in range(10)))
    (source,) = find_sources(f"{tmp_path}/a.jsonl", field="data.sources", licence="")
    assert [len(table) for table in batches(source, source.files[0], num_bytes=300)] == [3, 3, 3, 1]


def test_zstandard_lines(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"id": 1, "text": "packed", "url": "u"}\n'))
    assert [(r["text"], r["url"]) for r in rows(f"{tmp_path}/a.jsonl.zst")] == [("packed", "u")]


def test_the_html_edition_of_a_book_is_its_text_edition(data_dir):
    pytest.importorskip("trafilatura")
    (page,) = rows(str(data_dir / "html" / "news_from_nowhere.htm"))
    book = (data_dir / "books" / "news_from_nowhere.txt").read_text(encoding="utf-8")
    found = near_duplicates([clean(book, "prose"), clean(page["text"], "prose")], threshold=0.7)
    assert found[1].jaccard > 0.9
    assert "<p>" not in page["text"]


RUSSIAN, JAPANESE = "Широкая электрификация южных губерний. " * 20, "吾輩は猫である。名前はまだ無い。" * 20


@pytest.mark.parametrize(("text", "encoding", "head", "stated", "found"), [
    (RUSSIAN, "cp1251", '<meta charset="windows-1251">', None, "cp1251"),
    (JAPANESE, "shift_jis", '<meta http-equiv="x" content="text/html; charset=Shift_JIS">', None, "shift_jis"),
    (RUSSIAN, "koi8-r", "", "KOI8-R", "koi8-r"),
    (RUSSIAN, "utf-8", '<meta charset="windows-1251">', None, "utf-8"),
    ("Tout est “réglé” au café du coin. " * 20, "cp1252", "<meta charset=iso-8859-1>", "no-such-encoding", "cp1252")])
def test_pages_are_in_the_encoding_that_they_declare_where_they_can_be(text, encoding, head, stated, found):
    raw = f"<html><head>{head}</head><body><p>{text}</body></html>".encode(encoding)
    page, name = decode_page(raw, stated=stated)
    assert text in page and name == found


def test_web_archives_give_their_pages(tmp_path):
    pytest.importorskip("trafilatura")
    warc = pytest.importorskip("fastwarc.warc")
    page = "<html><body><article><h1>Title</h1><p>" + "A sentence of the page. " * 20 + "</p></article></body></html>"
    answers = [("http://a.org/", "text/html", page.encode()), ("http://a.org/n.txt", "text/plain", b"n\xe9 de la mer"),
               ("http://a.org/i.png", "image/png", b"\x89PNG"), ("http://a.org/empty", "text/html", b"<html></html>")]
    with gzip.open(tmp_path / "a.warc.gz", "wb") as stream:
        for url, kind, body in answers:
            http = b"HTTP/1.1 200 OK\r\nContent-Type: " + kind.encode() + b"\r\n\r\n" + body
            record = warc.WarcRecord()
            record.init_headers(warc.WarcRecordType.response)
            record.headers["WARC-Target-URI"] = url
            record.headers["Content-Type"] = "application/http; msgtype=response"
            record.set_bytes_content(http)
            buffer = io.BytesIO()
            record.write(buffer)
            stream.write(buffer.getvalue())
    found = {r["id"]: r for r in rows(f"{tmp_path}/a.warc.gz")}
    assert "A sentence of the page." in found["http://a.org/"]["text"]
    assert found["http://a.org/"]["url"] == "http://a.org/"
    assert found["http://a.org/n.txt"]["text"] == "né de la mer"
    assert [found[f"http://a.org/{name}"]["reason"] for name in ("i.png", "empty")] == ["not_text", "no_text_in_page"]


def test_mosaic_shards_are_read_as_their_format_is_written(tmp_path):
    """Two samples of a string, an integer of 8 bytes and a string, laid out by hand after MosaicML's description."""
    samples = []
    for text, number, id_ in (("hello", 7, "a"), ("größer", -1, "b")):
        encoded = [text.encode(), id_.encode()]
        sizes = b"".join(len(value).to_bytes(4, "little") for value in encoded)
        samples.append(sizes + encoded[0] + number.to_bytes(8, "little", signed=True) + encoded[1])
    header = 4 + 4 * (len(samples) + 1)
    places = [header, header + len(samples[0]), header + len(samples[0]) + len(samples[1])]
    raw = len(samples).to_bytes(4, "little") + b"".join(p.to_bytes(4, "little") for p in places) + b"".join(samples)
    (tmp_path / "shard.00000.mds").write_bytes(raw)
    shard = {"format": "mds", "column_names": ["text", "n", "id"], "column_encodings": ["str", "int", "str"],
             "column_sizes": [None, 8, None], "samples": 2, "zip_data": None,
             "raw_data": {"basename": "shard.00000.mds", "bytes": len(raw)}, "compression": None}
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    assert [(r["id"], r["text"]) for r in rows(f"{tmp_path}/index.json")] == [("a", "hello"), ("b", "größer")]


def test_hugging_face_datasets_are_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text('{"id": "x", "text": "one"}\n{"id": "y", "text": "two"}\n')
    assert [(r["id"], r["text"]) for r in rows(f"hf:{tmp_path}")] == [("x", "one"), ("y", "two")]


def test_benchmarks_are_held_out_string_by_string(tmp_path, data_dir):
    with (tmp_path / "quiz.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["Why, of all?", "Because"]])
    (tmp_path / "tasks.json").write_text(json.dumps({"examples": [{"input": "in", "target": {"a": "out"}}]}))
    found = rows(f"{tmp_path}/quiz.csv,{tmp_path}/tasks.json", field="data.holdouts")
    assert found[0]["id"] == f"{tmp_path}/quiz.csv:1/question"
    assert [r["text"] for r in found] == ["Why, of all?", "Because", "in", "out"]
    gsm8k = rows(str(data_dir / "eval" / "gsm8k_test.jsonl"), field="data.holdouts")
    assert len(gsm8k) == 2 * 1319
    assert gsm8k[0]["id"].endswith("gsm8k_test.jsonl:1/question")


def test_a_missing_library_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    Path(tmp_path / "a.html").write_text("<p>x</p>")
    with pytest.raises(RunError, match=r"'trafilatura' is missing or incomplete .*; pip install 'llmjax\[curate\]'"):
        rows(f"{tmp_path}/a.html")
