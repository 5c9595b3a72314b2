"""Where the rows and tokens of a batch go."""

from __future__ import annotations

import numpy as np
import pytest

from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.train.batch import put_batch, row_share, zigzag


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_shard_has_the_same_number_of_keys_to_look_at(num_shards: int) -> None:
    order = zigzag(32, num_shards)
    assert sorted(order) == list(range(32))
    work = (order + 1).reshape(num_shards, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1


def test_a_token_keeps_its_number_wherever_it_goes() -> None:
    tokens = np.arange(8 * 8, dtype=np.int32).reshape(8, 8)
    placed = put_batch({"tokens_BT": tokens}, make_mesh(MeshConfig(data=1, fsdp=2, stage=2, context=2)))
    for ids, part in zip(placed["token_ids_BT"].addressable_shards, placed["tokens_BT"].addressable_shards,
                         strict=True):  # fmt: skip
        assert ids.data.shape == (2, 4)
        np.testing.assert_array_equal(ids.data, part.data)
    second = placed["tokens_BT"].addressable_shards[1].data
    assert np.asarray(second)[0].tolist() == [2, 3, 4, 5]


def test_one_process_loads_all_rows() -> None:
    share = row_share(make_mesh(MeshConfig(data=2, tensor=4)))
    assert (share.process_index, share.process_count) == (0, 1)
