"""The memorisation probe agrees with generation: verbatim is what greedy decoding writes."""

import numpy as np
import pytest

from llmjax.core.errors import RunError
from llmjax.data.shards import Document, TokenStore, write_store
from llmjax.evals.memorisation import probe
from llmjax.serve.engine import Engine
from llmjax.serve.load import load_workdir
from llmjax.serve.sampling import SamplingParams
from tests.serve.workdirs import make_workdir

PREFIX, SUFFIX = 12, 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_workdir(make_workdir(tmp_path_factory.mktemp("run")))


def test_a_greedy_continuation_is_memorised_and_a_changed_one_is_not(loaded, tmp_path):
    engine = Engine(loaded.model, loaded.params)
    rng = np.random.default_rng(0)
    prefixes = rng.integers(4, 280, (3, PREFIX))
    params = SamplingParams(max_new_tokens=SUFFIX, temperature=0.0)
    written = [[*prefix, *engine.generate(prefix.tolist(), params).token_ids] for prefix in prefixes]
    changed = [*written[2][:-1], (written[2][-1] + 1) % 280]
    documents = [Document(f"{i:032x}", np.array(ids)) for i, ids in enumerate([*written[:2], changed, [5] * 9])]
    write_store(tmp_path / "shards", documents, vocab_size=loaded.model.config.vocab_size)
    found = probe(loaded.model, loaded.params, TokenStore.open(tmp_path / "shards"), prefix=PREFIX, suffix=SUFFIX)
    assert (found.samples, found.verbatim) == (3, 2)
    assert sorted(found.doc_ids) == [f"{i:032x}" for i in range(2)]
    assert found.share == pytest.approx(2 / 3)
    assert found.matched == pytest.approx((2 + (SUFFIX - 1) / SUFFIX) / 3)


def test_documents_that_are_too_short_are_one_line(loaded, tmp_path):
    write_store(tmp_path / "shards", [Document("0" * 32, np.arange(5))], vocab_size=300)
    with pytest.raises(RunError, match="no document of .* has 20 tokens"):
        probe(loaded.model, loaded.params, TokenStore.open(tmp_path / "shards"), prefix=PREFIX, suffix=SUFFIX)
