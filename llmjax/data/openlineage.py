"""Lineage events of a data build in the OpenLineage format (specification 2-0-2), one JSON object a line.

A build begins with a START event and ends with COMPLETE or FAIL under the same run id. Inputs are the sources with
their licences and counts, the output is the folder with its hash; what shaped the data is in facets of the run.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import llmjax
from llmjax.data.manifest import Manifest

FILE = "openlineage.jsonl"
NAMESPACE = "llmjax"
PRODUCER = f"llmjax {llmjax.__version__}"
_SPEC = "https://openlineage.io/spec"
EventType = Literal["START", "COMPLETE", "FAIL"]


@dataclasses.dataclass
class Recorder:
    """Where a build says what it made."""

    manifest: Manifest | None = None


@contextmanager
def recorded(folder: Path, *, job: str, config: Mapping[str, Any]) -> Iterator[Recorder]:
    """Append the events of what happens inside to the folder's openlineage.jsonl."""
    run, recorder = str(uuid.uuid4()), Recorder()
    _append(folder, event("START", run=run, job=job, facets={"llmjax_config": _facet({"config": dict(config)})}))
    try:
        yield recorder
    except BaseException as error:
        message = {"message": " ".join(str(error).split()), "programmingLanguage": "Python"}
        facets = {"errorMessage": _facet(message, "ErrorMessageRunFacet")}
        _append(folder, event("FAIL", run=run, job=job, facets=facets))
        raise
    facets = {"llmjax_manifest": _facet(_made(recorder.manifest))} if recorder.manifest else {}
    _append(folder, event("COMPLETE", run=run, job=job, facets=facets, manifest=recorder.manifest))


def event(kind: EventType, *, run: str, job: str, facets: Mapping[str, Any],
          manifest: Manifest | None = None) -> dict[str, Any]:  # fmt: skip
    """One run event, as of now."""
    return {
        "eventTime": datetime.datetime.now(datetime.UTC).isoformat(),
        "eventType": kind,
        "producer": PRODUCER,
        "schemaURL": f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent",
        "run": {"runId": run, "facets": dict(facets)},
        "job": {"namespace": NAMESPACE, "name": job, "facets": {}},
        "inputs": _inputs(manifest) if manifest else [],
        "outputs": [_output(manifest)] if manifest else [],
    }


def _inputs(manifest: Manifest) -> list[dict[str, Any]]:
    return [{
        "namespace": NAMESPACE, "name": source.name,
        "facets": {"dataSource": _facet({"name": source.name, "uri": source.provenance}, "DatasourceDatasetFacet"),
                   "llmjax_licence": _facet({"licence": source.licence})},
        "inputFacets": {"inputStatistics": _facet(
            {"rowCount": source.documents, "size": source.bytes}, "InputStatisticsInputDatasetFacet")},
    } for source in (*manifest.sources, *manifest.holdout)]  # fmt: skip


def _output(manifest: Manifest) -> dict[str, Any]:
    columns = [{"name": "tokens", "type": "array<uint>"}, {"name": "doc_id", "type": "binary(16)"}]
    return {
        "namespace": NAMESPACE, "name": str(manifest.folder),
        "facets": {"schema": _facet({"fields": columns}, "SchemaDatasetFacet"),
                   "version": _facet({"datasetVersion": manifest.hash}, "DatasetVersionDatasetFacet")},
        "outputFacets": {"outputStatistics": _facet(
            {"rowCount": manifest.num_documents, "size": manifest.num_bytes, "fileCount": len(manifest.shards)},
            "OutputStatisticsOutputDatasetFacet")},
    }  # fmt: skip


def _made(manifest: Manifest) -> dict[str, Any]:
    return {"codeHash": manifest.code_hash, "configHash": manifest.config_hash, "inputHash": manifest.input_hash,
            "tokenizerHash": manifest.tokenizer_hash, "dropped": manifest.dropped, "versions": manifest.versions}


def _facet(values: Mapping[str, Any], schema: str = "") -> dict[str, Any]:
    """A facet; without the name of a schema it is one of our own."""
    url = f"{_SPEC}/facets/1-0-0/{schema}.json#/$defs/{schema}" if schema else f"{_SPEC}/2-0-2/OpenLineage.json"
    return {"_producer": PRODUCER, "_schemaURL": url, **values}


def _append(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
