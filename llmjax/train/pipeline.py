"""The 1f1b schedule: loss and gradients of a pipeline that begins a microbatch's way back as soon as it is through.

Differentiating a whole forward pass (models/pipeline.py) keeps what every microbatch leaves until the last one has gone
in. Here the table of models/schedules.py is played with both halves of its ticks: a stage keeps the inputs of the few
microbatches that are under way and makes the rest again, microbatch by microbatch, for which train.remat says what
waits in between. All stages share the tokens of the microbatch that leaves the last of them: each does its part of the
loss. Gradients are thus computed along with the loss, and its derivative only scales them.

Letters: M microbatches, b rows of a microbatch, T time, D model width, R places for inputs, K ticks, P stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.core import collectives
from llmjax.core.task import Params
from llmjax.models.pipeline import AXIS, among_all, microbatches
from llmjax.models.schedules import IDLE, Schedule, phases, schedule

Rows = Mapping[str, jax.Array]  # of one microbatch, by the names of the batch


@dataclasses.dataclass(frozen=True)
class Parts:
    """A loss, cut where activations go from device to device; `params` are all parameters."""

    embed: Callable[[Params, Rows], jax.Array]  # -> x_bTD
    run: Callable[[Params, jax.Array, Rows], tuple[jax.Array, Any]]  # this stage's layers -> x_bTD, what they leave
    loss: Callable[[Params, jax.Array, Rows], jax.Array]  # of some tokens of x_bTD -> their sum
    further: Callable[[Any], jax.Array]  # what the loss adds for what layers leave; linear in it


@dataclasses.dataclass(frozen=True)
class _State:
    """What a stage holds from tick to tick."""

    came_bTD: jax.Array  # from the stage before
    back_bTD: jax.Array  # the derivative, from the stage after
    inputs_RbTD: jax.Array
    loss_sum: jax.Array
    left: Any  # what layers have left, summed over microbatches
    grads: Params


jax.tree_util.register_dataclass(_State, [field.name for field in dataclasses.fields(_State)], [])


def make_pipelined(parts: Parts, *, num_microbatches: int) -> Callable[[Params, Rows], tuple[jax.Array, Any]]:
    """(params, batch) -> (loss sum of this device's tokens, what all layers leave), differentiable once in `params`.

    The derivative holds what `further` adds to the loss already; what layers leave has none of its own.
    """
    @jax.custom_vjp
    def pipelined(params: Params, batch: Rows) -> tuple[jax.Array, Any]:
        return forward(params, batch)[0]

    def forward(params: Params, batch: Rows) -> tuple[tuple[jax.Array, Any], Params]:
        state = _play(parts, params, batch, num_microbatches=num_microbatches)
        left = jax.tree.map(lambda leaf: among_all(leaf[None]), state.left)
        return (state.loss_sum, left), state.grads

    def backward(grads: Params, cotangents: tuple[jax.Array, Any]) -> tuple[Params, None]:
        scale = cotangents[0]
        return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads), None

    pipelined.defvjp(forward, backward)
    return pipelined


def _play(parts: Parts, params: Params, batch: Rows, *, num_microbatches: int) -> _State:
    """The whole table, from empty stages to empty stages."""
    p, M = collectives.manual_size(AXIS), num_microbatches
    table = schedule("1f1b", num_stages=p, num_microbatches=M)
    rows = {name: microbatches(lax.all_gather(array, AXIS, axis=0, tiled=True), M) for name, array in batch.items()}
    work = _Work(parts, params, rows, places=min(M, table.in_flight))
    state = work.nothing()
    for ticks in phases(table):
        state = work.play(state, table, ticks)
    return state


class _Work:
    """The halves of a tick on this stage."""

    def __init__(self, parts: Parts, params: Params, rows: Rows, *, places: int) -> None:
        self._parts, self._params, self._rows, self._places = parts, params, rows, places
        self._stage, self._last = lax.axis_index(AXIS), collectives.manual_size(AXIS) - 1

    def nothing(self) -> _State:
        """Before the first tick."""
        first = self._pick(jnp.int32(0))
        x_bTD = jax.eval_shape(self._parts.embed, self._params, first)
        left = jax.eval_shape(self._parts.run, self._params, x_bTD, first)[1]
        zeros = lambda shapes: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
        return _State(zeros(x_bTD), zeros(x_bTD), jnp.zeros((self._places, *x_bTD.shape), x_bTD.dtype),
                      jnp.zeros((), jnp.float32), zeros(left), zeros(self._params))

    def play(self, state: _State, table: Schedule, ticks: slice) -> _State:
        """Some ticks, in all of which the same halves are worked on."""
        forward_KP, backward_KP = table.forward_KP[ticks], table.backward_KP[ticks]
        goes_in, comes_out = bool(np.any(forward_KP != IDLE)), bool(np.any(backward_KP != IDLE))
        arrives = bool(np.any(forward_KP[:, -1] != IDLE))

        def tick(state: _State, items: tuple[jax.Array, jax.Array]) -> tuple[_State, None]:
            forward_P, backward_P = items
            dy_bTD = state.back_bTD
            if goes_in:
                state, y_bTD = self._forward(state, forward_P[self._stage])
                if arrives:
                    state, from_loss_bTD = self._loss(state, y_bTD, forward_P[-1])
                    dy_bTD = jnp.where(self._stage == self._last, from_loss_bTD, dy_bTD)
            if comes_out:
                state = self._backward(state, dy_bTD, backward_P[self._stage])
            return state, None

        return lax.scan(tick, state, (jnp.asarray(forward_KP), jnp.asarray(backward_KP)))[0]

    def _pick(self, item: jax.Array) -> Rows:
        return {name: lax.dynamic_index_in_dim(array, jnp.maximum(item, 0), keepdims=False)
                for name, array in self._rows.items()}

    def _forward(self, state: _State, item: jax.Array) -> tuple[_State, jax.Array]:
        """A microbatch through this stage's layers; its input is kept."""
        rows, working = self._pick(item), item != IDLE
        x_bTD = jnp.where(self._stage == 0, self._parts.embed(self._params, rows), state.came_bTD)
        y_bTD, left = self._parts.run(self._params, x_bTD, rows)
        place = jnp.maximum(item, 0) % self._places
        kept_bTD = lax.dynamic_index_in_dim(state.inputs_RbTD, place, keepdims=False)
        inputs_RbTD = lax.dynamic_update_index_in_dim(state.inputs_RbTD, jnp.where(working, x_bTD, kept_bTD), place, 0)
        left = jax.tree.map(lambda total, one: total + jnp.where(working, one, 0), state.left, left)
        came_bTD = collectives.pass_on(y_bTD, AXIS)
        return dataclasses.replace(state, came_bTD=came_bTD, inputs_RbTD=inputs_RbTD, left=left), y_bTD

    def _loss(self, state: _State, y_bTD: jax.Array, item: jax.Array) -> tuple[_State, jax.Array]:
        """The loss of the microbatch that has passed the last stage, each stage for a part of its tokens."""
        part = y_bTD.shape[1] // (self._last + 1)
        rows = {name: lax.dynamic_slice_in_dim(array, self._stage * part, part, axis=1)
                for name, array in self._pick(item).items()}

        def own(params: Params, y_bTD: jax.Array) -> jax.Array:
            return self._parts.loss(params, collectives.from_stage(y_bTD, self._last, dim=1), rows)

        loss_sum, (grads, dy_bTD) = jax.value_and_grad(own, argnums=(0, 1))(self._params, y_bTD)
        return dataclasses.replace(state, loss_sum=state.loss_sum + loss_sum, grads=_add(state.grads, grads)), dy_bTD

    def _backward(self, state: _State, dy_bTD: jax.Array, item: jax.Array) -> _State:
        """A microbatch's derivative through this stage's layers and, on the first one, through the embedding."""
        rows, working = self._pick(item), item != IDLE
        place = jnp.maximum(item, 0) % self._places
        x_bTD = lax.dynamic_index_in_dim(state.inputs_RbTD, place, keepdims=False)
        dleft = jax.grad(self._parts.further)(state.left)  # the same whatever layers leave: it is linear
        (_, _), pull = jax.vjp(lambda params, x_bTD: self._parts.run(params, x_bTD, rows), self._params, x_bTD)
        given = jax.tree.map(lambda grad: jnp.where(working, grad, 0), (dy_bTD, dleft))
        grads, dx_bTD = pull(given)
        _, pull_embedding = jax.vjp(lambda params: self._parts.embed(params, rows), self._params)
        (more,) = pull_embedding(jnp.where(self._stage == 0, dx_bTD, 0))
        return dataclasses.replace(state, back_bTD=collectives.pass_back(dx_bTD, AXIS),
                                   grads=_add(_add(state.grads, grads), more))


def _add(total: Params, more: Params) -> Params:
    return jax.tree.map(jnp.add, total, more)
