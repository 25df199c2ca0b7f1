"""The ``serve`` verb: OpenAI's API over HTTP, for as many clients as there is room for."""

import argparse
import asyncio
import hmac
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from accessory.console import listed, say
from accessory.data.fields import whole_text
from accessory.errors import UserError
from accessory.infer.chat import check_template, load
from accessory.infer.client_questions import asked_in_chat, asked_to_continue, asked_to_embed
from accessory.infer.meta import MetaModel
from accessory.infer.metrics import Metrics
from accessory.infer.openai_api import Call, ChatCall, CompletionCall, EmbeddingCall, Writer, error_body
from accessory.infer.prompts import Prompt
from accessory.infer.sampling import Sampling
from accessory.infer.service import Answers, Busy, Closing, News, Service
from accessory.infer.tool_calls import CallForm
from accessory.parallel.launch import Launch, run_job, start_ranks
from accessory.parallel.watchdog import end_stalls_after
from accessory.settings import ParallelSection

T = TypeVar("T", bound=Call)
KEY = "ACCESSORY_API_KEY"
MOST_BYTES, MOST_WITH_IMAGES = 2 * 2**20, 32 * 2**20  # of a body
BODY_S = 30.0  # for a body to come
SERVED = "/v1, as OpenAI's API; beside it /health and /metrics. Ctrl-C ends it."
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run_serve(arguments: argparse.Namespace) -> None:
    """The ``serve`` verb."""
    start_ranks(arguments.mp)
    run_job(lambda launch: serve(arguments, launch), ParallelSection.stall_timeout_s)


def serve(arguments: argparse.Namespace, launch: Launch, ready: Callable[[str], None] | None = None) -> None:
    """Serve from rank 0; the other ranks follow.

    Args:
        arguments: the verb's. ready: called with the server's address once clients can come; None: it is said.
    """
    check_template(arguments.template)
    key = os.environ.get(KEY, "")
    if not key and arguments.host not in LOOPBACK:
        raise UserError(f"--host {arguments.host} lets others in: set {KEY}, the key that they must send")
    door = None if launch.rank else _listen(arguments.host, arguments.port)
    name = arguments.name or arguments.checkpoint.resolve().name
    names = [name, *(adapter for adapter, _ in arguments.lora)]
    if twice := [one for one in names if names.count(one) > 1]:
        raise UserError(f"two models would be called '{twice[0]}': give each --lora, and the base by --name, one of its own")
    model = load(arguments, launch, adapters=dict(arguments.lora))
    engine = model.make_engine(arguments.cache_tokens)
    end_stalls_after(ParallelSection.stall_timeout_s)
    if door is None:
        for number in (signal.SIGINT, signal.SIGTERM):  # srun sends them to all ranks; the first one says when it is over
            signal.signal(number, signal.SIG_IGN)
        return engine.follow()
    metrics = Metrics(engine, name)
    service = Service(engine, metrics, most_waiting=arguments.max_waiting, grace_s=arguments.grace)
    app = make_app(
        model,
        service,
        name,
        template=arguments.template,
        key=key,
        limit_s=arguments.timeout,
        image_hosts=arguments.allow_image_host,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, service.close)
    said = f"{listed(names)} {'is' if len(names) == 1 else 'are'} served at"
    engine.lead(lambda: _serve(app, service, door, ready or (lambda address: say(f"{said} {address}{SERVED}"))))


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is read: uvicorn lets clients in once it is."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        door = socket.socket(family, kind)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port") from error
    return door


def _serve(app: FastAPI, service: Service, door: socket.socket, ready: Callable[[str], None]) -> None:
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, args=([door],), daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("uvicorn has ended")
        time.sleep(0.01)
    host, port = door.getsockname()[:2]
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    service.run()
    server.should_exit = True
    thread.join(10)
    say(f"ended; {service.cut_off} answers were cut off" if service.cut_off else "ended; every answer was given")


@dataclass(frozen=True)
class Front:
    """What the routes share."""

    model: MetaModel
    service: Service
    name: str
    template: str | None
    limit_s: float

    async def read(self, request: Request, kind: type[T]) -> T:
        """The call in a body."""
        call = kind.read(await _json(request, MOST_WITH_IMAGES if self.model.llma.sight else MOST_BYTES))
        self.adapter(call.model)
        return call

    @property
    def names(self) -> list[str]:
        """What clients can ask: the base, and its adapters."""
        return [self.name, *self.model.adapters]

    def adapter(self, model: str) -> str | None:
        """Which adapter a client means; None: the base."""
        if model not in self.names:
            raise HTTPException(404, f"the model '{model}' is not here; there is {listed(self.names)}")
        return None if model == self.name else model

    async def answer(
        self,
        call: Call,
        prompts: Sequence[tuple[Prompt, Sampling]],
        request: Request,
        form: CallForm | None = None,
    ) -> Response:
        """Ask, and answer in one piece or as it comes; ``form``: see ``Writer``."""
        samples = [(prompt, sampling.seeded(n)) for prompt, sampling in prompts for n in range(call.n)]
        answers = await self.service.ask(samples, self.adapter(call.model))
        writer = Writer(call, self.model.tokenizer, form)
        if call.stream:
            return Events(_events(call, answers, writer, self.limit_s), self.limit_s)
        gone = asyncio.create_task(_gone(request))
        whole = asyncio.create_task(_all(answers))
        try:
            done, _ = await asyncio.wait({gone, whole}, timeout=self.limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise HTTPException(504, f"not answered within {self.limit_s:g} s")
        finally:
            gone.cancel(), whole.cancel()
            answers.cancel()
        if problem := _problem(answers):
            raise HTTPException(503, problem)
        return JSONResponse(writer.whole(answers.requests))

    async def embed(self, call: EmbeddingCall) -> Response:
        """Embed each text, between two steps of answers."""
        if self.adapter(call.model):
            raise UserError(f"embeddings are the base's: ask the model '{self.name}'")
        texts = await run_in_threadpool(asked_to_embed, self.model, call, self.service.engine.max_seq_len)
        async with asyncio.timeout(self.limit_s):
            found = [await self.service.embed(tokens) for tokens in texts]
        return JSONResponse(call.answer(found, sum(map(len, texts))))


def make_app(
    model: MetaModel,
    service: Service,
    name: str,
    *,
    template: str | None,
    key: str,
    limit_s: float,
    image_hosts: Collection[str] = (),
) -> FastAPI:
    """The application.

    Args:
        name: what clients call the model. key: what they must send; empty: nothing.
        limit_s: seconds that an answer may take. image_hosts: machines from which images may be fetched.
    """
    front = Front(model, service, name, template, limit_s)
    app = FastAPI(openapi_url=None)

    def check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(sent.encode(), key.encode()):
            raise HTTPException(401, "the key is missing, or is another one: send it as Authorization: Bearer KEY")

    guarded = [Depends(check_key)]

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat_completions(request: Request) -> Response:
        call = await front.read(request, ChatCall)
        asked, form = await run_in_threadpool(asked_in_chat, model, call, front.adapter(call.model), template, image_hosts)
        return await front.answer(call, [asked], request, form)

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        call = await front.read(request, CompletionCall)
        asked = await run_in_threadpool(asked_to_continue, model, call, front.adapter(call.model))
        return await front.answer(call, asked, request)

    @app.post("/v1/embeddings", dependencies=guarded)
    async def embeddings(request: Request) -> Response:
        return await front.embed(EmbeddingCall.read(await _json(request, MOST_BYTES)))

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(one) for one in front.names]}

    @app.get("/v1/models/{model}", dependencies=guarded)
    async def one_model(model: str) -> dict[str, Any]:
        front.adapter(model)
        return described(model)

    started = int(time.time())

    def described(one: str) -> dict[str, Any]:
        said = {"id": one, "object": "model", "created": started, "owned_by": "accessory"}
        said["max_model_len"] = service.engine.max_seq_len
        return said if one == name else said | {"parent": name}

    @app.get("/health")
    async def health() -> Response:
        problem = service.problem
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    _tell_errors(app)
    return app


async def _json(request: Request, most_bytes: int) -> Mapping[str, Any]:
    """The object in a body. Only what says that it is JSON is read: a page in a browser may send other kinds to anybody."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the request as Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > most_bytes:
                    raise HTTPException(413, f"a request may have {most_bytes} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not come within {BODY_S:g} s") from error
    try:
        text = body.decode("utf-8-sig")
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise UserError("the request must be an object")
    if "\\ud" in text.lower():  # how half a character can be written, which no tokenizer takes and no answer can hold
        whole_text(json.dumps(found, ensure_ascii=False), "the request")
    return found


async def _gone(request: Request) -> None:
    """Returns when the client is."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(answers: Answers) -> None:
    async for _ in answers:
        pass


def _problem(answers: Answers) -> str:
    """Why there is no answer, although there should be; mostly empty."""
    reasons = {request.finish_reason for request in answers.requests}
    if "error" in reasons:
        return "the form of the answer is too large to be followed"
    return "the server is shutting down" if "cancelled" in reasons else ""


class Events(StreamingResponse):
    """Server-sent events; a client that does not take them in time is let go."""

    def __init__(self, events: AsyncIterator[str], limit_s: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._limit_s = limit_s + 10  # the events' own limit says so before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)


async def _events(call: Call, answers: Answers, writer: Writer, limit_s: float) -> AsyncIterator[str]:
    """An answer in pieces, as they come. If the client leaves, this ends here, and so do the requests."""
    deadline = time.monotonic() + limit_s
    try:
        if isinstance(call, ChatCall):
            for number in range(len(answers.requests)):
                yield _event(writer.first(number))
        steps = aiter(answers)
        with suppress(StopAsyncIteration):
            while True:
                news = await asyncio.wait_for(anext(steps), deadline - time.monotonic())
                for chunk in _chunks(news, answers, writer):
                    yield _event(chunk)
        if problem := _problem(answers):
            yield _event(error_body(problem, "server_error"))
        elif call.stream_options.include_usage:
            yield _event(writer.last(answers.requests))
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield _event(error_body(f"not answered within {limit_s:g} s", "server_error"))
    finally:
        answers.cancel()


def _chunks(news: Sequence[News], answers: Answers, writer: Writer) -> list[dict[str, Any]]:
    """One for each answer that anything came to: who reads slowly gets more at a time."""
    chunks = []
    for number in sorted({one.number for one in news}):
        own = [one for one in news if one.number == number]
        text, choices = "".join(one.text for one in own), [one.choice for one in own if one.choice]
        end = answers.requests[number] if own[-1].finish_reason in ("stop", "length") else None
        if chunk := writer.part(number, text, choices, end):
            chunks.append(chunk)
    return chunks


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""Of errors, by status; others are the request's up to 499, the server's from 500."""
CODES = {401: "invalid_api_key"}


def _tell_errors(app: FastAPI) -> None:
    """All in OpenAI's form."""

    def told(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        return JSONResponse(error_body(message, kind, CODES.get(status)), status, headers)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return told(400, str(error))

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        return told(429, f"{error}: ask again in {error.retry_after} s", {"Retry-After": str(error.retry_after)})

    @app.exception_handler(TimeoutError)
    async def late(_: Request, error: TimeoutError) -> Response:
        return told(504, "not answered in time")

    @app.exception_handler(Closing)
    async def closing(_: Request, error: Closing) -> Response:
        return told(503, "the server is shutting down")

    @app.exception_handler(StarletteHTTPException)  # of a path that is none, too
    async def failed(request: Request, error: StarletteHTTPException) -> Response:
        if "endpoint" not in request.scope:
            return told(error.status_code, f"there is no {request.url.path} here: docs/serving.md says what there is")
        return told(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        number = secrets.token_hex(4)
        print(f"accessory: error {number} in a request", file=sys.stderr)
        traceback.print_exception(error)
        return told(500, f"a fault of the server, number {number} in what it prints")
