"""The space of model sections: what is accepted runs both ways and comes back, what is not names its field."""

from __future__ import annotations

import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.convert import rules
from llmjax.convert.family import Family
from llmjax.convert.registry import FAMILIES
from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import TaskConfig
from llmjax.models import decoder
from llmjax.train.pretrain import make_loss

ACTIVATIONS = ["swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"]
SECTIONS = st.fixed_dictionaries({}, optional={
    "num_layers": st.integers(1, 4), "num_heads": st.sampled_from([1, 2, 3, 4]), "num_kv_heads": st.integers(1, 3),
    "dim": st.sampled_from([8, 12, 9]), "head_dim": st.sampled_from([1, 2, 4, 6]), "mlp_dim": st.sampled_from([1, 16]),
    "positions": st.sampled_from(["rotary", "alibi", "learned", "sinusoidal", "none"]),
    "rope_theta": st.sampled_from([1.0, 1e4]), "rope_fraction": st.sampled_from([0.25, 0.5, 1.0, 1.5]),
    "rope_scaling": st.fixed_dictionaries({}, optional={
        "kind": st.sampled_from(["none", "linear", "ntk", "dynamic_ntk", "llama3", "yarn"]),
        "factor": st.sampled_from([1.0, 4.0]), "original_seq_len": st.sampled_from([1, 8]),
        "high_freq_factor": st.sampled_from([1.0, 4.0]), "beta_slow": st.sampled_from([0.0, 1.0, 40.0]),
        "truncate": st.sampled_from(["yes", "no"])}),
    "attention": st.fixed_dictionaries({}, optional={
        "bias": st.sampled_from(["none", "qkv", "all"]), "qk_norm": st.sampled_from(["none", "head", "full"]),
        "window": st.sampled_from([-1, 0, 1, 3]), "global_every": st.sampled_from([0, 1, 2, 3]),
        "local_rope_theta": st.sampled_from([0.0, 50.0]), "softcap": st.sampled_from([-1.0, 0.0, 5.0]),
        "sinks": st.sampled_from(["none", "learned"]), "scale": st.sampled_from([0.0, 0.3])}),
    "activation": st.sampled_from(ACTIVATIONS), "mlp_bias": st.sampled_from(["none", "all"]),
    "norm": st.fixed_dictionaries({}, optional={
        "kind": st.sampled_from(["rms", "layer"]), "scale": st.sampled_from(["plain", "one_plus"]),
        "bias": st.sampled_from(["none", "learned"]), "placement": st.sampled_from(["pre", "post", "both"]),
        "embedding": st.sampled_from(["none", "norm"])}),
    "residual": st.sampled_from(["sequential", "parallel"]), "residual_scale": st.sampled_from([0.5, 1.0]),
    "embedding_scale": st.sampled_from([1.0, 3.0]), "embeddings": st.sampled_from(["tied", "untied"]),
    "logit_scale": st.sampled_from([0.5, 1.0]), "logit_softcap": st.sampled_from([0.0, 5.0]),
    "dropout": st.sampled_from([0.0, 0.5, 1.0]), "compute_dtype": st.sampled_from(["float32", "bfloat16"]),
    "moe": st.fixed_dictionaries({}, optional={
        "num_experts": st.sampled_from([0, 2, 4, 6]), "top_k": st.integers(0, 3),
        "expert_mlp_dim": st.sampled_from([0, 8]), "num_shared_experts": st.integers(0, 2),
        "num_dense_layers": st.integers(0, 2), "score": st.sampled_from(["softmax", "sigmoid"]),
        "weights": st.sampled_from(["as_scored", "normalised"]), "scaling_factor": st.sampled_from([1.0, 2.5]),
        "num_groups": st.sampled_from([1, 2, 4]), "top_groups": st.integers(1, 2),
        "router_bias": st.sampled_from(["none", "learned", "balancing"]),
        "capacity_factor": st.sampled_from([0.0, 0.5, 2.0]), "group_size": st.sampled_from([0, 3, 4]),
        "balance_loss": st.sampled_from([0.0, 0.1]), "z_loss": st.sampled_from([0.0, 0.01]),
        "jitter": st.sampled_from([0.0, 0.3, 1.5]), "bias": st.sampled_from(["none", "all"])}),
    "latent": st.fixed_dictionaries({}, optional={
        "kv_lora_rank": st.sampled_from([0, 4]), "q_lora_rank": st.sampled_from([0, 4]),
        "qk_nope_head_dim": st.sampled_from([1, 4]), "qk_rope_head_dim": st.sampled_from([2, 3, 4]),
        "v_head_dim": st.sampled_from([1, 4])}),
    "multi_token": st.integers(0, 2),
})  # fmt: skip
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8], np.int32)
BATCH = {"tokens_BT": np.arange(16, dtype=np.int32).reshape(2, 8) % 11, "segment_ids_BT": SEGMENTS,
         "targets_BT": np.arange(1, 17, dtype=np.int32).reshape(2, 8) % 11,
         "positions_BT": np.asarray([[0, 1, 2, 0, 1, 2, 0, 1], range(8)], np.int32),
         "weights_BT": (SEGMENTS > 0).astype(np.float32),
         "token_ids_BT": np.arange(16, dtype=np.int32).reshape(2, 8)}  # fmt: skip
BASE = {"vocab_size": 11, "num_layers": 2, "dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 16,
        "max_seq_len": 16, "compute_dtype": "float32"}  # fmt: skip


@hypothesis.given(section=SECTIONS)
@hypothesis.settings(max_examples=200, deadline=None)
def test_a_section_comes_back_or_its_refusal_names_a_field(section: dict[str, Any]) -> None:
    try:
        config = configs.resolve({"model": BASE | section, "data": {"seq_len": 8}})
    except ConfigError as error:
        field = re.match(r"((?:model|data)\.[a-z_.0-9]+)=", str(error))
        assert field and field[1] in configs.flatten(configs.Config()), error
        return
    assert configs.resolve(configs.to_dict(config)) == config
    for family in FAMILIES.values():
        if not family.misfits(config.model):
            assert family.to_ours(family.to_theirs(config.model), dtype=config.model.param_dtype)


def check_runs(section: dict[str, Any]) -> None:
    """Initialises, learns without NaN, and its weights come back from every family that says all of it."""
    try:
        config = configs.resolve({"model": BASE | section, "data": {"seq_len": 8}}).model
    except ConfigError:
        hypothesis.reject()
    model, params = decoder.abstract_model(config), decoder.init_params(config, jax.random.key(0), None)
    loss = make_loss(TaskConfig(z_loss=0.01))

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params: dict) -> jax.Array:
        out = loss(model, params, {}, BATCH, jax.random.key(1))
        return out.loss_sum / out.weight

    value, grads = mean_loss(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    for family in FAMILIES.values():
        if not family.misfits(config):
            check_comes_back(family, config, rules.flatten(params))


def check_comes_back(family: Family, config: ModelConfig, ours: dict[str, jax.Array]) -> None:
    rows = family.rows_of(config)
    theirs = dict(rules.to_theirs(rows, ours))
    again = dict(rules.to_ours(rows, ours, read=theirs.__getitem__))
    assert again.keys() == ours.keys() and all(np.array_equal(again[path], leaf) for path, leaf in ours.items())


@hypothesis.given(section=SECTIONS)
@hypothesis.settings(max_examples=4, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_is_accepted_runs(section: dict[str, Any]) -> None:
    check_runs(section)


@pytest.mark.slow
@hypothesis.given(section=SECTIONS)
@hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_is_accepted_runs_in_many_cases(section: dict[str, Any]) -> None:
    check_runs(section)
