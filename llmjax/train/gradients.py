"""Loss and gradient of a batch, in one `shard_map` that is manual over the whole mesh.

There weights are gathered and gradients reduced where the model says so (core/collectives.py). A device's loss is the
sum over its own tokens; losses and gradients are added up over all of them, and divided by nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from llmjax.core import collectives
from llmjax.core.task import LossFn, LossOutput, Params
from llmjax.train.batch import batch_specs

Reduce = Callable[[Params], Params]


def leaf_specs(tree: Any) -> Any:
    """The partition specs that the types of a tree of arrays carry."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def sum_shares(tree: Any) -> Any:
    """What the devices each contribute, added up."""
    return jax.tree.map(lambda x: collectives.sum_over(x, collectives.SHARE_AXES), tree)


def make_loss_and_grad(model: Any, loss: LossFn, *, num_microbatches: int, gradient_specs: Any = None) -> Callable:
    """(params, frozen, batch, key) -> (LossOutput, gradients): global sums, gradients float32 and not yet divided.

    A further argument scales the loss that is differentiated, for float16; gradients come as if it did not. They are
    laid out, and added up over microbatches, as `gradient_specs` say; by default like the parameters.
    """
    def apply(params: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array,
              scale: jax.Array | None = None) -> tuple:
        specs = leaf_specs(params)
        wanted = specs if gradient_specs is None else gradient_specs

        def scatter(grads: Params) -> Params:
            return jax.tree.map(lambda grad, spec, target: collectives.scatter_gradient(grad, spec, wanted=target),
                                grads, specs, wanted)

        def summed(params: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array,
                   scale: jax.Array | None) -> tuple:
            micro = _micro(model, loss, frozen, key, scatter, scale=scale)
            # Stages work on all microbatches in one pass.
            passes = num_microbatches if collectives.manual_size("stage") == 1 else 1
            out, grads = _accumulate(micro, params, batch, num_microbatches=passes)
            return sum_shares(out), jax.tree.map(collectives.sum_gradient, grads, wanted)

        one = PartitionSpec()
        return jax.shard_map(summed, in_specs=(specs, leaf_specs(frozen), batch_specs(batch), one, one),
                             out_specs=(one, wanted), check_vma=False)(params, frozen, batch, key, scale)

    return apply


def _micro(model: Any, loss: LossFn, frozen: Params, key: jax.Array, reduce: Reduce, *,
           scale: jax.Array | None) -> Callable:
    """(params, batch) -> (LossOutput, gradients) of one microbatch; noise is told apart by token, not by microbatch."""
    def micro(params: Params, batch: Mapping[str, jax.Array]) -> tuple[LossOutput, Params]:
        def scalar(params: Params) -> tuple[jax.Array, LossOutput]:
            out = loss(model, params, frozen, batch, key)
            return out.loss_sum if scale is None else out.loss_sum * scale, out

        (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        grads = reduce(grads)
        return out, grads if scale is None else jax.tree.map(lambda grad: grad / scale, grads)

    return micro


def _accumulate(micro: Callable, params: Params, batch: Mapping[str, jax.Array], *,
                num_microbatches: int) -> tuple[LossOutput, Params]:
    """Sums of losses, weights and gradients over the microbatches of this device's rows.

    Row r is of microbatch r modulo their number: on every mesh the same rows stand together.
    """
    if num_microbatches == 1:
        return micro(params, batch)
    parts = {name: a.reshape(-1, num_microbatches, *a.shape[1:]).swapaxes(0, 1) for name, a in batch.items()}

    def body(total: tuple, part: Mapping[str, jax.Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, micro(params, part)), None

    first = jax.tree.map(lambda a: a[0], parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, params, first))
    return lax.scan(body, zeros, parts)[0]
