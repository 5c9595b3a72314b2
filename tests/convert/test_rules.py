"""The conversion engine: every tensor consumed once, there and back is the identity."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmjax.convert import rules
from llmjax.convert.tables import LLAMA
from llmjax.core.errors import RunError
from llmjax.core.sections import ModelConfig
from llmjax.models.decoder import abstract_model

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
    assert list(back) == [row.ours for row in rules.select(LLAMA, ours)]
    for path, value in ours.items():
        assert back[path].dtype == value.dtype
        np.testing.assert_array_equal(back[path], value)
    again = dict(rules.to_theirs(LLAMA, back))
    assert all((again[name] == theirs[name]).all() for name in theirs)


def test_heads_are_apart_and_inputs_first():
    ours = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # two inputs, three heads of four outputs
    theirs = rules.Linear().to_theirs(ours)
    assert theirs.shape == (12, 2)
    assert theirs[4 * 1 + 2, 1] == ours[1, 1, 2]
    merged = rules.Linear(num_inputs=2).to_theirs(ours)  # two heads of three inputs, four outputs
    assert merged.shape == (4, 6)
    assert merged[2, 3 * 1 + 1] == ours[1, 1, 2]


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
