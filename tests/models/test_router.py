"""Choice of experts, losses, the balancing bias, places at full experts: against others' code or plain loops."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llmjax.core.model_sections import MoEConfig
from llmjax.models.moe import places
from llmjax.models.router import choose, moved_bias, router_sums, token_weights

MOE = MoEConfig(num_experts=16, top_k=4, score="sigmoid", num_groups=4, top_groups=2, scaling_factor=2.5)


def logits_and_bias(num_tokens: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_tokens, 16)).astype(np.float32), 0.3 * rng.normal(size=16).astype(np.float32)


def test_grouped_choice_and_weights_equal_those_of_transformers() -> None:
    logits_NE, bias_E = logits_and_bias()
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5))
    with torch.no_grad():
        theirs.weight.copy_(torch.eye(16))
        theirs.e_score_correction_bias.copy_(torch.tensor(bias_E))
        _, their_weights, their_experts = theirs(torch.tensor(logits_NE))
    scores_NE = jax.nn.sigmoid(jnp.asarray(logits_NE))
    experts_NK = choose(scores_NE, jnp.asarray(bias_E), config=MOE)
    weights_NK = token_weights(scores_NE, experts_NK, config=MOE)
    order, their_order = np.argsort(experts_NK, axis=1), np.argsort(their_experts.numpy(), axis=1)
    np.testing.assert_array_equal(np.sort(experts_NK, axis=1), np.sort(their_experts.numpy(), axis=1))
    np.testing.assert_allclose(np.take_along_axis(np.asarray(weights_NK), order, axis=1),
                               np.take_along_axis(their_weights.numpy(), their_order, axis=1), rtol=1e-5)


def test_balancing_loss_equals_that_of_transformers() -> None:
    logits_NE, _ = logits_and_bias()
    config = MoEConfig(num_experts=16, top_k=4)
    real_N = np.arange(64) < 50
    theirs = load_balancing_loss_func((torch.tensor(logits_NE),), 16, 4, torch.tensor(real_N[None].astype(np.int64)))
    scores_NE = jax.nn.softmax(jnp.asarray(logits_NE))
    sums = router_sums(jnp.asarray(logits_NE), scores_NE, choose(scores_NE, None, config=config),
                       real_N=jnp.asarray(real_N))
    np.testing.assert_allclose(sums.balance_loss / 50, theirs / 4, rtol=1e-5)  # theirs is K when the load is even
    z = torch.logsumexp(torch.tensor(logits_NE), dim=-1).square()[:50].sum()
    np.testing.assert_allclose(sums.z_loss, z, rtol=1e-5)
    assert float(jnp.sum(sums.load_E)) == 50 * 4


def test_an_even_load_costs_one_and_any_other_more() -> None:
    even_NK = jnp.arange(64).reshape(16, 4) % 16
    flat, real_N = jnp.zeros((16, 16)), jnp.ones(16, bool)
    assert np.isclose(router_sums(flat, jax.nn.softmax(flat), even_NK, real_N=real_N).balance_loss, 16)
    fond = 3.0 * jax.nn.one_hot(even_NK * 0, 16).sum(1)
    sums = router_sums(fond, jax.nn.softmax(fond), even_NK * 0, real_N=real_N)
    assert sums.balance_loss > 16 and np.isclose(sums.max_load / 16, 16)


def test_the_bias_moves_against_the_load_until_it_is_even() -> None:
    logits_NE, _ = logits_and_bias(256)
    logits_NE[:, :3] += 2.0  # three experts that everybody likes
    config = dataclasses.replace(MOE, num_groups=1)
    scores_NE, bias_E, worst = jax.nn.sigmoid(jnp.asarray(logits_NE)), jnp.zeros(16), []
    for _ in range(100):
        load_E = jnp.bincount(choose(scores_NE, bias_E, config=config).reshape(-1), length=16)
        worst.append(float(jnp.max(load_E)) * 16 / (256 * 4))
        moved_E = moved_bias(bias_E, load_E, rate=0.01)
        assert np.all(np.sign(moved_E - bias_E) == np.sign(np.mean(load_E) - load_E))
        bias_E = moved_E
    assert worst[0] > 2.5 and worst[-1] < 1.3


def test_places_at_an_expert_go_by_choice_then_by_token_until_it_is_full() -> None:
    rng = np.random.default_rng(0)
    experts_GSK = np.stack([np.stack([rng.permutation(4)[:2] for _ in range(12)]) for _ in range(3)])
    real_GS = rng.random((3, 12)) < 0.8
    found_GSKC = np.asarray(places(jnp.asarray(experts_GSK), jnp.asarray(real_GS), num_experts=4, capacity=4))
    fullest = 0
    for group in range(3):
        taken: Counter[int] = Counter()
        for choice in range(2):
            for token in np.flatnonzero(real_GS[group]):
                expert = int(experts_GSK[group, token, choice])
                wanted = np.arange(4) == taken[expert]
                np.testing.assert_array_equal(found_GSKC[group, token, choice], wanted)
                taken[expert] += 1
        fullest = max(fullest, *taken.values())
    assert fullest > 4, "no expert was full: the case shows nothing"
    assert not np.any(found_GSKC[~real_GS])
