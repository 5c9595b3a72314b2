"""An HTTP server that speaks the OpenAI API: models, completions and chats, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmjax.core.errors import LlmjaxError
from llmjax.data import chat
from llmjax.data.tokenizer import Tokenizer
from llmjax.serve import errors, replies
from llmjax.serve.engine import ContextLengthError, Engine, Request, ScoredPrompt
from llmjax.serve.errors import ApiError
from llmjax.serve.metrics import CountResponses, Metrics
from llmjax.serve.replies import ChatForm, CompletionForm, Form, Row
from llmjax.serve.scheduler import Scheduler, Submission
from llmjax.serve.schemas import MAX_CHOICES, ChatBody, CompletionBody, Sampling

JOIN_SECONDS = 5.0  # what a dispatch or a compilation under way may take after the grace time

_log = logging.getLogger(__name__)


def make_app(engine: Engine, *, model_name: str) -> Starlette:
    """The ASGI application around an engine that has a tokenizer; the engine works on a thread of the application's."""
    server = Server(engine, model_name)
    routes = [
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.get_model),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.scrape),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.scheduler.stop(timeout=JOIN_SECONDS)

    counting = Middleware(CountResponses, metrics=server.metrics, endpoints={route.path for route in routes})
    told = (ApiError, HTTPException, pydantic.ValidationError, LlmjaxError, Exception)
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[counting],
                    exception_handlers=dict.fromkeys(told, errors.handle))
    app.state.scheduler = server.scheduler
    return app


class Server:
    """The endpoints."""

    def __init__(self, engine: Engine, model_name: str):
        assert engine.tokenizer, "a server speaks text"
        self.scheduler = Scheduler(engine, max_queue=engine.config.max_queue)
        self.metrics = Metrics(self.scheduler)
        self._engine = engine
        self._tokenizer: Tokenizer = engine.tokenizer
        self._model_name = model_name
        self._started = int(time.time())

    async def health(self, _: HttpRequest) -> Response:
        """200 as long as the server answers."""
        return JSONResponse({"status": "ok"})

    async def scrape(self, _: HttpRequest) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def list_models(self, _: HttpRequest) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def get_model(self, http: HttpRequest) -> Response:
        """The model by its name."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model())

    async def complete(self, http: HttpRequest) -> Response:
        """Continue prompts: texts, which get the begin token in front, or token ids as they are."""
        body = CompletionBody.model_validate_json(await http.body())
        self._check_model(body.model)
        form = CompletionForm(self._tokenizer, echo=bool(body.echo), logprobs=body.logprobs)
        requests = self._requests(body, self._prompts(body.prompt), max_new_tokens=body.max_tokens, param="prompt",
                                  num_alternatives=body.logprobs or 0,
                                  score_prompt=bool(body.echo) and body.logprobs is not None)
        return await self._answer(http, body, form, requests)

    async def chat(self, http: HttpRequest) -> Response:
        """Write the assistant's next message."""
        body = ChatBody.model_validate_json(await http.body())
        self._check_model(body.model)
        try:
            messages = [message.as_template_input() for message in body.messages]
            prompt_ids = chat.encode_prompt(messages, self._tokenizer).tolist()
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        requests = self._requests(body, [prompt_ids], max_new_tokens=limit, param="messages",
                                  num_alternatives=body.top_logprobs or 0, score_prompt=False)
        return await self._answer(http, body, ChatForm(self._tokenizer, logprobs=bool(body.logprobs)), requests)

    def _model(self) -> replies.Json:
        return {"id": self._model_name, "object": "model", "created": self._started, "owned_by": "llmjax",
                "max_model_len": self._engine.model.config.max_seq_len}

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise ApiError(404, f"The model `{name}` does not exist; this server has `{self._model_name}`",
                           param="model", code="model_not_found")

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        try:
            return [[self._tokenizer.bos_id, *self._tokenizer.encode(one)] if isinstance(one, str) else one
                    for one in prompts]
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error

    def _requests(self, body: Sampling, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | None, param: str,
                  num_alternatives: int, score_prompt: bool) -> list[Request]:
        """One request for every choice of every prompt; choice i of a prompt has seed + i. Raises ApiError."""
        if len(prompts) * body.num_choices > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts with n={body.num_choices} are more than {MAX_CHOICES} answers",
                           param="n")
        seed = secrets.randbits(32) if body.seed is None else body.seed
        try:
            return [self._engine.resolve(Request(
                prompt_ids, body.sampling_params(max_new_tokens=max_new_tokens, num_alternatives=num_alternatives,
                                                 seed=seed + choice), score_prompt="yes" if score_prompt else "no"))
                    for prompt_ids in prompts for choice in range(body.num_choices)]
        except ContextLengthError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error

    async def _answer(self, http: HttpRequest, body: Sampling, form: Form, requests: list[Request]) -> Response:
        submission = self.scheduler.submit(requests)
        rows = [Row(request) for request in requests]
        head = replies.new_head(form, self._model_name)
        if body.stream:
            return EventStream(self._chunks(submission, rows, body, form, head), submission)
        try:
            if not await _finished_before_disconnect(_fill(rows, submission), http):
                return Response(status_code=499)  # to nobody; what nginx logs for a client that left
        finally:
            submission.cancel()
            self.metrics.count_tokens(rows)
        choices = [form.choice(index, row) for index, row in enumerate(rows)]
        return JSONResponse(head.wrap(form.whole_object, choices,
                                      usage=replies.usage(rows, num_choices=body.num_choices)))

    async def _chunks(self, submission: Submission, rows: list[Row], body: Sampling, form: Form,
                      head: replies.Head) -> AsyncIterator[str]:
        """The server-sent events of a streamed answer."""
        usage_so_far = {"usage": None} if body.include_usage else {}

        def chunk(choice: replies.Json) -> str:
            return _event(head.wrap(form.chunk_object, [choice], **usage_so_far))

        try:
            for index, row in enumerate(rows):
                if row.request.score_prompt == "no" and (choice := form.opening(index, row)):
                    yield chunk(choice)
            async for event in submission:
                row = rows[event.row]
                row.add(event)
                word = form.opening if isinstance(event, ScoredPrompt) else form.delta
                if choice := word(event.row, row):
                    yield chunk(choice)
            for index, row in enumerate(rows):
                if not row.tokens and (choice := form.delta(index, row)):  # none were asked for: only say so
                    yield chunk(choice)
            if body.include_usage:
                yield _event(head.wrap(form.chunk_object, [], usage=replies.usage(rows, num_choices=body.num_choices)))
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 (the status has been sent; the error goes into the stream)
            _log.warning("a stream ended early: %s", error)
            yield _event(errors.to_api_error(error).as_dict())
        finally:
            self.metrics.count_tokens(rows)


class EventStream(StreamingResponse):
    """Server-sent events whose generation ends with the connection, however early that is."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str], submission: Submission):
        super().__init__(chunks, headers={"Cache-Control": "no-cache"})
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.cancel()


async def _fill(rows: Sequence[Row], submission: Submission) -> None:
    """Collect a whole answer."""
    async for event in submission:
        rows[event.row].add(event)


async def _finished_before_disconnect(work: Coroutine[None, None, None], http: HttpRequest) -> bool:
    """Await `work`, unless the client leaves first; raises what it raises."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(data: replies.Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
