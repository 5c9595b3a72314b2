"""Our products on the CPU: values, and what decides that they are taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig
from llmjax.kernels.cpu import library
from llmjax.kernels.matmul import api, cpu
from llmjax.models.dense import dense
from llmjax.models.stack import Execution, recomputed

needs_kernels = pytest.mark.skipif(not library.available(), reason="no C compiler, or another kind of processor")

# M, N, K: one tile, less, whole and broken tiles, several blocks of K, wide and tall, every corner of a panel.
SHAPES = [(14, 32, 8), (1, 1, 1), (3, 5, 7), (28, 64, 512), (100, 77, 513), (129, 33, 1024), (17, 700, 1500),
          (700, 17, 40), (32, 512, 128), (4, 1100, 600), (18, 31, 2048)]  # fmt: skip
LAYOUTS = {"nn": "MK,KN->MN", "nt": "MK,NK->MN", "tn": "KM,KN->MN"}


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def operands(shape: tuple[int, int, int], layout: str, *batch: int) -> tuple[jax.Array, jax.Array]:
    M, N, K = shape
    a, b = random(*batch, M, K), random(*batch, K, N, seed=1)
    return a.mT if layout[0] == "t" else a, b.mT if layout[1] == "t" else b


def exact(a: jax.Array, b: jax.Array, layout: str) -> np.ndarray:
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a64.mT if layout[0] == "t" else a64) @ (b64.mT if layout[1] == "t" else b64)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_numpy(shape: tuple[int, int, int], layout: str) -> None:
    a, b = operands(shape, layout)
    bound = 4 * np.finfo(np.float32).eps * np.abs(exact(abs(a), abs(b), layout)).max()
    np.testing.assert_allclose(cpu.multiply(a, b, layout), exact(a, b, layout), rtol=0, atol=bound)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(14, 32, 8), (100, 77, 600), (33, 520, 32)], ids=str)
def test_a_batch_is_its_products_one_by_one(shape: tuple[int, int, int], layout: str) -> None:
    a, b = operands(shape, layout, 2, 3)
    together = np.asarray(cpu.multiply(a, b, layout))
    for place in np.ndindex(2, 3):
        assert np.array_equal(together[place], cpu.multiply(a[place], b[place], layout))
    mapped = jax.vmap(lambda a, b: cpu.multiply(a, b, layout), in_axes=(0, None))(a, b[0])
    assert np.array_equal(mapped[1], cpu.multiply(a[1], b[0], layout))


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_element_is_the_same_whatever_is_beside_it(layout: str) -> None:
    """Rows of other documents, other columns, and the threads that take the parts."""
    a, b = operands((400, 300, 700), layout)
    whole = np.asarray(cpu.multiply(a, b, layout))
    few_rows = a[:, 5:21] if layout[0] == "t" else a[5:21]
    few_columns = b[40:61] if layout[1] == "t" else b[:, 40:61]
    assert np.array_equal(cpu.multiply(few_rows, b, layout), whole[5:21])
    assert np.array_equal(cpu.multiply(a, few_columns, layout), whole[:, 40:61])
    assert all(np.array_equal(cpu.multiply(a, b, layout), whole) for _ in range(20))


@needs_kernels
def test_several_at_once_do_not_disturb_each_other() -> None:
    many = [operands((150 + 30 * i, 200, 300), "nn") for i in range(8)]
    together = jax.jit(lambda many: [cpu.multiply(a, b, "nn") for a, b in many])
    for _ in range(5):
        for (a, b), made in zip(many, together(many), strict=True):
            np.testing.assert_allclose(made, exact(a, b, "nn"), rtol=0, atol=1e-3)


def products(function: object, *args: jax.Array) -> tuple[int, int]:
    """How many of ours and how many of XLA's a function calls."""
    text = jax.jit(function).lower(*args).as_text()  # type: ignore[arg-type]
    return text.count("@llmjax_multiply"), text.count("stablehlo.dot_general")


@needs_kernels
@pytest.mark.parametrize(
    ("subscripts", "shape_a", "shape_b"),
    [("TI,IO->TO", (256, 64), (64, 128)), ("TO,IO->TI", (256, 128), (64, 128)), ("TI,TO->IO", (256, 64), (256, 128)),
     ("BKGCH,BKSH->BKGCS", (2, 2, 3, 64, 32), (2, 2, 128, 32)),
     ("BKGCH,BKGCS->BKHS", (2, 2, 3, 64, 32), (2, 2, 3, 64, 128)),
     ("BKGCS,BKSW->BKGCW", (2, 2, 3, 64, 128), (2, 2, 128, 32))],
)  # fmt: skip
def test_einsum_takes_ours_on_the_cpu(subscripts: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    a, b = random(*shape_a), random(*shape_b, seed=1)
    with jax.set_mesh(single_device_mesh()):
        assert products(lambda a, b: api.einsum(subscripts, a, b), a, b) == (1, 0)
        made = api.einsum(subscripts, a, b)
    np.testing.assert_allclose(made, jnp.einsum(subscripts, a, b), rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("a", "b", "subscripts"),
    [(random(256, 64).astype(jnp.bfloat16), random(64, 128).astype(jnp.bfloat16), "TI,IO->TO"),
     (random(8, 64), random(64, 128), "TI,IO->TO"), (random(256, 8), random(8, 64), "TI,IO->TO"),
     (random(64, 256), random(128, 64), "IT,OI->TO"), (random(256, 4, 64), random(4, 64, 128), "TBI,BIO->BTO")],
    ids=["bfloat16", "few rows", "small", "both transposed", "batch behind"],
)  # fmt: skip
def test_other_products_are_left_to_xla(a: jax.Array, b: jax.Array, subscripts: str) -> None:
    with jax.set_mesh(single_device_mesh()):
        assert products(lambda a, b: api.einsum(subscripts, a, b), a, b) == (0, 1)


@needs_kernels
def test_no_products_of_an_empty_batch() -> None:
    assert cpu.multiply(jnp.zeros((0, 20, 30)), jnp.zeros((0, 30, 40)), "nn").shape == (0, 20, 40)


@needs_kernels
def test_saved_products_are_not_run_again() -> None:
    """By train.remat=save_matmuls: two in the forward pass, twice two in the backward pass, and none twice."""
    x, w, v = random(256, 64), random(64, 128, seed=1), random(128, 64, seed=2)

    def calls(remat: str) -> int:
        def scalar(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(recomputed(lambda x: dense(jnp.sin(dense(x, w)), v), Execution(remat))(x))

        return str(jax.make_jaxpr(jax.grad(scalar, argnums=(0, 1, 2)))(x, w, v)).count("target_name=llmjax_multiply")

    with jax.set_mesh(single_device_mesh()):
        assert calls("none") == calls("save_matmuls") == 6 and calls("full") == 7


@needs_kernels
def test_products_of_several_devices_are_left_to_xla() -> None:
    a, b = random(512, 64), random(64, 256, seed=1)
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        a = jax.device_put(a, P("data"))
        by_hand = jax.shard_map(lambda a, b: api.einsum("TI,IO->TO", a, b), in_specs=(P("data"), P()),
                                out_specs=P("data"), check_vma=False)
        assert products(by_hand, a, b) == (0, 1)
        assert products(lambda a, b: api.einsum("TI,IO->TO", a, b), a, b) == (0, 1)
        np.testing.assert_allclose(by_hand(a, b), exact(a, b, "nn"), rtol=0, atol=1e-4)
    assert products(lambda a, b: api.einsum("TI,IO->TO", a, b), a, b) == (0, 1)  # for no device that is known
