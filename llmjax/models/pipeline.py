"""Stacked layers spread over the stage axis, and microbatches that pass from stage to stage.

The table of models/schedules.py says who works on what: GPipe with one round; with v rounds every stage holds v runs of
layers, and a microbatch passes all stages v times. Differentiating the scan gives the way back (1f1b: train/pipeline).

Outside of the layers the stages share the rows: embedding and loss cost a stage its share, not all of them all.

Letters: B rows of a stage, M microbatches, b rows of a microbatch, T time, D model width, L layers, p stages, v rounds,
q layers of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.core import collectives
from llmjax.models.schedules import IDLE, schedule

AXIS = "stage"
RunLayers = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]  # (x_bTD, layers, shared) -> (x_bTD, left)


def run_stages(run_layers: RunLayers, x_BTD: jax.Array, layers: Any, shared: Any, *, num_microbatches: int,
               rounds: int) -> tuple[jax.Array, Any]:
    """`x_BTD` through the layers of all stages, forward, and what they leave.

    Leaves of `layers` are this stage's, (L / p, ...), or whole, (L, ...); what layers leave is summed over microbatches
    and comes as (L, ...) with zeros for the layers of other stages.
    """
    p, stage, M = collectives.manual_size(AXIS), lax.axis_index(AXIS), num_microbatches
    table = schedule("gpipe", num_stages=p, num_microbatches=M, rounds=rounds).forward_KP
    table = table[np.any(table != IDLE, axis=1)]
    runs = _runs(layers, rounds=rounds)
    buffer_MbTD = microbatches(collectives.to_all_stages(x_BTD), M)
    shared_M = jax.tree.map(functools.partial(_shared_rows, num_rows=x_BTD.shape[0], num_microbatches=M), shared)
    per_row = jax.tree.map(lambda leaf: _has_rows(leaf, x_BTD.shape[0]), shared)

    def arrive(buffer_MbTD: jax.Array, came_bTD: jax.Array, item: jax.Array) -> jax.Array:
        """At the first stage: what the last one has worked on is put back in its place."""
        place = jnp.maximum(item, 0) % M
        kept_bTD = lax.dynamic_index_in_dim(buffer_MbTD, place, keepdims=False)
        new_bTD = jnp.where((stage == 0) & (item != IDLE), came_bTD, kept_bTD)
        return lax.dynamic_update_index_in_dim(buffer_MbTD, new_bTD, place, 0)

    def work(carry: tuple, items_P: jax.Array) -> tuple[tuple, None]:
        buffer_MbTD, came_bTD, arrived, left = carry
        buffer_MbTD = arrive(buffer_MbTD, came_bTD, arrived)
        working = items_P[stage] != IDLE
        number, m = jnp.divmod(jnp.maximum(items_P[stage], 0), M)
        x_bTD = jnp.where(stage == 0, lax.dynamic_index_in_dim(buffer_MbTD, m, keepdims=False), came_bTD)
        x_bTD, left_one = run_layers(x_bTD, _take(runs, number), _pick(shared_M, per_row, m))
        left = jax.tree.map(lambda total, one: total.at[number].add(jnp.where(working, one, 0)), left, left_one)
        return (buffer_MbTD, collectives.pass_on(x_bTD, AXIS), items_P[-1], left), None

    shapes = jax.eval_shape(run_layers, buffer_MbTD[0], _take(runs, 0), _pick(shared_M, per_row, 0))[1]
    left = jax.tree.map(lambda one: jnp.zeros((rounds, *one.shape), one.dtype), shapes)
    carry = (buffer_MbTD, jnp.zeros_like(buffer_MbTD[0]), jnp.int32(IDLE), left)
    (buffer_MbTD, came_bTD, arrived, left), _ = lax.scan(work, carry, jnp.asarray(table))
    buffer_MbTD = arrive(buffer_MbTD, came_bTD, arrived)
    rows_BTD = buffer_MbTD.swapaxes(0, 1).reshape(-1, *buffer_MbTD.shape[2:])
    return collectives.from_stage(rows_BTD, 0, dim=0), jax.tree.map(among_all, left)


def microbatches(x_B: jax.Array, num_microbatches: int) -> jax.Array:
    """(M, b, ...): row r is of microbatch r modulo their number, as in the step's own."""
    return x_B.reshape(-1, num_microbatches, *x_B.shape[1:]).swapaxes(0, 1)


def _has_rows(leaf: Any, num_rows: int) -> bool:
    return getattr(leaf, "ndim", 0) > 1 and leaf.shape[0] == num_rows


def _shared_rows(leaf: Any, *, num_rows: int, num_microbatches: int) -> Any:
    """What goes with each row (positions, documents), of all stages' rows; nothing is differentiated through it."""
    if not _has_rows(leaf, num_rows):
        return leaf
    return microbatches(lax.all_gather(lax.stop_gradient(leaf), AXIS, axis=0, tiled=True), num_microbatches)


def _pick(shared_M: Any, per_row: Any, m: jax.Array | int) -> Any:
    return jax.tree.map(lambda leaf, rows: lax.dynamic_index_in_dim(leaf, m, keepdims=False) if rows else leaf,
                        shared_M, per_row)


def _take(runs: Any, number: jax.Array | int) -> Any:
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else
                        lax.dynamic_index_in_dim(leaf, number, keepdims=False), runs)


def own_layers(layers: Any) -> Any:
    """This stage's part, (L / p, ...), of leaves that are (L, ...) or that part already."""
    return _take(_runs(layers, rounds=1), 0)


def _runs(layers: Any, *, rounds: int) -> Any:
    """This stage's runs of layers, leaves (v, q, ...): run r of stage s is run r p + s of the whole stack."""
    p = collectives.manual_size(AXIS)
    local = min(leaf.shape[0] for leaf in jax.tree.leaves(layers))

    def cut(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == local * p:
            return leaf.reshape(rounds, p, -1, *leaf.shape[1:])[:, lax.axis_index(AXIS)]
        return leaf[None] if rounds == 1 else _dealt(leaf.reshape(rounds, -1, *leaf.shape[1:]))

    return jax.tree.map(cut, layers)


def _dealt(runs_vq: jax.Array) -> jax.Array:
    """Runs that stand one after another over the stages, dealt out in turn: once a step and not once a microbatch."""
    v, p = runs_vq.shape[0], collectives.manual_size(AXIS)

    def of_round(number: int) -> jax.Array:
        wanted = range(number * p, (number + 1) * p)
        moves = ([(run // v, run % p) for run in wanted if run % v == place] for place in range(v))
        parts = [lax.ppermute(runs_vq[place], AXIS, pairs) for place, pairs in enumerate(moves) if pairs]
        return functools.reduce(jnp.add, parts)  # whoever receives nothing receives zeros

    return jnp.stack([of_round(number) for number in range(v)])


def among_all(left_vq: jax.Array) -> jax.Array:
    """(L, ...) with what this stage's layers left, and zeros."""
    v, q = left_vq.shape[:2]
    p = collectives.manual_size(AXIS)
    whole = jnp.zeros((v, p, *left_vq.shape[1:]), left_vq.dtype).at[:, lax.axis_index(AXIS)].set(left_vq)
    return whole.reshape(v * p * q, *left_vq.shape[2:])
