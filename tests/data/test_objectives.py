"""Objectives token by token: against transformers' collator of masks, the algorithm of T5, and definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax.core.config import resolve
from llmjax.core.errors import ConfigError
from llmjax.core.objective_rules import check_objective
from llmjax.core.objective_sections import ObjectiveConfig, corrupted_length, longest_text
from llmjax.data import objectives
from llmjax.data.loader import PackedRows, Shuffled
from llmjax.data.objective_rows import Hidden, Settings
from llmjax.data.objectives import SpecialIds, generator
from llmjax.data.pack import pack_spans
from llmjax.data.shards import Document, TokenStore, write_store

VOCAB = 300
IDS = SpecialIds(begin=1, end=2, mask=4, prefix=5, suffix=6, middle=7, sentinels=tuple(range(299, 199, -1)))
TEXT = np.arange(10, 110)


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_those_of_transformers_collator(seed: int) -> None:
    from transformers import DataCollatorForLanguageModeling

    class Tokenizer:
        mask_token, mask_token_id, pad_token = "<mask>", IDS.mask, None

        def __len__(self) -> int:
            return VOCAB

        def get_special_tokens_mask(self, ids: list[int], already_has_special_tokens: bool) -> list[int]:
            return [int(i in (IDS.begin, IDS.end)) for i in ids]

    collator = DataCollatorForLanguageModeling(Tokenizer(), mlm=True, return_tensors="np")
    collator.generator = generator(seed, 3, 1, 0)
    tokens = np.r_[IDS.begin, TEXT, IDS.end]
    inputs, labels = collator.numpy_mask_tokens(tokens[None].copy())
    ours = objectives.mask_tokens(tokens, generator(seed, 3, 1, 0), config=ObjectiveConfig(), ids=IDS, vocab_size=VOCAB)
    assert np.array_equal(ours.tokens_N, inputs[0])
    assert np.array_equal(np.where(ours.hidden_N, tokens, -100), labels[0])
    assert ours.hidden_N.any()


def t5_by_hand(tokens: np.ndarray, rng: np.random.Generator, density: float, mean: float) -> tuple[list, list]:
    """random_spans_noise_mask and noise_span_to_unique_sentinel of the published code, one token at a time."""
    def segment(num_items: int, num_segments: int) -> list[int]:
        first = np.arange(num_items - 1) < num_segments - 1
        first = first.astype(np.int64)
        rng.shuffle(first)
        lengths = [1]
        for begins in first:
            if begins:
                lengths.append(0)
            lengths[-1] += 1
        return lengths

    num_noise = min(max(round(len(tokens) * density), 1), len(tokens) - 1)
    num_spans = max(round(num_noise / mean), 1)
    noise, text = segment(num_noise, num_spans), segment(len(tokens) - num_noise, num_spans)
    is_noise = [flag for t, n in zip(text, noise, strict=True) for flag in [False] * t + [True] * n]

    def with_sentinels(hide: list[bool]) -> list[int]:
        out, used = [], 0
        for place, token in enumerate(tokens):
            if not hide[place]:
                out.append(int(token))
            elif place == 0 or not hide[place - 1]:
                out.append(VOCAB - 1 - used)
                used += 1
        return [*out, IDS.end]

    return with_sentinels(is_noise), with_sentinels([not flag for flag in is_noise])


@pytest.mark.parametrize("length", [2, 3, 7, 40, 100])
@pytest.mark.parametrize("rates", [{"density": 0.15, "mean_span": 3.0}, {"density": 0.5, "mean_span": 2.0}])
def test_spans_are_corrupted_as_published(length: int, rates: dict[str, float]) -> None:
    config = ObjectiveConfig(noise_density=rates["density"], mean_span=rates["mean_span"])
    for seed in range(5):
        ours = objectives.corrupt_spans(TEXT[:length], generator(seed), config=config, ids=IDS)
        source, target = t5_by_hand(TEXT[:length], generator(seed), *rates.values())
        assert ours.source.tolist() == source
        assert ours.target.tolist() == target
        assert (len(source), len(target)) == corrupted_length(length, **rates)


def test_lengths_are_those_of_the_published_recipe() -> None:
    rates = {"density": 0.15, "mean_span": 3.0}
    assert longest_text(512, **rates) == 568 and corrupted_length(568, **rates) == (512, 114)


@pytest.mark.parametrize("seed", range(20))
def test_a_middle_moves_to_the_end(seed: int) -> None:
    tokens = np.r_[IDS.begin, TEXT[:12], IDS.end]
    moved = objectives.move_middle(tokens, generator(seed), config=ObjectiveConfig(middle_rate=0.8), ids=IDS).tolist()
    rng = generator(seed)
    if rng.random() >= 0.8:
        assert moved == tokens.tolist()
        return
    first, second = sorted(rng.integers(0, 13, size=2).tolist())
    text = TEXT[:12].tolist()
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if rng.random() < 0.5:
        inner = [IDS.prefix, IDS.suffix, *suffix, IDS.middle, *prefix, *middle]
    else:
        inner = [IDS.prefix, *prefix, IDS.suffix, *suffix, IDS.middle, *middle]
    assert moved == [IDS.begin, *inner, IDS.end]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked_tokens": {}, "prefix": {}, "fill_in_the_middle": {}, "span_corruption": {"target_len": 24},
    "prefix, encoder": {"target_len": 40},
}  # fmt: skip
LENGTHS = (30, 9, 61, 4, 200, 17, 80, 33)


def rows(folder: Path, name: str, *, seq_len: int = 64) -> tuple[Settings, TokenStore, PackedRows]:
    rng = np.random.default_rng(0)
    documents = (Document(f"{i:032x}", np.r_[IDS.begin, rng.integers(10, 190, length), IDS.end])
                 for i, length in enumerate(LENGTHS))  # fmt: skip
    write_store(folder, documents, vocab_size=VOCAB)
    store = TokenStore.open(folder)
    config = ObjectiveConfig(name=name.split(",")[0])  # type: ignore[arg-type]
    settings = Settings(config, IDS, VOCAB, 7, OBJECTIVES[name].get("target_len", 0), start_id=0)
    how = settings.pieces(seq_len)
    plan = pack_spans(how.spans(store.lengths), seq_len=seq_len, seed=0, how=how)
    return settings, store, PackedRows(store, plan)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_hold_every_text_once_as_the_functions_make_it(name: str, tmp_path: Path) -> None:
    settings, store, packed = rows(tmp_path / "store", name)
    stream = Hidden(Shuffled(packed, batch_size=2, seed=0), settings)
    seen: list[int] = []
    for step in range(-(-packed.plan.num_rows // 2)):
        chosen = stream.select(step)
        batch = chosen.rows.read(chosen.numbers)
        again = [chosen.rows.read(chosen.numbers[[place]]) for place in range(2)]  # as another process reads its share
        for key, values in batch.items():
            assert np.array_equal(values, np.concatenate([part[key] for part in again])), key
        for place, row in enumerate(stream.stream.select(step).numbers):
            check_row(settings, packed, int(row), batch, place=place, step=step)
            seen += [int(row)] if int(row) not in seen else []
    assert sorted(seen) == list(range(packed.plan.num_rows))
    how = settings.pieces(64)
    dropped = packed.plan.num_predictions - how.spans(store.lengths).lengths.sum()
    assert dropped in (0, -1, -2), "only rests of one token, which span corruption cannot use"


def check_row(settings: Settings, packed: PackedRows, row: int, batch: dict, *, place: int, step: int) -> None:
    """Each piece of a row, from the functions and the generator of its place."""
    ahead = settings.pieces(64).ahead
    for number, text in enumerate(packed.segments(row, ahead=ahead)):
        rng = generator(settings.seed, step, place, number)
        at = batch["segment_ids_BT"][place] == number + 1
        found = {key.removesuffix("_BT"): batch[key][place][at] for key in batch if key.endswith("_BT")}
        name, config = settings.config.name, settings.config
        assert np.array_equal(found["positions"], np.arange(at.sum()))
        if name == "masked_tokens":
            masked = objectives.mask_tokens(text, rng, config=config, ids=IDS, vocab_size=VOCAB)
            expected = {"tokens": masked.tokens_N, "targets": text, "weights": masked.hidden_N}
        elif settings.target_len:
            if name == "prefix":
                length = objectives.prefix_length(len(text), rng)
                source, target = text[:length], text[length:]
            else:
                corrupted = objectives.corrupt_spans(text, rng, config=config, ids=IDS)
                source, target = corrupted.source, corrupted.target
            here = batch["segment_ids_BS"][place] == number + 1
            assert np.array_equal(batch["tokens_BS"][place][here], source)
            assert np.array_equal(batch["positions_BS"][place][here], np.arange(len(source)))
            expected = {"tokens": [0, *target[:-1]], "targets": target, "weights": np.ones(len(target))}
        elif name == "prefix":
            length, places = objectives.prefix_length(len(text), rng), np.arange(len(text) - 1)
            expected = {"tokens": text[:-1], "targets": text[1:], "prefix": places < length,
                        "weights": places + 1 >= length}  # fmt: skip
        else:
            moved = objectives.move_middle(text, rng, config=config, ids=IDS)
            expected = {"tokens": moved[:-1], "targets": moved[1:], "weights": np.ones(len(moved) - 1)}
        for key, values in expected.items():
            assert np.array_equal(found[key], values), key


def test_another_step_draws_anew_and_the_same_step_the_same(tmp_path: Path) -> None:
    settings, _, packed = rows(tmp_path / "store", "masked_tokens")
    stream = Hidden(Shuffled(packed, batch_size=2, seed=0), settings)
    once, again = (stream.select(3).rows.read(np.arange(2)) for _ in range(2))
    other = dataclasses.replace(stream.select(3).rows, step=4).read(np.arange(2))
    assert np.array_equal(once["tokens_BT"], again["tokens_BT"])
    assert not np.array_equal(once["tokens_BT"], other["tokens_BT"])


@pytest.mark.parametrize(("model", "objective", "match"), [
    ({}, "masked_tokens", "'next_token' or 'fill_in_the_middle' fits"),
    ({"attention": {"mask": "bidirectional"}}, "next_token", "'masked_tokens' fits"),
    ({"encoder_layers": 1}, "next_token", "'span_corruption' or 'prefix' fits"),
])  # fmt: skip
def test_an_objective_that_the_model_is_not_made_for_is_refused(model: dict, objective: str, match: str) -> None:
    config = resolve({"model": model, "task": {"objective": {"name": objective}}})
    with pytest.raises(ConfigError, match=f"task.objective.name='{objective}'.*{match}"):
        check_objective(config)
