"""Sliced linear cross-entropy against the plain reference and torch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core import collectives
from llmjax.kernels.cross_entropy import api, pallas_tpu, reference, weighted, xla


def inputs(num_tokens: int = 24) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (jax.random.normal(keys[0], (num_tokens, 16)), jax.random.normal(keys[1], (16, 40)),
            jax.random.randint(keys[2], (num_tokens,), 0, 40))


@pytest.mark.parametrize(("width", "keep", "softcap"), [
    (40, True, 0.0), (40, False, 0.0), (16, False, 0.0), (1, True, 0.0), (40, True, 5.0), (16, False, 5.0)])
def test_values_and_gradients_equal_the_reference(width: int, keep: bool, softcap: float) -> None:
    x_TD, w_DV, targets_T = inputs()
    cotangent_T = jax.random.normal(jax.random.key(1), targets_T.shape)

    def sliced(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
        return xla.linear_cross_entropy(x_TD, w_DV, targets_T, width, keep, softcap)

    ours, pull = jax.vjp(sliced, x_TD, w_DV)
    plain, plain_pull = jax.vjp(lambda x, w: reference.linear_cross_entropy(x, w, targets_T, softcap), x_TD, w_DV)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(pull(cotangent_T), plain_pull(cotangent_T), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5)


def test_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    x_TD, w_DV, targets_T = inputs()
    logits = torch.tensor(np.asarray(x_TD)) @ torch.tensor(np.asarray(w_DV))
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(targets_T)).long(), reduction="none")
    np.testing.assert_allclose(api.linear_cross_entropy(x_TD, w_DV, targets_T), wanted, rtol=1e-5, atol=1e-5)


def plain_sum(x_TD: jax.Array, w_DV: jax.Array, bias_V: jax.Array, targets_T: jax.Array, weights_T: jax.Array,
              terms: api.Terms) -> jax.Array:
    """By all logits at once."""
    logits_TV = x_TD @ w_DV + bias_V[None]
    logits_TV = terms.softcap * jnp.tanh(logits_TV / terms.softcap) if terms.softcap else logits_TV
    log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
    wanted_TV = jax.nn.one_hot(targets_T, w_DV.shape[1]) * (1 - terms.smoothing) + terms.smoothing / w_DV.shape[1]
    losses_T = log_z_T - jnp.sum(wanted_TV * logits_TV, axis=-1) + terms.z_loss * jnp.square(log_z_T)
    return jnp.sum(losses_T * weights_T)


@pytest.mark.parametrize("terms", [api.Terms(), api.Terms(softcap=5.0), api.Terms(smoothing=0.2),
                                   api.Terms(z_loss=0.1), api.Terms(5.0, 0.2, 0.1)], ids=str)  # fmt: skip
@pytest.mark.parametrize("tokens_of_a_chunk", [24, 16])
def test_the_sum_and_its_gradient_equal_the_plain_ones(terms: api.Terms, tokens_of_a_chunk: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "CHUNK_BYTES", tokens_of_a_chunk * 40 * 4)
    x_TD, w_DV, targets_T = inputs()
    bias_V, weights_T = (jax.random.normal(jax.random.key(seed), (size,)) for seed, size in ((2, 40), (3, 24)))

    def ours(x_TD: jax.Array, w_DV: jax.Array, bias_V: jax.Array) -> jax.Array:
        found = api.weighted_cross_entropy(x_TD, w_DV, targets_T, weights_T, bias_V=bias_V, terms=terms)
        return 3.0 * found  # a loss may be scaled

    def wanted(x_TD: jax.Array, w_DV: jax.Array, bias_V: jax.Array) -> jax.Array:
        return 3.0 * plain_sum(x_TD, w_DV, bias_V, targets_T, weights_T, terms)

    assert weighted.chunk_length(24, 40) == tokens_of_a_chunk
    assert ours(x_TD, w_DV, bias_V) == pytest.approx(float(wanted(x_TD, w_DV, bias_V)), rel=1e-5)
    found, expected = (jax.value_and_grad(f, argnums=(0, 1, 2))(x_TD, w_DV, bias_V) for f in (ours, wanted))
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pallas kernels run on this machine, two cores' share of tiles of 128 columns."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pallas_tpu, "COLUMNS", (pallas_tpu.LANES,))


def large_inputs(num_tokens: int, width: int, vocab_size: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Logits of a few tens, targets that are the likeliest word for half of the tokens, weights of either sign."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x_TD = jax.random.normal(keys[0], (num_tokens, width), jnp.bfloat16)
    w_DV = jax.random.normal(keys[1], (width, vocab_size), jnp.bfloat16)
    best_T = jnp.argmax(x_TD @ w_DV, axis=1)
    targets_T = jnp.where(jnp.arange(num_tokens) % 2 == 0, best_T,
                          jax.random.randint(keys[2], (num_tokens,), 0, vocab_size))
    return x_TD, w_DV, targets_T.astype(jnp.int32), jax.random.uniform(keys[3], (num_tokens,), minval=-0.2)


def close(found: jax.Array, wanted: jax.Array) -> None:
    """To a hundredth of the largest: what rounding to bfloat16 leaves of a gradient."""
    found, wanted = (np.asarray(a, np.float32) for a in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("terms", [api.Terms(), api.Terms(softcap=20.0), api.Terms(smoothing=0.2),
                                   api.Terms(z_loss=0.01), api.Terms(20.0, 0.2, 0.01)], ids=str)  # fmt: skip
@pytest.mark.parametrize("num_tokens", [48, 80])
def test_the_tpu_kernels_equal_the_plain_sum(terms: api.Terms, num_tokens: int, interpreted: None) -> None:
    compare_with_the_plain_sum(large_inputs(num_tokens, 128, 512), terms)


def test_the_tpu_kernels_of_chips_with_one_core(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "DEFAULT_CORES", 1)
    compare_with_the_plain_sum(large_inputs(48, 128, 384), api.Terms(20.0, 0.2, 0.01))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(1, 6).map(lambda n: 16 * n), width=st.sampled_from([128, 384]), tiles=st.integers(2, 7),
       softcap=st.sampled_from([0.0, 20.0]), smoothing=st.sampled_from([0.0, 0.1]),
       z_loss=st.sampled_from([0.0, 0.01]), seed=st.integers(0, 99))  # fmt: skip
def test_any_shape_and_terms(num_tokens: int, width: int, tiles: int, softcap: float, smoothing: float, z_loss: float,
                             seed: int, interpreted: None) -> None:
    compare_with_the_plain_sum(large_inputs(num_tokens, width, 128 * tiles, seed),
                               api.Terms(softcap, smoothing, z_loss))


def compare_with_the_plain_sum(inputs: tuple[jax.Array, ...], terms: api.Terms) -> None:
    """The kernels by several chunks, the first of which reaches into the second."""
    x_TD, w_DV, targets_T, weights_T = inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "FEWEST_TOKENS", 16)
        patch.setattr(pallas_tpu, "CHUNK_BYTES", 24 * 2 * (w_DV.shape[1] + 6 * w_DV.shape[0]))
        found = jax.jit(pallas_tpu.losses_and_gradient, static_argnums=4)(*inputs, terms)

    def wanted(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
        return plain_sum(x_TD, w_DV, jnp.zeros(w_DV.shape[1]), targets_T, weights_T, terms)

    value, gradient = jax.value_and_grad(wanted, argnums=(0, 1))(x_TD.astype(jnp.float32), w_DV.astype(jnp.float32))
    assert jnp.sum(found[0]) == pytest.approx(float(value), rel=1e-4, abs=1e-4)
    close(found[1], gradient[0])
    close(found[2], gradient[1])


def test_the_tpu_kernels_with_the_vocabulary_split(interpreted: None) -> None:
    x_TD, w_DV, targets_T, weights_T = large_inputs(32, 128, 1024)
    terms = api.Terms(smoothing=0.1, z_loss=0.01)

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        losses_T, dx_TD, dw_DV = pallas_tpu.losses_and_gradient(*arrays, terms)
        return losses_T, collectives.sum_over(dx_TD.astype(jnp.float32), ("tensor",)), dw_DV

    columns = P(None, "tensor")
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), columns, P(), P()), out_specs=(P(), P(), columns),
                          check_vma=False)
    whole = run(x_TD, w_DV, targets_T, weights_T)
    found = jax.jit(split)(x_TD, w_DV, targets_T, weights_T)
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-5, atol=1e-5)
    close(found[1], whole[1])
    close(found[2], whole[2])


def test_what_is_left_of_a_certain_target_is_not_rounded_away(interpreted: None) -> None:
    _, w_DV, targets_T, weights_T = large_inputs(16, 128, 512)
    x_TD = 0.15 * w_DV[:, targets_T].T  # logits of about twenty, others of one or two
    assert reference.linear_cross_entropy(x_TD, w_DV, targets_T).max() < 0.01
    compare_with_the_plain_sum((x_TD, w_DV, targets_T, weights_T), api.PLAIN)


def test_soft_capped_targets_far_below_the_best(interpreted: None) -> None:
    x_TD, w_DV, _, weights_T = large_inputs(16, 128, 512)
    x_TD = 4 * x_TD  # products up to 200, capped at 50; the targets' are the least of all
    targets_T = jnp.argmin(x_TD @ w_DV, axis=1).astype(jnp.int32)
    compare_with_the_plain_sum((x_TD, w_DV, targets_T, weights_T), api.Terms(softcap=50.0, smoothing=0.1))


def test_logits_beyond_every_exponential_stay_finite(interpreted: None) -> None:
    x_TD, w_DV, targets_T, weights_T = large_inputs(16, 128, 512)
    x_TD = 30 * x_TD  # logits of a thousand, far apart from tile to tile
    losses_T, *gradient = pallas_tpu.losses_and_gradient(x_TD, w_DV, targets_T, weights_T, api.PLAIN)
    wanted_T = weights_T * reference.linear_cross_entropy(x_TD, w_DV, targets_T)
    np.testing.assert_allclose(losses_T, wanted_T, rtol=1e-4, atol=1e-3)
    assert all(bool(jnp.all(jnp.isfinite(one))) for one in gradient)


def test_what_does_not_fit_the_kernels_is_for_xla() -> None:
    assert pallas_tpu.choose_tiling(16_384, 4096, 131_072).tokens >= 640
    tiling = pallas_tpu.choose_tiling(16_384, 768, 50_304)
    assert tiling.grid(50_304) == (2, 66) and 50_304 // tiling.columns == 131  # the last core has one tile less
    for shape in ((64, 100, 512), (64, 128, 500), (16_384, 65_536, 131_072), (37, 128, 512), (0, 128, 512),
                  (64, 128, 128)):  # one tile for two cores
        with pytest.raises(NotImplementedError, match="TPU cross-entropy"):
            pallas_tpu.choose_tiling(*shape)


def test_a_scaled_loss_in_half_precision_keeps_small_derivatives() -> None:
    x_TD, w_DV, targets_T = inputs()
    weights_T, scale = jnp.full(targets_T.shape, 1e-7), 2.0**15

    def of(dtype: str) -> jax.Array:
        def scaled(x_TD: jax.Array) -> jax.Array:
            return scale * api.weighted_cross_entropy(x_TD, w_DV.astype(dtype), targets_T, weights_T)

        return jax.grad(scaled)(x_TD.astype(dtype)).astype(jnp.float32)

    np.testing.assert_allclose(of("float16"), of("float32"), rtol=0.02, atol=1e-5)


def test_smoothed_labels_equal_torch_on_one_device_and_with_the_vocabulary_split() -> None:
    torch = pytest.importorskip("torch")
    x_TD, w_DV, targets_T = inputs()
    weights_T = jax.random.normal(jax.random.key(1), targets_T.shape)
    x, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x_TD, w_DV))
    wanted = torch.nn.functional.cross_entropy(x @ w, torch.tensor(np.asarray(targets_T)).long(), reduction="none",
                                               label_smoothing=0.2)
    total = (wanted * torch.tensor(np.asarray(weights_T))).sum()
    total.backward()

    def run(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array) -> tuple:
        def own(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
            return api.weighted_cross_entropy(x_TD, w_DV, targets_T, weights_T, terms=api.Terms(smoothing=0.2))

        found, gradient = jax.value_and_grad(own, argnums=(0, 1))(x_TD, w_DV)
        return collectives.sum_over(found, ("tensor",)), *gradient

    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Explicit,))
    tokens, columns = P("tensor"), P(None, "tensor")
    specs = (tokens, columns, tokens, tokens)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P(), tokens, columns), check_vma=False)
    whole = (x_TD, w_DV, targets_T, weights_T)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(whole, specs, strict=True)]
    for found in (run(*whole), jax.jit(split)(*placed)):
        for ours, theirs in zip(found, (total.detach(), x.grad, w.grad), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_slices_cover_the_vocabulary_and_are_small_enough() -> None:
    for num_tokens, vocab_size in ((1, 10), (4096, 8192), (16_384, 128_256), (7, 10**9), (10**8, 1000)):
        width = api.slice_width(num_tokens, vocab_size)
        assert width <= api.LANES or num_tokens * width * 4 <= api.SLICE_BYTES
    edges = [(columns.start, columns.stop) for columns in xla.slices(40, 16)]
    assert edges == [(0, 16), (16, 32), (32, 40)]
