"""Our writer against the safetensors library; shards and their index."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmjax.convert.safetensors import INDEX_FILE, SINGLE_FILE, Reader, TensorSpec, write_folder
from llmjax.core.errors import RunError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in
            {"b": (3, 5), "a": (7,), "c": (2, 2, 2), "empty": (0, 3)}.items()}  # fmt: skip


def write(folder, values, **kwargs):
    specs = [TensorSpec(name, value.shape, value.dtype) for name, value in values.items()]
    write_folder(folder, specs, iter(values.values()), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_we_write(dtype, tmp_path):
    values = tensors(dtype)
    write(tmp_path, values | {"b": np.asfortranarray(values["b"])})
    read = safetensors.numpy.load_file(tmp_path / SINGLE_FILE)
    assert read.keys() == values.keys()
    assert all(read[name].dtype == dtype and (read[name] == values[name]).all() for name in values)
    with safetensors.safe_open(tmp_path / SINGLE_FILE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_bytes", [1, 60, 92, 10_000])
def test_shards_and_index(shard_bytes, tmp_path):
    values = tensors()
    write(tmp_path, values, shard_bytes=shard_bytes)
    reader = Reader(tmp_path)
    assert reader.names == sorted(values)
    for name, value in values.items():
        assert reader.spec(name) == TensorSpec(name, value.shape, value.dtype)
        np.testing.assert_array_equal(reader.read(name), value)
    assert (tmp_path / INDEX_FILE).exists() == (shard_bytes < 10_000)
    if shard_bytes < 10_000:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == 4 * (15 + 7 + 8)
        assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    if shard_bytes == 92:  # b and a fit together exactly not: 60 + 28 + 32
        assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(RunError, match="no weights in"):
        Reader(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"12345678{}")
    with pytest.raises(RunError, match="model.safetensors cannot be read"):
        Reader(tmp_path)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(RunError, match="model-1.safetensors is missing"):
        Reader(tmp_path)
