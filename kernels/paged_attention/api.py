"""Attention of new tokens to sequences that lie in pages: decoding, chunked prefill, or both in one batch."""

from __future__ import annotations

from types import ModuleType

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.attention.options import CAUSAL, Options
from llmjax.kernels.paged_attention import xla
from llmjax.kernels.paged_attention.pages import Pages, Sequences


def paged_attention(q_TNH: jax.Array, pages: Pages, sequences: Sequences, *, max_queries: int, value_dim: int,
                    options: Options = CAUSAL, sinks_N: jax.Array | None = None) -> jax.Array:
    """Causal attention of each token to its sequence up to itself, (T, N, W) in the dtype of the queries.

    The tokens' own rows are in their pages already (`pages.append`). No sequence has more than `max_queries` tokens
    here: 1 when all of them decode. Tokens of no sequence give zeros. In the latent form (Liu et al. 2024, appendix C)
    `q_TNH` is in the latent's space, K is 1 and `options.scale` that of the heads. Letters as in pages.py.
    """
    def attend(module: ModuleType) -> jax.Array:
        out_TNW: jax.Array = module.paged_attention(q_TNH, pages, sequences, max_queries=max_queries,
                                                    value_dim=value_dim, options=options, sinks_N=sinks_N)
        return out_TNW

    if not for_tpu():
        return attend(xla)
    from llmjax.kernels.paged_attention import pallas_tpu  # imported where it runs: Pallas takes its time to load

    try:
        return attend(pallas_tpu)
    except NotImplementedError:
        return attend(xla)
