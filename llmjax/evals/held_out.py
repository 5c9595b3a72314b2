"""The loss on held-out documents under the objective of a run itself: what encoders can be judged by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from llmjax.core.mesh import single_device_mesh
from llmjax.core.sections import Config
from llmjax.core.task import Params
from llmjax.data.loader import Batch, PackedRows, Shuffled, Stream, serve
from llmjax.data.objective_rows import Hidden, settings_of
from llmjax.data.pack import next_token_pieces, pack_spans
from llmjax.data.shards import Document, TokenStore, write_store
from llmjax.data.tokenizer import Tokenizer
from llmjax.evals.bits import Document as Text
from llmjax.models.decoder import Model
from llmjax.train import pretrain
from llmjax.train.batch import RowShare, put_batch
from llmjax.train.step import make_eval_step

MAX_BATCHES = 64  # of the final figure


def write_texts(texts: Sequence[Text], tokenizer: Tokenizer, folder: Path) -> None:
    """Held-out documents as a store, as training's documents are stored."""
    encoded = tokenizer.encode_batch([text.text for text in texts])
    stored = (Document(f"{index:032x}", np.array([tokenizer.bos_id, *tokens, tokenizer.eos_id]))
              for index, tokens in enumerate(encoded))  # fmt: skip
    write_store(folder, stored, vocab_size=tokenizer.vocab_size)


def open_stream(config: Config, tokenizer: Tokenizer, folder: Path) -> Stream:
    """The rows of a store in an order, hidden and predicted as the run's objective says; always the same."""
    store, objective = TokenStore.open(folder), settings_of(config, tokenizer)
    how = (objective.pieces if objective else next_token_pieces)(config.data.seq_len)
    plan = pack_spans(how.spans(store.lengths), seq_len=config.data.seq_len, seed=0, how=how)
    stream = Shuffled(PackedRows(store, plan), config.data.batch_size, seed=0)
    return Hidden(stream, objective) if objective else stream


def batches(stream: Stream, share: RowShare, *, num_batches: int) -> Iterator[Batch]:
    """The first batches of a stream, this process's rows."""
    return itertools.islice(serve(stream, process_index=share.process_index, process_count=share.process_count),
                            num_batches)


def held_out_loss(config: Config, model: Model, params: Params, texts: Sequence[Text], *, tokenizer: Tokenizer,
                  folder: Path) -> dict[str, float]:
    """Mean loss of a target, in nats, over all rows of the texts (MAX_BATCHES batches at most), on one device."""
    write_texts(texts, tokenizer, folder)
    stream, tokens = open_stream(config, tokenizer, folder), TokenStore.open(folder).num_tokens
    num_batches = min(MAX_BATCHES, -(-tokens // (config.data.batch_size * config.data.seq_len)))
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(mesh)))
        step = jax.jit(make_eval_step(model, pretrain.make_loss(config.task)))
        sums = [jax.device_get(step(params, {}, put_batch(batch, mesh)))
                for batch in batches(stream, RowShare(0, 1), num_batches=num_batches)]  # fmt: skip
    targets = sum(float(one.weight) for one in sums)
    return {"held_out_loss": sum(float(one.loss_sum) for one in sums) / targets, "held_out_targets": targets}
