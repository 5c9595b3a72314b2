"""The conversion engine: every tensor consumed once, there and back is the identity."""

import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmjax.convert import rules
from llmjax.convert.families.llama import LLAMA as FAMILY
from llmjax.convert.operations import Joined, Linear, Matrix, Vector
from llmjax.core.errors import RunError
from llmjax.core.sections import ModelConfig
from llmjax.models.decoder import abstract_model

LLAMA = FAMILY.rows
MODELS = st.builds(
    lambda kv, group, tied, **sizes: ModelConfig(
        num_kv_heads=kv, num_heads=kv * group, embeddings="tied" if tied else "untied", **sizes
    ),
    kv=st.integers(1, 3), group=st.integers(1, 3), tied=st.booleans(), num_layers=st.integers(1, 3),
    vocab_size=st.integers(1, 9), dim=st.integers(1, 9), head_dim=st.sampled_from([2, 4]), mlp_dim=st.integers(1, 9),
    param_dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip


def random_leaves(model: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = rules.flatten(abstract_model(model).shapes)
    return {path: rng.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in shapes.items()}


@hypothesis.given(MODELS)
@hypothesis.settings(max_examples=30, deadline=None)
def test_there_and_back(model):
    ours = random_leaves(model)
    theirs = dict(rules.to_theirs(LLAMA, ours))
    assert {name: tensor.shape for name, tensor in theirs.items()} == rules.their_shapes(LLAMA, ours)
    reads = []
    back = dict(rules.to_ours(LLAMA, ours, read=lambda name: reads.append(name) or theirs[name]))
    assert sorted(reads) == sorted(theirs)  # every one once
    assert list(back) == [path for row in rules.select(LLAMA, ours) for path in row.paths]
    for path, value in ours.items():
        assert back[path].dtype == value.dtype
        np.testing.assert_array_equal(back[path], value)
    again = dict(rules.to_theirs(LLAMA, back))
    assert all((again[name] == theirs[name]).all() for name in theirs)


def test_heads_are_apart_and_inputs_first():
    ours = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # two inputs, three heads of four outputs
    theirs = Linear().to_theirs([ours])
    assert theirs.shape == (12, 2)
    assert theirs[4 * 1 + 2, 1] == ours[1, 1, 2]
    merged = Linear(num_inputs=2).to_theirs([ours])  # two heads of three inputs, four outputs
    assert merged.shape == (4, 6)
    assert merged[2, 3 * 1 + 1] == ours[1, 1, 2]


def test_joined_head_by_head():
    """(heads, which of the three, head dim), as GPT-NeoX and BLOOM have it."""
    q, k, v = (np.arange(2 * 3 * 4).reshape(2, 3, 4) + 100 * i for i in range(3))  # two inputs, three heads of four
    theirs = Joined(Linear(), order="by_head").to_theirs([q, k, v])
    assert theirs.shape == (36, 2)
    assert theirs[12 * 1 + 4 * 2 + 3, 1] == v[1, 1, 3]


@pytest.mark.parametrize("operation", [Joined(Linear()), Joined(Linear(), order="by_head"), Joined(Matrix(), dim=1)])
def test_joined_there_and_back(operation):
    shapes = [(2, 3, 4), (2, 3, 4), (2, 3, 4)]
    ours = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    theirs = operation.to_theirs(ours)
    assert theirs.shape == operation.their_shape(shapes)
    assert all(map(np.array_equal, operation.to_ours(theirs, shapes), ours))


def test_joined_vectors_of_different_lengths():
    ours = [np.arange(8.0).reshape(4, 2), np.arange(2.0).reshape(1, 2)]
    assert Joined(Vector()).their_shape([(4, 2), (1, 2)]) == (10,)
    assert all(map(np.array_equal, Joined(Vector()).to_ours(Joined(Vector()).to_theirs(ours), [(4, 2), (1, 2)]), ours))


def test_experts_and_the_number_of_the_first_layer():
    row = rules.Row("m.{layer}.e.{expert}.w", "blocks/mlp/experts/up", Linear(), first_layer=1)
    ours = {"blocks/mlp/experts/up": np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)}
    theirs = dict(rules.to_theirs([row], ours))
    assert list(theirs) == [f"m.{layer}.e.{expert}.w" for layer in (1, 2) for expert in range(3)]
    assert theirs["m.2.e.1.w"][4, 3] == ours["blocks/mlp/experts/up"][1, 1, 3, 4]
    back = dict(rules.to_ours([row], ours, read=theirs.__getitem__))
    assert np.array_equal(back["blocks/mlp/experts/up"], ours["blocks/mlp/experts/up"])


def test_a_table_is_read_one_stacked_tensor_at_a_time():
    """The peak while streaming is the largest of our tensors and a few of theirs, not the model."""
    shape, rows = (8, 64, 1024), [rules.Row(f"{i}.{{layer}}", f"blocks/{i}", Linear()) for i in range(12)]
    like = {row.ours: np.empty(shape, np.float32) for row in rows}
    source = np.zeros((1024, 64), np.float32)
    tracemalloc.start()
    for _path, tensor in rules.to_ours(rows, like, read=lambda name: source):
        assert tensor.shape == shape
        del tensor
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * like["blocks/0"].nbytes


def test_both_sides_of_a_mismatch_are_named():
    with pytest.raises(RunError, match=r"missing: a \(1,\); not known: b \(2,\); .*wanted\): c \(3,\) \(4,\)$"):
        rules.check_consumed({"a": (1,), "c": (4,)}, {"b": (2,), "c": (3,)})


def test_a_path_outside_the_table_is_an_error():
    with pytest.raises(ValueError, match="blocks/router"):
        rules.select(LLAMA, {"blocks/router": None})


def test_nested_and_flat():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert rules.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert rules.unflatten(rules.flatten(tree).items()) == tree
