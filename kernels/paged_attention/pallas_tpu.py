"""Ragged paged attention on TPU by our own kernel: once for the sequences that decode, once for those with more tokens.

Letters: T tokens, B sequences, N query heads, K key-value heads, G = N / K, U units of Q queries or R = Q G rows, L
slots of a page, C width of a row, H key dim, W value dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from llmjax.core.mesh import for_tpu
from llmjax.kernels.attention.options import CAUSAL, Options
from llmjax.kernels.attention.tpu_scores import LOG2E, MASKED
from llmjax.kernels.attention.tpu_tiles import round_up, vmem_bytes
from llmjax.kernels.paged_attention.pages import Pages, RowParts, Sequences, places
from llmjax.kernels.paged_attention.tpu_kernel import LANES, Kind, Static, attend
from llmjax.kernels.paged_attention.tpu_plan import Blocks, make_steps
from llmjax.kernels.paged_attention.units import make_units

ROWS = 512  # of a unit with several queries
SLOTS: dict[Kind, int] = {"decode": 1024, "chunk": 512}  # of a step at most
STEP_BYTES = 8 * 2**20  # of pages in a step; twice that lies in vector memory
SUBLANES = 8  # rows of a vector register of float32
DEFAULT_CORES = 2  # where no chip is known


def paged_attention(q_TNH: jax.Array, pages: Pages, sequences: Sequences, *, max_queries: int, value_dim: int,
                    options: Options = CAUSAL, sinks_N: jax.Array | None = None) -> jax.Array:
    """See `api.paged_attention`; raises NotImplementedError for pages that are no multiple of 128 slots."""
    (T, N, H), (_, K, L, C) = q_TNH.shape, pages.rows_ZKLC.shape
    if L % LANES or options.kind != "causal":
        raise NotImplementedError(f"TPU paged attention: causal, pages of multiples of 128 slots, not {L}")
    parts = RowParts.of(C, key_dim=H, value_dim=value_dim)
    out_TNW = jnp.zeros((T, N, value_dim), q_TNH.dtype)
    if not T:
        return out_TNW
    tokens_B = jnp.diff(sequences.starts_E)
    place = places(sequences, T)
    chosen: dict[Kind, jax.Array] = {"decode": tokens_B == 1, "chunk": tokens_B > 1}
    for kind, chosen_B in chosen.items():
        if kind == "decode" or max_queries > 1:
            blocks = choose_blocks(kind, pages, num_heads=N, max_queries=max_queries)
            static = Static(options, parts, blocks, kind, group=N // K)
            found_TNW = _of_chosen(q_TNH, pages, sequences, chosen_B, static=static, sinks_N=sinks_N)
            chosen_T = place.real_T & chosen_B[place.sequence_T]
            out_TNW = jnp.where(chosen_T[:, None, None], found_TNW, out_TNW)
    return out_TNW


def choose_blocks(kind: Kind, pages: Pages, *, num_heads: int, max_queries: int) -> Blocks:
    """As many pages a step as fit; a row of any width fills whole registers."""
    _, K, L, C = pages.rows_ZKLC.shape
    page_bytes = K * L * round_up(C, LANES) * pages.rows_ZKLC.dtype.itemsize
    num_pages = max(1, min(SLOTS[kind] // L, STEP_BYTES // page_bytes))
    queries = 1 if kind == "decode" else max(1, min(max_queries, ROWS * K // num_heads))
    return Blocks(queries, num_pages, L, num_cores())


def num_cores() -> int:
    """TensorCores that one device has."""
    return pltpu.get_tpu_info().num_cores if for_tpu() else DEFAULT_CORES


def _of_chosen(q_TNH: jax.Array, pages: Pages, sequences: Sequences, chosen_B: jax.Array, *, static: Static,
               sinks_N: jax.Array | None) -> jax.Array:
    """(T, N, W): right for the tokens of the chosen sequences, anything for others."""
    (T, N, H), K, Q, parts = q_TNH.shape, pages.rows_ZKLC.shape[1], static.blocks.queries, static.parts
    units = make_units(sequences, chosen_B=chosen_B, num_tokens=T, queries=Q, multiple=static.blocks.cores)
    steps = make_steps(units, sequences, blocks=static.blocks, window=static.options.window)
    q_UQKGH = q_TNH[units.tokens(Q, num_tokens=T)].reshape(-1, Q, K, N // K, H)
    q_UKRH = q_UQKGH.swapaxes(1, 2).reshape(-1, K, Q * N // K, H)
    R = round_up(Q * N // K, SUBLANES)
    sinks_N = jnp.full(N, MASKED) if sinks_N is None else sinks_N.astype(jnp.float32) * LOG2E
    sinks_KR1 = jnp.tile(sinks_N.reshape(K, 1, N // K), (1, Q, 1)).reshape(K, -1, 1)
    sinks_KRX = jnp.broadcast_to(_padded(sinks_KR1, R=R, H=1), (K, R, LANES))
    out_UKRW = attend(_padded(q_UKRH, R=R, H=parts.key_columns), pages, sinks_KRX, steps, static=static,
                      vmem_bytes=vmem_bytes() * 15 // 16)
    out_UKQGW = out_UKRW[:, :, :Q * N // K].reshape(-1, K, Q, N // K, parts.value_dim).swapaxes(1, 2)
    return units.back(out_UKQGW, places(sequences, T), sequences).reshape(T, N, -1)


def _padded(x: jax.Array, **sizes: int) -> jax.Array:
    """Zeros behind rows (R) and columns (H), the last two dims, up to these sizes."""
    extra = [(0, 0)] * (x.ndim - 2) + [(0, sizes["R"] - x.shape[-2]), (0, sizes["H"] - x.shape[-1])]
    return jnp.pad(x, extra) if any(after for _, after in extra) else x
