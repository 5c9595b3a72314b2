"""Attention over a sequence that the context axis splits: ring, all-gather of keys and values, or swapped heads.

ring: keys and values travel once around while each shard works on what it holds (Liu et al. 2023). all_gather: they
are gathered first (Dubey et al. 2024, section 3.3.2). Both keep only the output and the log of the softmax's
denominator, recompute the weights in the derivative, chunk by chunk, and skip the chunks that no query of a chunk
sees, so memory grows with the tokens of a shard. ulysses: an all-to-all makes the sequence whole and splits the heads
instead (Jacobs et al. 2023); any kernel then works on it.

Tokens stand in zigzag order (train/batch.py): chunks carry the slot in the row at which they begin.

Letters: B batch, T queries of this shard, S keys, N query heads, K key-value heads, G = N / K, H head dim, C tokens of
a chunk, I and J numbers of chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.core.errors import ConfigError
from llmjax.kernels.attention import api as kernel
from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms
from llmjax.kernels.attention.sharpness import Sharpness
from llmjax.kernels.attention.sharpness import sharpness as kernel_sharpness

AXIS = "context"
WATCHED = 128  # queries of a row whose sharpness is taken, those that see most
MAX_CHUNK = 512
MASKED = -1e30  # finite, so that a chunk that sees nothing gives zeros and not NaN


@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values in chunks, with the document and the first slot of each."""

    k: jax.Array  # (J, B, K, C, H)
    v: jax.Array
    segment_ids: jax.Array  # (J, B, C)
    slots: jax.Array  # (J,) int32


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries in chunks, scaled."""

    q: jax.Array  # (I, B, K, G, C, H)
    segment_ids: jax.Array  # (I, B, C)
    slots: jax.Array  # (I,) int32


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static: how keys travel, and the kernel's options."""

    method: str
    options: Options


for _class in (Keys, Queries):
    jax.tree_util.register_dataclass(_class, [field.name for field in dataclasses.fields(_class)], [])


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS, method: str = "ring") -> jax.Array:
    """`kernel.attention`, over the context axis where that splits the sequence.

    Raises ConfigError for what only `ulysses` can do: prefixes and ALiBi.
    """
    if collectives.manual_size(AXIS) == 1:
        return kernel.attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT=q_segment_ids_BT,
                                kv_segment_ids_BS=kv_segment_ids_BS, q_offset=q_offset, options=options, terms=terms)
    if method == "ulysses":
        return _ulysses(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, options, terms)
    if options.kind == "prefix" or terms.slopes_N is not None:
        raise ConfigError(f"mesh.context_method={method}: does not know prefixes and ALiBi; ulysses fits")
    out_BTNH, log_z_BTN = _travelling(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, Settings(method, options))
    if terms.sinks_N is not None:  # a term of the denominator that no value belongs to
        out_BTNH = out_BTNH * jax.nn.sigmoid(log_z_BTN - terms.sinks_N[None, None])[..., None]
    return out_BTNH.astype(q_BTNH.dtype)


def sharpness(q_BTNH: jax.Array, k_BSKH: jax.Array, *, segment_ids_BT: jax.Array, options: Options,
              terms: Terms = NO_TERMS) -> Sharpness:
    """How sharply the last WATCHED queries of each shard look, in rows without a cache."""
    size, T = collectives.manual_size(AXIS), q_BTNH.shape[1]
    num = T if terms.bias_NR is not None else min(WATCHED, T // 2 if size > 1 else T)  # biases are of whole rows
    segment_ids_BS, first = segment_ids_BT, jnp.int32(T - num)
    if size > 1:
        k_BSKH, segment_ids_BS = (_whole_sequence(lax.all_gather(x, AXIS, axis=1, tiled=True), size=size)
                                  for x in (k_BSKH, segment_ids_BT))
        first = size * T - lax.axis_index(AXIS) * (T // 2) - num  # of the shard's mirror image from the back
    return kernel_sharpness(q_BTNH[:, T - num:], k_BSKH, q_segment_ids_BT=segment_ids_BT[:, T - num:],
                            kv_segment_ids_BS=segment_ids_BS, q_offset=first, options=options, terms=terms)


# Swapped heads -------------------------------------------------------------------------------------------------------


def _ulysses(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, options: Options,
             terms: Terms) -> jax.Array:
    size, (heads, kv_heads) = collectives.manual_size(AXIS), (q_BTNH.shape[2], k_BTKH.shape[2])
    if heads % size:
        raise ConfigError(f"mesh.context={size}: ulysses spreads the {heads} heads of a shard over it; ring fits")
    if kv_heads % size:  # a shard's query heads bring their own copy of their key-value head
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BTKH, v_BTKH))
    whole = functools.partial(_whole_sequence, size=size)
    q_BSMH, k_BSMH, v_BSMH = (whole(collectives.swap_dims(x, AXIS, split_dim=2, join_dim=1))
                              for x in (q_BTNH, k_BTKH, v_BTKH))
    segment_ids_BS = whole(lax.all_gather(segment_ids_BT, AXIS, axis=1, tiled=True))
    first, mine = lax.axis_index(AXIS) * (heads // size), heads // size
    own = {name: None if value is None else lax.dynamic_slice_in_dim(value, first, mine)
           for name, value in (("slopes_N", terms.slopes_N), ("sinks_N", terms.sinks_N))}
    out_BSMH = kernel.attention(q_BSMH, k_BSMH, v_BSMH, q_segment_ids_BT=segment_ids_BS,
                                kv_segment_ids_BS=segment_ids_BS, options=options,
                                terms=dataclasses.replace(terms, **own))
    return collectives.swap_dims(_zigzag(out_BSMH, size=size), AXIS, split_dim=1, join_dim=2)


def _whole_sequence(x_BS: jax.Array, *, size: int) -> jax.Array:
    """A row in its own order, from zigzag order."""
    halves = x_BS.reshape(x_BS.shape[0], size, 2, -1, *x_BS.shape[2:])
    return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1).reshape(x_BS.shape)


def _zigzag(x_BS: jax.Array, *, size: int) -> jax.Array:
    pieces = x_BS.reshape(x_BS.shape[0], 2 * size, -1, *x_BS.shape[2:])
    return jnp.stack([pieces[:, :size], pieces[:, :size - 1:-1]], axis=2).reshape(x_BS.shape)


# Travelling keys -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _travelling(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array,
                settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, N, H) and log of the denominator (B, T, N), float32."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, settings)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array,
             settings: Settings) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    # Masks depend on documents and slots alone: jax would make all of them at once, ahead of the loop over layers.
    here, slots, q_BTNH = lax.optimization_barrier((segment_ids_BT, _slots(q_BTNH.shape[1]), q_BTNH))
    queries = _queries(q_BTNH, here, slots, k_BTKH.shape[2], settings)
    keys = _keys(k_BTKH, v_BTKH, here, slots)
    top = jnp.full(queries.q.shape[:-1], MASKED, jnp.float32)
    state = (top, jnp.zeros_like(top), jnp.zeros((*top.shape, v_BTKH.shape[-1]), jnp.float32))
    attend = functools.partial(_attend, settings=settings)
    if settings.method == "all_gather":
        top, total, summed = attend(state, queries, _gathered(keys))
    else:
        def work(carry: tuple, _: None) -> tuple[tuple, None]:
            state, keys = carry
            return (attend(state, queries, keys), _rotate(keys)), None

        ((top, total, summed), _), _ = lax.scan(work, (state, keys), length=collectives.manual_size(AXIS))
    out = summed / jnp.maximum(total, 1e-30)[..., None]
    log_z = top + jnp.log(jnp.maximum(total, 1e-30))
    results = _joined(out), _joined(log_z[..., None])[..., 0]
    return results, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *results)


def _backward(settings: Settings, residuals: tuple, cotangents: tuple) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, log_z_BTN = residuals
    dout_BTNH, dlog_z_BTN = (x.astype(jnp.float32) for x in cotangents)
    slots = _slots(q_BTNH.shape[1])
    queries = _queries(q_BTNH, segment_ids_BT, slots, k_BTKH.shape[2], settings)
    keys = _keys(k_BTKH, v_BTKH, segment_ids_BT, slots)
    delta_BTN = jnp.sum(dout_BTNH * out_BTNH, axis=-1) - dlog_z_BTN
    chunk = functools.partial(_chunked, num_kv_heads=k_BTKH.shape[2], size=queries.q.shape[4])
    rows = (chunk(dout_BTNH), chunk(log_z_BTN[..., None])[..., 0], chunk(delta_BTN[..., None])[..., 0])
    pull = functools.partial(_pull, rows=rows, settings=settings)
    dq = jnp.zeros(queries.q.shape, jnp.float32)
    if settings.method == "all_gather":
        everyone = _gathered(keys)
        dkv = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (everyone.k, everyone.v))
        dq, dkv = pull((dq, dkv), queries, everyone)
        dk, dv = (lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True) for x in dkv)
    else:
        def work(carry: tuple, _: None) -> tuple[tuple, None]:
            grads, keys = carry
            dq, dkv = pull(grads, queries, keys)
            return ((dq, _rotate(dkv)), _rotate(keys)), None

        dkv = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (keys.k, keys.v))
        ((dq, (dk, dv)), _), _ = lax.scan(work, ((dq, dkv), keys), length=collectives.manual_size(AXIS))
    dq_BTNH = _joined(dq * settings.options.score_scale(q_BTNH.shape[-1]))
    dk_BTKH, dv_BTKH = (_joined(x[:, :, :, None]) for x in (dk, dv))
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_travelling.defvjp(_forward, _backward)


def _rotate(tree: Any) -> Any:
    size = collectives.manual_size(AXIS)
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)]), tree)


def _gathered(keys: Keys) -> Keys:
    return jax.tree.map(lambda x: lax.all_gather(x, AXIS, axis=0, tiled=True), keys)


# Chunks --------------------------------------------------------------------------------------------------------------


def _chunk_size(num_tokens: int) -> int:
    """Of a shard's tokens: half of them stand together, and no chunk goes beyond."""
    size = num_tokens // 2
    while size > MAX_CHUNK and size % 2 == 0:
        size //= 2
    return size


def _chunked(x_BTNH: jax.Array, *, num_kv_heads: int, size: int) -> jax.Array:
    """(I, B, K, G, C, H)."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T // size, size, num_kv_heads, N // num_kv_heads, H).transpose(1, 0, 3, 4, 2, 5)


def _joined(x_IBKGCH: jax.Array) -> jax.Array:
    """(B, T, N, H)."""
    _, B, K, G, _, H = x_IBKGCH.shape
    return x_IBKGCH.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, K * G, H)


def _slots(num_tokens: int) -> jax.Array:
    """The slot in the row at which each chunk of this shard begins."""
    shard, half, size = lax.axis_index(AXIS), num_tokens // 2, _chunk_size(num_tokens)
    within = jnp.arange(0, half, size)
    last = 2 * collectives.manual_size(AXIS) - 1
    return jnp.concatenate([shard * half + within, (last - shard) * half + within]).astype(jnp.int32)


def _segments(segment_ids_BT: jax.Array) -> jax.Array:
    B, T = segment_ids_BT.shape
    return segment_ids_BT.reshape(B, -1, _chunk_size(T)).swapaxes(0, 1)


def _queries(q_BTNH: jax.Array, segment_ids_BT: jax.Array, slots: jax.Array, num_kv_heads: int,
             settings: Settings) -> Queries:
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    scaled = q_BTNH * settings.options.score_scale(H)
    return Queries(_chunked(scaled, num_kv_heads=num_kv_heads, size=_chunk_size(T)), _segments(segment_ids_BT), slots)


def _keys(k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, slots: jax.Array) -> Keys:
    T, K = k_BTKH.shape[1:3]
    k, v = (_chunked(x, num_kv_heads=K, size=_chunk_size(T))[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    return Keys(k, v, _segments(segment_ids_BT), slots)


def _visible(queries: Queries, keys: Keys, options: Options) -> jax.Array:
    """Which keys of a chunk each query of a chunk sees, (B, 1, 1, C, S)."""
    q_slots, k_slots = (one.slots + jnp.arange(one.segment_ids.shape[-1]) for one in (queries, keys))
    same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    if options.kind == "causal":
        distance = q_slots[:, None] - k_slots[None, :]
        near = (distance >= 0) & (distance < options.window) if options.window else distance >= 0
        same = same & near[None]
    return same[:, None, None]


def _meet(queries: Queries, keys: Keys, options: Options) -> jax.Array:
    """Whether any query of a chunk may see any key of another, by their slots."""
    if options.kind != "causal":
        return jnp.bool_(True)
    last_query, last_key = (one.slots + one.segment_ids.shape[-1] - 1 for one in (queries, keys))
    meet = keys.slots <= last_query
    return meet & (queries.slots - last_key < options.window) if options.window else meet


def _scores(queries: Queries, keys: Keys, options: Options) -> jax.Array:
    scores = jnp.einsum("BKGCH,BKSH->BKGCS", queries.q, keys.k, preferred_element_type=jnp.float32)
    return options.softcap * jnp.tanh(scores / options.softcap) if options.softcap else scores


def _attend(state: tuple, queries: Queries, keys: Keys, *, settings: Settings) -> tuple:
    """Running maximum, sum of weights and weighted values (Milakov and Gimelshein 2018), for all chunks of queries."""
    def one_query_chunk(carry: None, inputs: tuple) -> tuple[None, tuple]:
        state, query = inputs

        def one_key_chunk(state: tuple, key: Keys) -> tuple[tuple, None]:
            return lax.cond(_meet(query, key, settings.options), add, lambda state, key: state, state, key), None

        def add(state: tuple, key: Keys) -> tuple:
            top, total, summed = state
            scores = jnp.where(_visible(query, key, settings.options), _scores(query, key, settings.options), MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(scores > MASKED, jnp.exp(scores - new_top[..., None]), 0.0)
            kept = jnp.exp(top - new_top)
            values = jnp.einsum("BKGCS,BKSH->BKGCH", weights.astype(key.v.dtype), key.v,
                                preferred_element_type=jnp.float32)
            return new_top, total * kept + jnp.sum(weights, axis=-1), summed * kept[..., None] + values

        return carry, lax.scan(one_key_chunk, state, keys)[0]

    return lax.scan(one_query_chunk, None, (state, queries))[1]


def _pull(grads: tuple, queries: Queries, keys: Keys, *, rows: tuple, settings: Settings) -> tuple:
    """Add what these keys contribute to (dq, (dk, dv)); weights are recomputed from the log of their denominator."""
    options = settings.options
    dq, dkv = grads

    def one_query_chunk(dkv: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        dq, query, (dout, log_z, delta) = inputs

        def one_key_chunk(dq: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
            dkv, key = inputs
            return lax.cond(_meet(query, key, options), add, lambda dq, dkv, key: (dq, dkv), dq, dkv, key)

        def add(dq: jax.Array, dkv: tuple, key: Keys) -> tuple[jax.Array, tuple]:
            scores = _scores(query, key, options)
            weights = jnp.where(_visible(query, key, options), jnp.exp(scores - log_z[..., None]), 0.0)
            dweights = jnp.einsum("BKGCH,BKSH->BKGCS", dout, key.v, preferred_element_type=jnp.float32)
            dscores = weights * (dweights - delta[..., None])
            if options.softcap:
                dscores = dscores * (1.0 - jnp.square(scores / options.softcap))
            dscores = dscores.astype(key.k.dtype)
            dq = dq + jnp.einsum("BKGCS,BKSH->BKGCH", dscores, key.k, preferred_element_type=jnp.float32)
            dk = jnp.einsum("BKGCS,BKGCH->BKSH", dscores, query.q, preferred_element_type=jnp.float32)
            dv = jnp.einsum("BKGCS,BKGCH->BKSH", weights.astype(key.v.dtype), dout.astype(key.v.dtype),
                            preferred_element_type=jnp.float32)
            return dq, (dkv[0] + dk, dkv[1] + dv)

        dq, dkv = lax.scan(one_key_chunk, dq, (dkv, keys))
        return dkv, dq

    dkv, dq = lax.scan(one_query_chunk, dkv, (dq, queries, rows))
    return dq, dkv
