"""Sampling: the support that transformers' warpers leave, the frequencies of softmax, keys by seed and position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.errors import ConfigError
from llmjax.serve import sampling
from llmjax.serve.sampling import SamplingParams

LOGITS_BV = 3 * np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_support_is_that_of_transformers(top_k, top_p):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    warped = torch.from_numpy(LOGITS_BV / np.float32(0.7))
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    ours_BV = sampling.restrict(jnp.asarray(LOGITS_BV / np.float32(0.7)), top_k_B=jnp.full(4, top_k),
                                top_p_B=jnp.full(4, top_p, jnp.float32))
    np.testing.assert_array_equal(np.isfinite(ours_BV), np.isfinite(warped.numpy()))
    np.testing.assert_array_equal(np.asarray(ours_BV), warped.numpy())


def draw(params: SamplingParams, *, num: int = 4000, logits_V: np.ndarray = LOGITS_BV[0]) -> sampling.Sampled:
    """`num` tokens at as many positions."""
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (num, len(logits_V)))
    return jax.jit(sampling.sample)(logits_BV, sampling.settings([params] * num, batch_size=num),
                                    position_B=jnp.arange(num))


def test_frequencies_follow_the_tempered_softmax():
    sampled = draw(SamplingParams(temperature=1.7))
    expected = np.asarray(jax.nn.softmax(LOGITS_BV[0] / 1.7))
    found = np.bincount(sampled.token_B, minlength=50) / 4000
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 4000)


def test_logprob_is_the_untempered_models():
    sampled = draw(SamplingParams(temperature=0.5, top_k=3, top_p=0.9), num=64)
    expected_V = np.asarray(jax.nn.log_softmax(LOGITS_BV[0]))
    np.testing.assert_allclose(sampled.logprob_B, expected_V[sampled.token_B], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_greedy_takes_the_most_probable(temperature):
    sampled = draw(SamplingParams(temperature=temperature, top_k=5, top_p=0.5), num=8)
    assert set(np.asarray(sampled.token_B).tolist()) == {int(LOGITS_BV[0].argmax())}


def test_tokens_depend_on_seed_and_position_alone():
    rows = [SamplingParams(temperature=1.0, seed=seed) for seed in (3, -4, 3, 3)]
    flat_BV = jnp.zeros((4, 1000))
    position_B = jnp.array([5, 5, 5, 6])
    together = sampling.sample(flat_BV, sampling.settings(rows, batch_size=4), position_B=position_B).token_B
    assert together[0] == together[2]
    assert len(set(np.asarray(together).tolist())) == 3
    alone = sampling.sample(flat_BV[:1], sampling.settings(rows[:1], batch_size=1), position_B=position_B[:1]).token_B
    assert alone[0] == together[0]


def test_alternatives_are_the_most_probable_ones():
    rows = [SamplingParams(num_alternatives=3), SamplingParams()]
    sampled = sampling.sample(LOGITS_BV[:2], sampling.settings(rows, batch_size=2), position_B=jnp.arange(2))
    expected_BV = np.asarray(jax.nn.log_softmax(LOGITS_BV[:2]))
    np.testing.assert_array_equal(sampled.alternatives_BA[0], np.argsort(-expected_BV[0])[:sampling.MAX_ALTERNATIVES])
    np.testing.assert_allclose(sampled.alternative_logprobs_BA[0], np.sort(-expected_BV[0])[:20] * -1, rtol=1e-6)


@pytest.mark.parametrize("wrong", [dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_p=0.0),
                                   dict(top_p=1.1), dict(top_k=-1), dict(max_new_tokens=-1), dict(stop=("a", "")),
                                   dict(num_alternatives=21)])
def test_values_without_a_meaning_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)
