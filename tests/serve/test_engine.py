"""The engine against a plain forward pass over all tokens, and what it compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.monitoring
import numpy as np
import pytest

from llmjax.core.errors import ConfigError
from llmjax.core.sections import ServeConfig
from llmjax.serve import engine as engine_lib
from llmjax.serve.engine import ContextLengthError, Request
from llmjax.serve.sampling import SamplingParams
from tests.serve.tiny import CONFIG, ByteTokenizer, logprobs_without_cache, make_engine


@pytest.fixture(scope="module")
def engine():
    return make_engine(tokenizer=None)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, CONFIG.vocab_size, length).tolist()


@pytest.mark.parametrize("num_prompt", [1, 63, 64, 65])
def test_greedy_is_that_of_a_model_without_a_cache(engine, num_prompt):
    prompt_ids = random_ids(num_prompt)
    generation = engine.generate(prompt_ids, SamplingParams(max_new_tokens=21))
    logprobs_TV = logprobs_without_cache(engine, prompt_ids + generation.token_ids)[num_prompt - 1:-1]
    assert generation.token_ids == logprobs_TV.argmax(axis=1).tolist()
    np.testing.assert_allclose(generation.logprobs, logprobs_TV.max(axis=1), atol=1e-5)
    assert len(set(generation.token_ids)) > 5  # else this would compare nothing
    assert generation.finish_reason == "length"


def test_a_batch_gives_what_each_prompt_gives_alone(engine):
    prompts = [random_ids(length, seed=length) for length in (40, 1, 90, 3, 17)]
    params = SamplingParams(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=7)
    together = engine.generate_batch(prompts, params)
    assert [g.token_ids for g in together] == [engine.generate(p, params).token_ids for p in prompts]
    assert len({tuple(g.token_ids) for g in together}) == 5


def test_rows_of_one_batch_have_settings_of_their_own(engine):
    rows = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=9, temperature=1.0, seed=1),
            SamplingParams(max_new_tokens=0), SamplingParams(max_new_tokens=9, temperature=1.0, seed=2)]
    tokens: dict[int, list[int]] = {}
    for token in engine.stream([Request([5, 6, 7], params) for params in rows]):
        tokens.setdefault(token.row, []).append(token.id)
    assert {row: len(ids) for row, ids in tokens.items()} == {0: 3, 1: 9, 3: 9}
    assert tokens[1] != tokens[3]
    assert tokens[1] == engine.generate([5, 6, 7], rows[1]).token_ids


def test_more_prompts_than_a_batch_takes(engine, monkeypatch):
    monkeypatch.setattr(engine_lib, "MAX_BATCH", 2)
    prompts = [random_ids(length, seed=length) for length in (9, 2, 5)]
    found = engine.generate_batch(prompts, SamplingParams(max_new_tokens=4))
    assert [g.token_ids for g in found] == [engine.generate(p, SamplingParams(max_new_tokens=4)).token_ids
                                            for p in prompts]


def test_the_end_token_ends_and_is_reported():
    engine = make_engine(tokenizer=ByteTokenizer())
    without = make_engine(tokenizer=None).generate([5], SamplingParams(max_new_tokens=12)).token_ids
    engine.tokenizer.eos_id = without[4]
    at = without.index(without[4])
    generation = engine.generate([5], SamplingParams(max_new_tokens=12))
    assert generation.token_ids == without[:at + 1]
    assert generation.finish_reason == "stop"
    assert generation.text == engine.tokenizer.decode([i for i in without[:at] if i < 260])


def test_a_stop_text_ends_and_is_cut_off():
    engine = make_engine()
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=3)
    plain = engine.generate([5], params)
    assert len(plain.text) > 8
    stop = plain.text[4:6]
    pieces: list[str] = []
    stopped = engine.generate([5], dataclasses.replace(params, stop=(stop, "not there")),
                              on_token=lambda token: pieces.append(token.text))
    assert stopped.text == plain.text[:plain.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[:len(stopped.token_ids)]


def test_alternatives_are_the_models(engine):
    params = SamplingParams(max_new_tokens=5, num_alternatives=4, temperature=2.0)
    tokens = list(engine.stream([Request([9, 8], params)]))
    logprobs_TV = logprobs_without_cache(engine, [9, 8] + [token.id for token in tokens])[1:-1]
    for token, logprobs_V in zip(tokens, logprobs_TV, strict=True):
        assert [i for i, _ in token.alternatives] == np.argsort(-logprobs_V)[:4].tolist()
        np.testing.assert_allclose([p for _, p in token.alternatives], np.sort(logprobs_V)[:-5:-1], atol=1e-5)
        np.testing.assert_allclose(token.logprob, logprobs_V[token.id], atol=1e-5)


@pytest.mark.parametrize("length", [1, 64, 70])
def test_prompt_scores_are_the_models(engine, length):
    prompt_ids = random_ids(length)
    params = SamplingParams(max_new_tokens=1, num_alternatives=2)
    scored, token = engine.stream([Request(prompt_ids, params, score_prompt="yes")])
    assert token.id == engine.generate(prompt_ids, params).token_ids[0]
    logprobs_TV = logprobs_without_cache(engine, prompt_ids)[:-1]
    np.testing.assert_allclose(scored.logprobs, logprobs_TV[np.arange(length - 1), prompt_ids[1:]], atol=1e-5)
    assert [[i for i, _ in row] for row in scored.alternatives] == np.argsort(-logprobs_TV)[:, :2].tolist()


def test_generation_reaches_the_last_position_and_no_further(engine):
    room = CONFIG.max_seq_len - 3
    assert len(engine.generate([5, 6, 7], SamplingParams(max_new_tokens=room)).token_ids) == room
    with pytest.raises(ContextLengthError, match=f"3 tokens and {room + 1} new.*max_seq_len=256; at most {room} new"):
        engine.generate([5, 6, 7], SamplingParams(max_new_tokens=room + 1))
    with pytest.raises(ContextLengthError, match="leaves no room"):
        engine.generate(random_ids(256))
    with pytest.raises(ContextLengthError, match="at most 255"):
        engine.generate(random_ids(300))


def test_a_number_of_new_tokens_left_open_is_the_configs_or_what_fits():
    engine = make_engine(tokenizer=None, serve=ServeConfig(max_new_tokens=20))
    assert len(engine.generate([5]).token_ids) == 20
    assert len(engine.generate(random_ids(CONFIG.max_seq_len - 4)).token_ids) == 4


@pytest.mark.parametrize("prompt_ids, told", [([], "no tokens"), ([5, 300], "300.*0 to 299"), ([-1], "-1")])
def test_prompts_that_cannot_be_continued(engine, prompt_ids, told):
    with pytest.raises(ConfigError, match=told):
        engine.generate(prompt_ids)


def test_stop_texts_need_a_tokenizer(engine):
    with pytest.raises(ConfigError, match="tokenizer"):
        engine.generate([5], SamplingParams(stop=("x",)))


def test_one_compilation_per_bucket_of_lengths():
    compiled: list[str] = []
    engine = make_engine(dataclasses.replace(CONFIG, num_layers=1))  # no other test's: programs are shared by shape

    def generate(num_prompt: int, **params) -> int:
        """How many programs this generation lowered; the persistent cache cannot hide any."""
        before = len(compiled)
        engine.generate(random_ids(num_prompt), SamplingParams(**params))
        return len(compiled) - before

    def listener(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        assert generate(3, max_new_tokens=5) == 3  # prefill of 64, growth to 128 slots, decoding in them
        assert generate(64, max_new_tokens=64, temperature=0.7, top_k=5, top_p=0.5, seed=9, stop=("x",)) == 0
        assert generate(17, max_new_tokens=30, num_alternatives=3) == 0
        assert generate(17, max_new_tokens=65) == 2  # growth to 256 slots, decoding in them
        assert generate(65, max_new_tokens=100) == 2  # prefill of 128, growth from there
        assert generate(128, max_new_tokens=1) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_weights_are_cast_once_and_norms_stay_in_float32():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params = make_engine(config).params
    assert params["blocks"]["attn"]["q"].dtype == "bfloat16"
    assert params["final_norm"]["scale"].dtype == params["blocks"]["mlp_norm"]["scale"].dtype == "float32"
