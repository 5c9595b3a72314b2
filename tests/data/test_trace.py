"""From a batch back to its documents, and the fit of a tokenizer."""

import itertools
import json

import pytest

from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.data.interventions import Timeline
from llmjax.data.loader import serve
from llmjax.data.stages import open_stream
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.trace import batch_segments

SUBJECTS = ("farmer", "miller", "sailor", "weaver", "baker", "mason", "painter")
PLACES = ("harbour", "market", "meadow", "chapel", "orchard")
TEXTS = {f"story-{i}": f"Story {i}: the {a} met the {b} at the {place}; they left it {i} times. " * (1 + i % 4)
         for i, (a, b, place) in enumerate(itertools.product(SUBJECTS, SUBJECTS[::2], PLACES))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace")
    (path / "a.jsonl").write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in TEXTS.items()))
    build(DataConfig(sources=str(path / "a.jsonl"), min_bytes=1, near_duplicate_jaccard=0),
          TokenizerConfig(vocab_size=330), path)
    return path


def test_segments_are_the_rows_that_the_loader_served(folder):
    config = DataConfig(seq_len=64, batch_size=4, shuffle_seed=3)
    tokenizer, stream = Tokenizer.load(folder), open_stream(folder, config, ())(Timeline())
    for step, batch in enumerate(itertools.islice(serve(stream), 3)):
        segments = batch_segments(stream, folder, step=step)
        for row in range(4):
            ids = [token for segment in segments if segment.row == row for token in segment.token_ids]
            assert ids == batch["tokens_BT"][row, :len(ids)].tolist()
            assert not batch["segment_ids_BT"][row, len(ids):].any()
        for segment in segments:
            assert tokenizer.decode(segment.token_ids) in TEXTS[segment.origin.id]
            assert segment.origin.path.startswith(f"{folder}/a.jsonl:")
            assert segment.origin.licence == "stated by the user"


def test_a_folder_without_data_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match="no complete token store"):
        open_stream(tmp_path, DataConfig(), ())
