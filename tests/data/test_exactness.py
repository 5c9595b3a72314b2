"""Any corpus, any hosts, any resume points: every prediction is made once an epoch, in one order, by everyone."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.sections import DataConfig
from llmjax.data.interventions import Timeline
from llmjax.data.loader import Batch, serve
from llmjax.data.stages import open_stream
from tests.data.corpora import SPACING, make_folder

HOSTS = st.sampled_from([1, 2, 4, 8])
LENGTHS = st.lists(st.integers(2, 120), min_size=1, max_size=8)
LIVES = st.lists(st.tuples(HOSTS, st.integers(1, 4)), min_size=2, max_size=5)  # how many hosts, for how many steps


def global_batches(folder: Path, data: DataConfig, *, hosts: int, first: int, steps: int) -> list[Batch]:
    """What several hosts feed together from step `first` on, each of them started anew."""
    shares = [serve(open_stream(folder, data, ())(Timeline()), start_step=first, process_index=host,
                    process_count=hosts) for host in range(hosts)]
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in (tuple(next(share) for share in shares) for _ in range(steps))]


@settings(max_examples=12, deadline=None)
@given(lengths=st.dictionaries(st.sampled_from(["books", "code", "wiki"]), LENGTHS, min_size=1), lives=LIVES,
       mixed=st.booleans(), seq_len=st.sampled_from([8, 32]), seed=st.integers(0, 5))
def test_a_run_of_many_lives_reads_what_one_life_reads(
    lengths: dict[str, list[int]], lives: list[tuple[int, int]], mixed: bool, seq_len: int, seed: int
) -> None:
    data = DataConfig(seq_len=seq_len, batch_size=8, shuffle_seed=seed, mixture=",".join(lengths) if mixed else "")
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name), lengths)
        first = 0
        lived: list[Batch] = []
        for hosts, steps in lives:
            lived += global_batches(folder, data, hosts=hosts, first=first, steps=steps)
            first += steps
        whole = global_batches(folder, data, hosts=1, first=0, steps=first)
    for ours, theirs in zip(lived, whole, strict=True):
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)


@settings(max_examples=12, deadline=None)
@given(lengths=st.dictionaries(st.sampled_from(["books", "code", "wiki"]), LENGTHS, min_size=1), hosts=HOSTS,
       mixed=st.booleans(), seq_len=st.sampled_from([8, 32]), seed=st.integers(0, 5))
def test_no_prediction_is_lost_and_none_made_twice_before_all_are_made(
    lengths: dict[str, list[int]], hosts: int, mixed: bool, seq_len: int, seed: int
) -> None:
    """Of every source, for as long as its slowest prediction has been made once."""
    data = DataConfig(seq_len=seq_len, batch_size=8, shuffle_seed=seed, mixture=",".join(lengths) if mixed else "")
    order = sorted((place, source) for source, sizes in lengths.items() for place in range(len(sizes)))
    wanted = {source: [order.index((place, source)) * SPACING + i for place, size in enumerate(sizes)
                       for i in range(1, size)] for source, sizes in lengths.items()}
    made: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name), lengths)
        shares = [serve(open_stream(folder, data, ())(Timeline()), process_index=host, process_count=hosts)
                  for host in range(hosts)]
        for _ in itertools.takewhile(lambda _: min(made[target] for target in itertools.chain(*wanted.values())) < 1,
                                     itertools.count()):
            for batch in map(next, shares):
                made.update(batch["targets_BT"][batch["weights_BT"] > 0].tolist())
    everything = list(itertools.chain(*wanted.values()))
    assert set(made) == set(everything)
    for targets in wanted.values() if mixed else [everything]:
        counts = [made[target] for target in targets]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1
