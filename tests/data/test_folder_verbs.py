"""What can be done with a finished data folder: follow a token, export, erase; and the events and card of a build."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.cli import main
from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import dataset_card, openlineage
from llmjax.data.build import build
from llmjax.data.erase import Erase, Erasures, erase
from llmjax.data.export import export, parse_record
from llmjax.data.manifest import Manifest
from llmjax.data.origin import trace_document, trace_token
from llmjax.data.shards import TokenStore
from llmjax.data.stage import documents_schema
from llmjax.track.affected import affected_runs
from llmjax.track.lineage import Lineage

WORDS = ("fen", "moor", "tall", "wick", "stone", "alder", "brook", "heath")


def text(number: int) -> str:
    return " ".join(WORDS[(number * place + place * place) % 8] + str(number * place % 13) for place in range(90))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Forty documents of two licences; d3 has an exact copy, d5 is the first of the shards' own documents."""
    root = tmp_path_factory.mktemp("data")
    records = [{"id": f"d{i}", "text": text(i), "licence": "CC0-1.0" if i % 2 else "MIT"} for i in range(1, 41)]
    records.append({"id": "copy-of-3", "text": text(3)})
    source = root / "notes.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(sources=str(source), holdout_fraction=0.2, near_duplicate_jaccard=0.9)
    build(config, TokenizerConfig(vocab_size=330), root / "w")
    return root / "w"


@pytest.fixture
def folder(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "w"))


def documents(folder: Path) -> list[dict]:
    return pq.read_table(folder / "documents.parquet").to_pylist()


def test_every_token_leads_to_its_document(built):
    store, rows = TokenStore.open(built / "shards"), documents(built)
    position = 0
    for document in range(store.num_documents):
        for token in (0, len(store.tokens(document)) - 1):
            trace = trace_token(built, position + token)
            assert trace.document == {name: value for name, value in rows[document].items() if name != "text"}
            assert (trace.place.document, trace.place.token) == (document, token)
        position += len(store.tokens(document))
    manifest = Manifest.load(built)
    assert trace.made_by["data_hash"] == manifest.hash
    assert trace.made_by["versions"] == manifest.versions
    assert any(stage.startswith("Clean(") for stage in trace.made_by["stages"])
    assert trace.document["licence"] in ("CC0-1.0", "MIT")
    for outside in (-1, position):
        with pytest.raises(RunError, match=f"--token={outside}"):
            trace_token(built, outside)


def test_an_id_or_a_hash_leads_to_what_became_of_it(built):
    row = documents(built)[0]
    assert trace_document(built, row["id"]) == trace_document(built, row["doc_id"])
    (copy,) = trace_document(built, "copy-of-3")
    assert (copy.reason, copy.document["kept_id"], copy.place) == ("exact_duplicate", "d3", None)
    with pytest.raises(RunError, match="--id=nobody"):
        trace_document(built, "nobody")


def test_parquet_holds_the_shards(built, tmp_path):
    files = export(built, tmp_path / "out", format="parquet")
    rows = pa.concat_tables(pq.read_table(file) for file in files).to_pylist()
    store = TokenStore.open(built / "shards")
    assert [row["tokens"] for row in rows] == [store.tokens(i).tolist() for i in range(store.num_documents)]
    assert [(row["doc_id"], row["id"], row["licence"]) for row in rows] == [
        (d["doc_id"], d["id"], d["licence"]) for d in documents(built)]  # fmt: skip


def test_array_record_holds_the_shards_one_document_a_record(built, tmp_path):
    import grain

    files = export(built, tmp_path / "out", format="array_record")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    source = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    store = TokenStore.open(built / "shards")
    assert len(source) == store.num_documents == sum(file["documents"] for file in index["files"])
    for i in range(len(source)):
        document = parse_record(source[i], dtype=index["dtype"], mask=index["mask"])
        assert bytes(document.doc_id).hex() == store.doc_id(i)
        np.testing.assert_array_equal(document.tokens, store.tokens(i))


def test_a_masked_record_gives_its_mask_back():
    tokens, mask = np.array([5, 6, 700], "<u2"), np.array([True, False, True])
    document = parse_record(bytes(16) + tokens.tobytes() + mask.tobytes(), dtype="<u2", mask=True)
    np.testing.assert_array_equal(document.tokens, tokens)
    np.testing.assert_array_equal(document.mask, mask)


def test_an_export_never_overwrites_and_never_hands_on_damaged_shards(folder, tmp_path):
    export(folder, tmp_path / "out", format="parquet")
    with pytest.raises(RunError, match="is not empty"):
        export(folder, tmp_path / "out", format="parquet")
    tokens = next((folder / "shards").glob("*/tokens.npy"))
    raw = bytearray(tokens.read_bytes())
    raw[-1] ^= 1
    tokens.write_bytes(raw)
    with pytest.raises(RunError, match="damaged or replaced"):
        export(folder, tmp_path / "other", format="parquet")


def test_an_erased_document_leaves_and_its_neighbours_stay(folder):
    before, rows = TokenStore.open(folder / "shards"), documents(folder)
    victim = next(row for row in rows if row["id"] != "d3")
    done = erase(folder, Erasures(ids=frozenset([victim["id"]])))
    after, manifest = TokenStore.open(folder / "shards"), Manifest.load(folder)
    manifest.verify()
    left = [i for i, row in enumerate(rows) if row["id"] != victim["id"]]
    assert [after.tokens(i).tolist() for i in range(after.num_documents)] == [before.tokens(i).tolist() for i in left]
    assert documents(folder) == [rows[i] for i in left]
    assert (manifest.num_documents, manifest.num_tokens) == (len(left), after.num_tokens)
    assert sum(source.tokens for source in manifest.sources) == after.num_tokens
    assert manifest.dropped["erased"] == 1 and manifest.hash == done.data_hash not in done.data_hashes
    assert trace_document(folder, victim["id"])[0].reason == "erased"
    assert not any(victim["text"].encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_copies_of_an_erased_document_are_not_let_in_again(folder):
    done = erase(folder, Erasures(ids=frozenset(["d3"])))
    assert (done.ids, done.copies) == (["d3"], ["copy-of-3"])
    assert Erasures.load(folder).ids == {"d3", "copy-of-3"}
    third = erase(folder, Erasures(ids=frozenset([documents(folder)[0]["id"]])))
    assert {"d3", "copy-of-3", *third.ids} == Erasures.load(folder).ids
    assert len(third.data_hashes) == 2


def test_a_rebuild_from_more_sources_leaves_the_erased_out(built, folder, tmp_path):
    victim = documents(folder)[0]
    erase(folder, Erasures(ids=frozenset([victim["id"]])))
    source = tmp_path / "notes.jsonl"
    again = json.dumps({"id": "under-another-id", "text": victim["text"]})
    source.write_text((built.parent / "notes.jsonl").read_text() + f"{again}\n")
    config = DataConfig(sources=str(source), holdout_fraction=0.2, near_duplicate_jaccard=0.9)
    manifest = build(config, TokenizerConfig(path=str(folder)), folder)
    assert manifest.dropped["erased"] == 2
    assert victim["doc_id"] not in {row["doc_id"] for row in documents(folder)}
    assert victim["id"] not in json.dumps(manifest.stages)


def test_held_out_documents_are_erased_too(folder):
    victim = pq.read_table(folder / "holdout.parquet").to_pylist()[0]
    before = Manifest.load(folder)
    erase(folder, Erasures(doc_ids=frozenset([victim["doc_id"]])))
    after = Manifest.load(folder)
    assert after.dropped["held_out"] == before.dropped["held_out"] - 1
    assert sum(after.dropped.values()) == sum(before.dropped.values())
    assert victim["id"] not in {row["id"] for row in pq.read_table(folder / "holdout.parquet").to_pylist()}


def test_nothing_to_erase_or_nothing_left_changes_nothing(folder):
    hash_before = Manifest.load(folder).hash
    everything = frozenset(row["id"] for row in documents(folder))
    for asked, message in ((Erasures(ids=frozenset(["nobody"])), "what data erase was asked"),
                           (Erasures(ids=everything), "nothing would be left")):  # fmt: skip
        with pytest.raises(RunError, match=message):
            erase(folder, asked)
    assert Manifest.load(folder).hash == hash_before
    assert Erasures.load(folder) == Erasures()


def test_the_stage_drops_by_id_author_and_content():
    rows = [{"order": i, "id": str(i), "text": f"text {i}", "author": "Ann" if i == 1 else None} for i in range(4)]
    blank = dict.fromkeys(("source", "licence", "path", "kind", "encoding"), "")
    table = pa.Table.from_pylist([blank | {"url": None, "reason": None} | row for row in rows], documents_schema())
    from llmjax.data.dedup import content_hash

    stage = Erase(Erasures(frozenset("0"), frozenset(["Ann"]), frozenset([content_hash("text 2")])))
    assert stage(table)["reason"].to_pylist() == ["erased", "erased", "erased", None]


def lineage(name: str, data_hash: str, parent: Lineage | None = None) -> Lineage:
    return Lineage(name, "", data_hash, "", "", {}, parent)


def test_runs_and_their_descendants_are_affected(tmp_path):
    first = lineage("first", "h1")
    for run in (first, lineage("second", "h2", first), lineage("other", "h3")):
        (tmp_path / run.name / "checkpoints").mkdir(parents=True)
        run.save(tmp_path / run.name)
    for step in (100, 20):
        (tmp_path / "first" / "checkpoints" / str(step)).mkdir()
    found = affected_runs(tmp_path, {"h1"})
    assert [(run.workdir.name, run.through, run.checkpoints) for run in found] == [
        ("first", "first", ["checkpoints/20", "checkpoints/100"]), ("second", "first", [])]  # fmt: skip


def test_the_command_erases_and_names_the_runs(folder, tmp_path, capsys):
    run = lineage("mine", Manifest.load(folder).hash)
    run.save(tmp_path / "runs" / "mine")
    config = tmp_path / "recipe.py"
    config.write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({})\n")
    options = [f"--config={config}", f"--workdir={folder}"]
    assert main(["data", "erase", *options, "--id=d3", f"--runs={tmp_path}/runs", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["ids"], told["copies"]) == (["d3"], ["copy-of-3"])
    assert [Path(run["workdir"]).name for run in told["runs"]] == ["mine"]
    assert main(["data", "trace", *options, "--id=d3"]) == 0
    assert "dropped  erased" in capsys.readouterr().out
    assert main(["data", "trace", *options, "--token=7", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["documents"]
    assert found["place"]["token"] == 7
    assert main(["data", "export", *options, "--format=array_record"]) == 0
    assert (folder / "export" / "array_record" / "index.json").exists()
    assert main(["data", "trace", *options]) == 2
    assert main(["data", "erase", *options]) == 2


def test_events_are_those_of_the_openlineage_client(built, tmp_path):
    event_v2 = pytest.importorskip("openlineage.client.event_v2")
    manifest = Manifest.load(built)
    with openlineage.recorded(tmp_path, job="data build", config={"sources": "x"}) as recorder:
        recorder.manifest = manifest
    with pytest.raises(RunError), openlineage.recorded(tmp_path, job="data build", config={}):
        raise RunError("no text")
    events = [json.loads(line) for line in (tmp_path / openlineage.FILE).read_text().splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE", "START", "FAIL"]
    assert len({event["run"]["runId"] for event in events}) == 2
    for event in events:  # the client's classes check types of ids, times and addresses
        event_v2.RunEvent(
            eventTime=event["eventTime"], eventType=event_v2.RunState[event["eventType"]], producer=event["producer"],
            run=event_v2.Run(**event["run"]), job=event_v2.Job(**event["job"]),
            inputs=[event_v2.InputDataset(**dataset) for dataset in event["inputs"]],
            outputs=[event_v2.OutputDataset(**dataset) for dataset in event["outputs"]])  # fmt: skip
    (output,) = events[1]["outputs"]
    assert output["facets"]["version"]["datasetVersion"] == manifest.hash
    assert {i["facets"]["llmjax_licence"]["licence"] for i in events[1]["inputs"]} >= {"MIT", "CC0-1.0"}


def test_the_card_is_the_manifest_in_words(built):
    manifest = Manifest.load(built)
    text = dataset_card.card(manifest)
    assert f"{manifest.num_tokens:,} tokens" in text and manifest.hash in text
    for source in manifest.sources:
        assert f"| {source.licence} |" in text
    assert "| exact_duplicate | 1 |" in text
    assert text.startswith("---\nlicense: other\n")
