"""The server as the official OpenAI client sees it, in front of a real engine."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmjax.core.sections import ServeConfig
from llmjax.data import chat
from llmjax.serve.engine import Request
from llmjax.serve.sampling import SamplingParams
from tests.serve.serving import MODEL, client, serving
from tests.serve.tiny import CONFIG, make_engine

SAMPLED = dict(model=MODEL, max_tokens=12, seed=5)  # at the API's own temperature of 1
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine():
    return make_engine(serve=ServeConfig(max_new_tokens=16, max_queue=4))


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def api(url):
    with client(url) as api:
        yield api


def prompt_ids(engine, text: str) -> list[int]:
    return [engine.tokenizer.bos_id, *engine.tokenizer.encode(text)]


def generated(engine, ids, **params):
    return engine.generate(ids, SamplingParams(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 5} | params))


def test_models(api):
    (model,) = api.models.list().data
    assert model.id == MODEL == api.models.retrieve(MODEL).id
    assert model.max_model_len == CONFIG.max_seq_len
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("another")


def test_completion_is_the_engines(api, engine):
    answer = api.completions.create(prompt="def f", **SAMPLED)
    expected = generated(engine, prompt_ids(engine, "def f"))
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage.prompt_tokens == 6 and answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == 6 + len(expected.token_ids)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_temperature_top_p_and_top_k_reach_the_engine(api, engine):
    ids = prompt_ids(engine, "def f")
    assert api.completions.create(prompt="def f", **SAMPLED, temperature=0).choices[0].text == generated(
        engine, ids, temperature=0.0).text
    assert api.completions.create(prompt="def f", **SAMPLED, top_p=0.4, extra_body={"top_k": 3}).choices[0].text == \
        generated(engine, ids, top_p=0.4, top_k=3).text


def test_a_number_of_tokens_left_open_is_the_configs(api):
    assert api.completions.create(model=MODEL, prompt="a", temperature=0).usage.completion_tokens == 16


def test_prompts_of_every_kind(api, engine):
    texts = api.completions.create(prompt=["ab", "c"], n=2, **SAMPLED).choices
    ids = [prompt_ids(engine, "ab"), prompt_ids(engine, "c")]
    assert [choice.index for choice in texts] == [0, 1, 2, 3]
    assert [choice.text for choice in texts] == [generated(engine, i, seed=seed).text for i in ids for seed in (5, 6)]
    assert [choice.text for choice in api.completions.create(prompt=ids, **SAMPLED).choices] == [
        texts[0].text, texts[2].text]
    assert api.completions.create(prompt=ids[1], **SAMPLED).choices[0].text == texts[2].text


def test_the_same_seed_gives_the_same_text_and_no_seed_another(api):
    def texts(**seed) -> set[str]:
        asked = dict(model=MODEL, prompt="x", max_tokens=12, **seed)
        return {api.completions.create(**asked).choices[0].text for _ in range(3)}

    assert len(texts(seed=-3)) == 1
    assert len(texts()) > 1


def test_stop_as_text_and_as_list(api, engine):
    long = SAMPLED | {"max_tokens": 30, "seed": 4}
    plain = api.completions.create(prompt="x", **long).choices[0].text
    stop = plain[3:5]
    for given_stop in (stop, ["never there", stop]):
        choice = api.completions.create(prompt="x", stop=given_stop, **long).choices[0]
        assert (choice.text, choice.finish_reason) == (plain[:plain.index(stop)], "stop")


def test_completion_logprobs_are_the_engines(api, engine):
    logprobs = api.completions.create(prompt="x", logprobs=2, **SAMPLED).choices[0].logprobs
    expected = generated(engine, prompt_ids(engine, "x"))
    assert logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-6)
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob <= max(top.values())
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_echo_scores_the_prompt(api, engine):
    choice = api.completions.create(prompt="score", echo=True, logprobs=1, **SAMPLED | {"max_tokens": 0}).choices[0]
    ids = prompt_ids(engine, "score")
    (scored,) = engine.stream([Request(ids, SamplingParams(max_new_tokens=0), score_prompt="yes")])
    assert choice.text == "score" and choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["<s>", *"score"]
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == [None, *scored.logprobs] and choice.logprobs.top_logprobs[0] is None


def test_echo_without_logprobs(api, engine):
    expected = generated(engine, prompt_ids(engine, "pro")).text
    assert api.completions.create(prompt="pro", echo=True, **SAMPLED).choices[0].text == "pro" + expected


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_completions_adds_up(api, echo):
    asked = dict(prompt=["one", "two"], n=2, logprobs=0, echo=echo, **SAMPLED)
    whole = api.completions.create(**asked)
    texts, reasons, logprobs, offsets = ([[] for _ in range(4)] for _ in range(4))
    for chunk in api.completions.create(stream=True, stream_options={"include_usage": True}, **asked):
        assert bool(chunk.usage) == (not chunk.choices)
        for choice in chunk.choices:
            texts[choice.index].append(choice.text)
            reasons[choice.index].append(choice.finish_reason)
            logprobs[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
    assert chunk.usage == whole.usage
    for choice in whole.choices:
        assert "".join(texts[choice.index]) == choice.text
        assert [r for r in reasons[choice.index] if r] == [choice.finish_reason] == reasons[choice.index][-1:]
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert offsets[choice.index] == choice.logprobs.text_offset


def test_chat_is_the_engines(api, engine):
    answer = api.chat.completions.create(messages=MESSAGES, **SAMPLED)
    expected = generated(engine, chat.encode_prompt(MESSAGES, engine.tokenizer).tolist())
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.message.role == "assistant" and answer.object == "chat.completion"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert api.chat.completions.create(messages=parts, **SAMPLED).choices[0].message.content == expected.text


def test_chat_takes_either_name_of_the_limit(api):
    answer = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=3, temperature=0)
    assert answer.usage.completion_tokens == 3


def test_chat_logprobs_are_the_engines(api, engine):
    choice = api.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **SAMPLED).choices[0]
    expected = generated(engine, chat.encode_prompt(MESSAGES, engine.tokenizer).tolist())
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs, abs=1e-6)
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    said = b"".join(bytes(entry.bytes) for entry in content)
    assert said.decode(errors="replace") == choice.message.content


def test_a_stream_of_a_chat_adds_up(api):
    whole = api.chat.completions.create(messages=MESSAGES, **SAMPLED)
    chunks = list(api.chat.completions.create(messages=MESSAGES, stream=True, **SAMPLED))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_of_no_tokens_ends(api):
    asked = SAMPLED | {"max_tokens": 0}
    (chunk,) = api.completions.create(prompt="x", stream=True, **asked)
    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == ("", "length")


def refused(url: str, body: object, *, path: str = "completions") -> tuple[int, dict]:
    """Status and error object of a request that is not served."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(f"{url}/v1/{path}", content=content, timeout=60)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error


def test_errors_are_the_clients_exceptions(api):
    with pytest.raises(openai.NotFoundError, match="another") as caught:
        api.completions.create(**SAMPLED | {"model": "another"}, prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_seq_len=256") as caught:
        api.completions.create(prompt="x" * 300, **SAMPLED)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(messages=[{"role": "user", "content": "x" * 300}], **SAMPLED)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("body, param", [
    (b"{", None), (b"\xff", None), (b"[]", None), (b'"\\ud800"', None),
    ({"model": MODEL}, "prompt"), ({"prompt": "x"}, "model"), ({"model": MODEL, "prompt": "x", "n": "2"}, "n"),
    ({"model": MODEL, "prompt": ["x", 1]}, "prompt"), ({"model": MODEL, "prompt": []}, "prompt"),
    ({"model": MODEL, "prompt": "x", "temperature": 3}, "temperature"),
    ({"model": MODEL, "prompt": "x", "foo": 1}, "foo"),
    ({"model": MODEL, "prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
    ({"model": MODEL, "prompt": "x", "stop": [""]}, "stop"), ({"model": MODEL, "prompt": [5, 300]}, None),
    ({"model": MODEL, "prompt": ["x", "y"], "n": 128}, "n"),
    (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
])
def test_malformed_requests_are_told_what_is_wrong(url, body, param):
    status, error = refused(url, body)
    assert status == 400 and error["type"] == "invalid_request_error"
    assert (error["param"] or "").split(".")[0] == (param or "")


def test_places_that_do_not_exist(url):
    assert refused(url, {}, path="nothing")[0] == 404
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_neutral_values_of_what_is_not_served_are_taken(api):
    api.completions.create(prompt="x", presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1, user="me",
                           **SAMPLED | {"max_tokens": 1})


def test_health_and_metrics(url, api):
    api.completions.create(prompt="abc", **SAMPLED | {"max_tokens": 1})
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    scraped = httpx.get(f"{url}/metrics").text
    assert 'llmjax_responses_total{endpoint="/v1/completions",status="200"}' in scraped
    assert "llmjax_requests_waiting 0.0" in scraped


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)
FIELDS = ("prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs", "echo",
          "stream_options", "logit_bias", "top_k", "top_logprobs", "model")
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "no"]),
                                 "content": st.text(max_size=8) | JSON})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)}) | st.fixed_dictionaries({"prompt": st.text(max_size=8)}) | JSON,
       path=st.sampled_from(["completions", "chat/completions"]))
def test_no_body_makes_the_server_fail(url, body, path):
    if isinstance(body, dict):
        body = {"model": MODEL, "max_tokens": 1} | body
    response = httpx.post(f"{url}/v1/{path}", content=json.dumps(body).encode(), timeout=60)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
