"""Named shapes of paged attention, shared by budgets and benchmarks: every sequence as long as its pages are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.options import Options
from llmjax.kernels.paged_attention.pages import Pages, Sequences


@dataclasses.dataclass(frozen=True)
class Spec:
    """B sequences of S tokens, Q of them new; N query and K key-value heads; L slots a page; latent form: H > W."""

    B: int
    S: int
    N: int
    K: int
    H: int
    W: int
    Q: int = 1
    L: int = 128
    dtype: str = "bfloat16"  # of the cache

    @property
    def row_dim(self) -> int:
        """What a key-value head keeps of a token."""
        return self.H if self.H > self.W else self.H + self.W

    @property
    def options(self) -> Options:
        return Options(scale=0.0 if self.H == self.W else 192**-0.5)

    def shapes(self) -> tuple:
        """Queries, pages, sequences."""
        num_pages, width = self.S // self.L, -(-self.row_dim // 128) * 128
        lead = (self.B * num_pages, self.K)
        scales = None if self.dtype == "bfloat16" else jax.ShapeDtypeStruct((*lead, 2, self.L), jnp.float32)
        pages = jax.eval_shape(Pages, jax.ShapeDtypeStruct((*lead, self.L, width), jnp.dtype(self.dtype)), scales)
        sequences = jax.eval_shape(Sequences, *(jax.ShapeDtypeStruct(shape, jnp.int32)
                                                for shape in ((self.B + 1,), (self.B,), (self.B, num_pages))))
        return jax.ShapeDtypeStruct((self.B * self.Q, self.N, self.H), jnp.bfloat16), pages, sequences

    def sequences(self) -> Sequences:
        """The pages of each sequence in a row."""
        starts_E = jnp.arange(self.B + 1, dtype=jnp.int32) * self.Q
        pages_BP = jnp.arange(self.B * self.S // self.L, dtype=jnp.int32).reshape(self.B, -1)
        return Sequences(starts_E, jnp.full(self.B, self.S, jnp.int32), pages_BP)

    def cache_bytes(self) -> float:
        """That every sequence has to be read once for; lanes that pad a row are not counted."""
        row_bytes = self.row_dim * jnp.dtype(self.dtype).itemsize + (0 if self.dtype == "bfloat16" else 8)
        return float(self.B * self.S * self.K * row_bytes)

    def flops(self) -> float:
        """Of scores and values; new tokens see all that lies before them, and each other causally."""
        return 2.0 * self.B * self.Q * (self.S - self.Q / 2) * self.N * (self.H + self.W)


SPECS = {
    "decode, 64 x 8k, 32/8 heads": Spec(64, 8192, 32, 8, 128, 128),
    "decode, 64 x 8k, int8 cache": Spec(64, 8192, 32, 8, 128, 128, L=256, dtype="int8"),
    "decode, 64 x 8k, fp8 cache": Spec(64, 8192, 32, 8, 128, 128, L=256, dtype="float8_e4m3fn"),
    "decode, 64 x 8k, latent, 128 heads": Spec(64, 8192, 128, 1, 576, 512, L=256),
    "chunks, 4 x 8k, 512 new": Spec(4, 8192, 32, 8, 128, 128, Q=512),
    "small": Spec(8, 1024, 8, 2, 128, 128),
    "small, fp8 cache": Spec(8, 4096, 8, 2, 128, 128, L=256, dtype="float8_e4m3fn"),
}
