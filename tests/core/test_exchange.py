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
ROOMS = {"one round": X * M, "three rounds": 7}  # the third shard is sent 19 rows


def there_and_back(mesh: Mesh, *, room: int) -> jax.stages.Wrapped:
    """What arrives in a round, what comes back, and the gradient of a weighted sum of both."""
    def local(rows_MD: jax.Array, weight_RD: jax.Array, counts_XX: jax.Array, number: jax.Array) -> tuple:
        pieces = exchange.pieces_of_round(counts_XX, number, room=room)

        def scalar(rows_MD: jax.Array) -> tuple:
            there_RD = exchange.send(rows_MD, pieces, room)
            back_MD = exchange.send(there_RD, pieces.back(), M)
            return jnp.sum(there_RD * weight_RD) + jnp.sum(back_MD), (there_RD, back_MD)

        return *jax.value_and_grad(scalar, has_aux=True)(rows_MD)[0][1], jax.grad(scalar, has_aux=True)(rows_MD)[0]

    rows = P("expert")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, P(), P()), out_specs=(rows, rows, rows),
                                 check_vma=False))


@pytest.mark.parametrize("name", ROOMS)
def test_every_row_arrives_and_comes_back_with_its_derivative(name: str) -> None:
    room = ROOMS[name]
    mesh = make_mesh(MeshConfig(expert=X, data=1), jax.devices()[:X])
    rng = np.random.default_rng(0)
    rows_XMD, weight_XRD = (rng.normal(size=(X, size, 2)).astype(np.float32) for size in (M, room))
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    arrived, back, grad = [], np.zeros((X, M, 2)), np.zeros((X, M, 2))
    for number in range(-(-COUNTS.sum(axis=0).max() // room)):
        with jax.set_mesh(mesh):
            found = there_and_back(mesh, room=room)(
                put(rows_XMD.reshape(-1, 2), P("expert")), put(weight_XRD.reshape(-1, 2), P("expert")),
                put(COUNTS, P()), put(np.int32(number), P()))  # fmt: skip
        there, *others = (np.asarray(array).reshape(X, -1, 2) for array in found)
        arrived.append(there)
        back, grad = back + others[0], grad + others[1]
    arrived_XRD = np.concatenate(arrived, axis=1)
    starts = np.cumsum(COUNTS, axis=1) - COUNTS
    for receiver in range(X):
        place = 0
        for sender in range(X):
            sent = slice(starts[sender, receiver], starts[sender, receiver] + COUNTS[sender, receiver])
            landed = np.arange(place, place + COUNTS[sender, receiver])
            np.testing.assert_array_equal(arrived_XRD[receiver, landed], rows_XMD[sender, sent])
            np.testing.assert_allclose(grad[sender, sent], 1.0 + weight_XRD[receiver, landed % room], rtol=1e-5)
            place += len(landed)
        assert not np.any(arrived_XRD[receiver, place:])
    for sender, num_sent in enumerate(COUNTS.sum(axis=1)):
        np.testing.assert_array_equal(back[sender, :num_sent], rows_XMD[sender, :num_sent])
        assert not np.any(back[sender, num_sent:])


@pytest.mark.tpu_compile
def test_a_tpu_sends_rows_and_gathers_nothing() -> None:
    mesh = make_mesh(MeshConfig(expert=X, data=1), topology.load("v5e:2x2").devices)
    struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        text = there_and_back(mesh, room=X * M).lower(
            struct((X * M, 128), jnp.bfloat16, P("expert")), struct((X * X * M, 128), jnp.bfloat16, P("expert")),
            struct((X, X), jnp.int32, P()), struct((), jnp.int32, P())).compile().as_text()
    assert "ragged-all-to-all" in text and "all-gather" not in text
