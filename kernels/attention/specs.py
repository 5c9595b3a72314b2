"""Named shapes of attention, shared by tests, budgets and benchmarks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of T tokens in `documents` equal documents, bf16."""

    T: int
    N: int = 2
    K: int = 2
    H: int = 128
    W: int = 128
    documents: int = 1
    options: Options = CAUSAL

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Queries, keys, values, segment ids."""
        heads = ((self.N, self.H), (self.K, self.H), (self.K, self.W))
        arrays = (jax.ShapeDtypeStruct((1, self.T, *shape), jnp.bfloat16) for shape in heads)
        return (*arrays, jax.ShapeDtypeStruct((1, self.T), jnp.int32))

    def flops(self) -> float:
        """Of the two products of the forward pass, pairs that are seen alone."""
        length = self.T / self.documents
        pairs = length * length / (2 if self.options.kind == "causal" else 1)
        if self.options.window:
            pairs = min(pairs, length * self.options.window)
        return 2.0 * self.N * self.documents * pairs * (self.H + self.W)


SPECS = {
    "4k": Spec(4096),
    "8k": Spec(8192),
    "32k": Spec(32768),
    "4k in quarters": Spec(4096, documents=4),
    "8k in quarters": Spec(8192, documents=4),
    "32k in quarters": Spec(32768, documents=4),
    "8k, 8 heads on 2, window 1024": Spec(8192, N=8, options=Options(window=1024)),
    "4k latent, 192 and 128": Spec(4096, H=192),
}


@dataclasses.dataclass(frozen=True)
class Trips:
    """Mean tiles that a block of queries meets in a chunk of keys."""

    unmasked: np.ndarray  # (C,) of each chunk
    masked: np.ndarray
    num_blocks: int  # of queries


def trips(spec: Spec, mesh: jax.sharding.Mesh) -> Trips:
    """Counted from the kernel's own table, for the chip of `mesh`."""
    from llmjax.kernels.attention import pallas_tpu, tpu_tiles  # Pallas takes its time to load

    with jax.set_mesh(mesh):
        tiling = tpu_tiles.choose_tiling(spec.T, spec.T, bytes_per_key=pallas_tpu.bytes_per_key(spec.H, spec.W, 2))
    ids_BT = jnp.repeat(jnp.arange(spec.documents), spec.T // spec.documents)[None]
    table = tpu_tiles.make_slots(ids_BT, ids_BT, q_offset=0, tiling=tiling, options=spec.options, terms=NO_TERMS).tiles
    num_blocks = spec.T // tiling.queries
    fields = np.asarray(table).reshape(tpu_tiles.Tile.FIELDS, num_blocks, -1)
    return Trips(2 * fields[tpu_tiles.Tile.PAIRS].mean(axis=0), fields[tpu_tiles.Tile.MASKED].mean(axis=0), num_blocks)
