"""Sliced linear cross-entropy against the plain reference and torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.kernels.cross_entropy import api, reference, xla


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
        return xla.linear_cross_entropy(x_TD, w_DV, targets_T, width, keep, softcap).nll_T

    ours, pull = jax.vjp(sliced, x_TD, w_DV)
    plain, plain_pull = jax.vjp(lambda x, w: reference.linear_cross_entropy(x, w, targets_T, softcap), x_TD, w_DV)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(pull(cotangent_T), plain_pull(cotangent_T), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5)


def test_log_z_is_differentiable_too() -> None:
    x_TD, w_DV, targets_T = inputs()

    def z_loss(x_TD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(api.linear_cross_entropy(x_TD, w_DV, targets_T).log_z_T))

    plain = jax.grad(lambda x: jnp.sum(jnp.square(jax.nn.logsumexp(x @ w_DV, axis=-1))))(x_TD)
    np.testing.assert_allclose(jax.grad(z_loss)(x_TD), plain, rtol=1e-4, atol=1e-4)


def test_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    x_TD, w_DV, targets_T = inputs()
    logits = torch.tensor(np.asarray(x_TD)) @ torch.tensor(np.asarray(w_DV))
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(targets_T)).long(), reduction="none")
    np.testing.assert_allclose(api.linear_cross_entropy(x_TD, w_DV, targets_T).nll_T, wanted, rtol=1e-5, atol=1e-5)


def test_smoothed_labels_equal_torch_on_one_device_and_with_the_vocabulary_split() -> None:
    torch = pytest.importorskip("torch")
    x_TD, w_DV, targets_T = inputs()
    cotangent_T = jax.random.normal(jax.random.key(1), targets_T.shape)
    x, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x_TD, w_DV))
    wanted = torch.nn.functional.cross_entropy(x @ w, torch.tensor(np.asarray(targets_T)).long(), reduction="none",
                                               label_smoothing=0.2)
    wanted.backward(torch.tensor(np.asarray(cotangent_T)))

    def run(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, cotangent_T: jax.Array) -> tuple:
        nll_T, pull = jax.vjp(lambda x, w: api.linear_cross_entropy(x, w, targets_T, smoothing=0.2).nll_T, x_TD, w_DV)
        return nll_T, *pull(cotangent_T)

    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Explicit,))
    tokens, columns = P("tensor"), P(None, "tensor")
    specs = (tokens, columns, tokens, tokens)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(tokens, tokens, columns), check_vma=False)
    whole = (x_TD, w_DV, targets_T, cotangent_T)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(whole, specs, strict=True)]
    for found in (run(*whole), jax.jit(split)(*placed)):
        for ours, theirs in zip(found, (wanted.detach(), x.grad, w.grad), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_slices_cover_the_vocabulary_and_are_small_enough() -> None:
    for num_tokens, vocab_size in ((1, 10), (4096, 8192), (16_384, 128_256), (7, 10**9), (10**8, 1000)):
        width = api.slice_width(num_tokens, vocab_size)
        assert width <= api.LANES or num_tokens * width * 4 <= api.SLICE_BYTES
    edges = [(columns.start, columns.stop) for columns in xla.slices(40, 16)]
    assert edges == [(0, 16), (16, 32), (32, 40)]
