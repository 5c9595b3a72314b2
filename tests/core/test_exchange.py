"""Rows sent to experts and back: every row arrives once, and its derivative with it; what a TPU compiles it to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core import exchange
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.plan import topology

X, M = 4, 12
COUNTS = np.array([[3, 0, 5, 4], [0, 0, 12, 0], [2, 2, 2, 2], [1, 3, 0, 6]], np.int32)  # not all rows are sent


def there_and_back(mesh: Mesh) -> jax.stages.Wrapped:
    """What arrives, what comes back, and the gradient of a weighted sum of both."""
    def local(rows_MD: jax.Array, weight_RD: jax.Array, counts_XX: jax.Array) -> tuple:
        def scalar(rows_MD: jax.Array) -> tuple:
            there_RD = exchange.send(rows_MD, counts_XX)
            back_MD = exchange.send_back(there_RD, counts_XX)
            return jnp.sum(there_RD * weight_RD) + jnp.sum(back_MD), (there_RD, back_MD)

        return *jax.value_and_grad(scalar, has_aux=True)(rows_MD)[0][1], jax.grad(scalar, has_aux=True)(rows_MD)[0]

    rows = P("expert")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, P()), out_specs=(rows, rows, rows),
                                 check_vma=False))


def test_every_row_arrives_and_comes_back_with_its_derivative() -> None:
    mesh = make_mesh(MeshConfig(expert=X, data=1), jax.devices()[:X])
    rng = np.random.default_rng(0)
    rows_XMD, weight_XRD = rng.normal(size=(X, M, 2)).astype(np.float32), rng.normal(size=(X, X * M, 2))
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        there, back, grad = there_and_back(mesh)(
            put(rows_XMD.reshape(-1, 2), P("expert")), put(weight_XRD.astype(np.float32).reshape(-1, 2), P("expert")),
            put(COUNTS, P()))
    starts = np.cumsum(COUNTS, axis=1) - COUNTS
    for receiver in range(X):
        arrived, place = np.asarray(there).reshape(X, X * M, 2)[receiver], 0
        for sender in range(X):
            sent = slice(starts[sender, receiver], starts[sender, receiver] + COUNTS[sender, receiver])
            landed = slice(place, place + COUNTS[sender, receiver])
            np.testing.assert_array_equal(arrived[landed], rows_XMD[sender, sent])
            np.testing.assert_allclose(np.asarray(grad).reshape(X, M, 2)[sender, sent],
                                       1.0 + weight_XRD[receiver, landed], rtol=1e-5)
            place = landed.stop
        assert not np.any(arrived[place:])
    for sender, num_sent in enumerate(COUNTS.sum(axis=1)):
        np.testing.assert_array_equal(np.asarray(back).reshape(X, M, 2)[sender, :num_sent], rows_XMD[sender, :num_sent])
        assert not np.any(np.asarray(back).reshape(X, M, 2)[sender, num_sent:])


@pytest.mark.tpu_compile
def test_a_tpu_sends_rows_and_gathers_nothing() -> None:
    mesh = make_mesh(MeshConfig(expert=X, data=1), topology.load("v5e:2x2").devices)
    struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        text = there_and_back(mesh).lower(
            struct((X * M, 128), jnp.bfloat16, P("expert")), struct((X * X * M, 128), jnp.bfloat16, P("expert")),
            struct((X, X), jnp.int32, P())).compile().as_text()
    assert "ragged-all-to-all" in text and "all-gather" not in text
