"""The FastAPI application: routes, limits and errors. What a route answers is written by its door."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from finback.server import anthropic, ollama, openai
from finback.server.errors import TYPES, APIError
from finback.server.guard import Guard, error_response
from finback.server.keys import Key, Prices, per_token, yuan
from finback.server.prefixes import keep_prefixes
from finback.server.prompt import LONG_TEXT
from finback.server.schemas import ChatRequest, CompletionRequest, ErrorBody, told
from finback.server.service import Service
from finback.server.wire import ClientGone, event, stream, whole

logger = logging.getLogger("finback.server")

Made = TypeVar("Made")

STATIC = Path(__file__).parent / "static"
FILES = {file.relative_to(STATIC).as_posix(): file for file in STATIC.rglob("*") if file.is_file()}
STATUSES = (400, 401, 402, 403, 404, 413, 422, 429, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in STATUSES}
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": anthropic.ErrorBody} for status in STATUSES}
OLLAMA_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ollama.ErrorBody} for status in STATUSES}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with stream its events", "content": {"application/json": {}, "text/event-stream": {}}}
}
LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with stream its lines", "content": {"application/json": {}, "application/x-ndjson": {}}}
}


def create_app(service: Service) -> FastAPI:
    """The server over a service; the engine's thread runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.finish()
        ended = service.worker.stop()
        if ended and service.config.cache_dir is not None:
            keep_prefixes(service.worker.llm, service.config.cache_dir)

    app = FastAPI(title="finback", version=service.version, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_chat(app, service)
    _add_anthropic(app, service)
    _add_ollama(app, service)
    _add_facts(app, service)
    _add_page(app)
    _add_errors(app, service)
    config = service.config
    app.add_middleware(Guard, config=config)
    if config.allow_origin:  # around everything: a page elsewhere cannot read an error that lacks its header, be it 413 or 500
        app.middleware_stack = CORSMiddleware(
            app.build_middleware_stack(), allow_origins=list(config.allow_origin), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _known(service: Service) -> APIRouter:
    """For the routes that ask for a key. It is looked at before the body is read: whoever has none here learns nothing about what came
    along, not even whether it is JSON."""

    class KnownRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def known(request: Request) -> Response:
                request.state.key = service.key_of(request.headers)
                return await answer(request)

            return known

    return APIRouter(route_class=KnownRoute)


async def _made(request: Request, make: Callable[..., Made], *arguments: Any) -> Made:
    """What `make` returns of a body, in a thread where it has much to tokenise: the others are answered meanwhile."""
    if len(await request.body()) <= LONG_TEXT:
        return make(*arguments)
    return await asyncio.to_thread(make, *arguments)


async def _job(request: Request, service: Service, make: Callable[..., Made], body: BaseModel) -> Made:
    """A request to be answered, where its key allows it."""
    key = request.state.key
    service.allow(key)
    job = await _made(request, make, service, body, key)
    service.admit()  # once more: others may have come meanwhile
    return job


def _add_chat(app: FastAPI, service: Service) -> None:
    seconds, known = service.config.keep_alive_seconds, _known(service)

    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation; with stream as events. At /beta the same."""
        job = await _job(request, service, openai.chat_job, body)
        if body.stream:
            return await stream(request, openai.chat_events(service, body, job), service.endings, seconds)
        return await whole(request, openai.chat_answer(service, body, job), service.endings, seconds)

    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, or with suffix fill in its middle."""
        job = await _job(request, service, openai.completion_job, body)
        if body.stream:
            return await stream(request, openai.completion_events(service, body, job), service.endings, seconds)
        return await whole(request, openai.completion_answer(service, body, job), service.endings, seconds)

    for prefix in ("", "/v1", "/beta", "/beta/v1"):
        shown = prefix in ("/v1", "/beta")
        known.post(f"{prefix}/chat/completions", responses=ANSWER | ERRORS, response_model=None, include_in_schema=shown)(
            chat_completions
        )
        known.post(f"{prefix}/completions", responses=ANSWER | ERRORS, response_model=None, include_in_schema=shown)(completions)
    app.include_router(known)


def _add_anthropic(app: FastAPI, service: Service) -> None:
    seconds, known = service.config.keep_alive_seconds, _known(service)

    def error_event(error: APIError) -> bytes:
        return event(anthropic.error_body(error), "error")

    @known.post("/v1/messages", responses=ANSWER | ANTHROPIC_ERRORS, response_model=None)
    async def messages(request: Request, body: anthropic.MessagesRequest) -> Response:
        """Answer a conversation in Anthropic's words."""
        job = await _job(request, service, anthropic.job_of, body)
        if body.stream:
            events = anthropic.events(service, job)
            return await stream(request, events, service.endings, seconds, error_event, keep_alive=anthropic.PING)
        return await whole(request, anthropic.answer(service, job), service.endings, seconds, anthropic.error_body)

    @known.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS)
    async def count_tokens(request: Request, body: anthropic.CountRequest) -> dict[str, int]:
        """How many tokens a conversation has."""
        service.allow(request.state.key)
        return {"input_tokens": await _made(request, anthropic.count, service, body)}

    app.include_router(known)


def _add_ollama(app: FastAPI, service: Service) -> None:
    seconds, known = service.config.keep_alive_seconds, _known(service)

    async def answered(request: Request, job: openai.Job | openai.CompletionJob, streams: bool, chat: bool) -> Response:
        if not streams:
            return await whole(request, ollama.answer(service, job, chat), service.endings, seconds, ollama.error_body)
        lines = ollama.lines(service, job, chat)
        return await stream(
            request, lines, service.endings, seconds, lambda error: orjson.dumps(ollama.error_body(error)) + b"\n",
            media_type="application/x-ndjson", keep_alive=b" ", first_keep_alive=b" ",  # an empty line would be an answer
        )  # fmt: skip

    @known.post("/api/chat", responses=LINES | OLLAMA_ERRORS, response_model=None)
    async def chat(request: Request, body: ollama.OllamaChatRequest) -> Response:
        """Answer a conversation in Ollama's words."""
        if not body.messages:
            service.allow(request.state.key)
            service.thinking_of(ollama.own_name(body.model))
            return JSONResponse(ollama.loaded(body.model, chat=True))
        job = await _job(request, service, ollama.chat_of, body)
        return await answered(request, job, body.stream is not False, chat=True)

    @known.post("/api/generate", responses=LINES | OLLAMA_ERRORS, response_model=None)
    async def generate(request: Request, body: ollama.GenerateRequest) -> Response:
        """Answer a question, or with raw continue a text, in Ollama's words."""
        if not body.prompt:
            service.allow(request.state.key)
            service.thinking_of(ollama.own_name(body.model))
            return JSONResponse(ollama.loaded(body.model, chat=False))
        job = await _job(request, service, ollama.generate_of, body)
        return await answered(request, job, body.stream is not False, chat=False)

    @known.get("/api/tags", responses=OLLAMA_ERRORS)
    async def tags() -> dict[str, Any]:
        """The models, for Ollama's clients."""
        return ollama.tags(service)

    @known.post("/api/show", responses=OLLAMA_ERRORS)
    async def show(body: ollama.ShowRequest) -> dict[str, Any]:
        """What a model is, for Ollama's clients."""
        return ollama.show(service, ollama.own_name(body.model or body.name or ""))

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        """The version of Ollama's API that is spoken here."""
        return {"version": ollama.VERSION}

    app.include_router(known)


def _add_facts(app: FastAPI, service: Service) -> None:
    known = _known(service)

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "finback"}

    async def models() -> dict[str, Any]:
        """The names that the model is served under."""
        return {"object": "list", "data": [entry(name) for name in service.models]}

    async def one_model(model: str) -> dict[str, Any]:
        """One of them."""
        service.thinking_of(model)
        return entry(model)

    for prefix in ("", "/v1"):
        known.get(f"{prefix}/models", responses=ERRORS, include_in_schema=bool(prefix))(models)
        known.get(f"{prefix}/models/{{model}}", responses=ERRORS, include_in_schema=bool(prefix))(one_model)

    @known.get("/user/balance", responses=ERRORS)
    async def balance(request: Request) -> dict[str, Any]:
        """What is left on the key."""
        key: Key | None = request.state.key
        if key is None:
            return {"is_available": True, "balance_infos": []}
        info = {
            "currency": "CNY",
            "total_balance": yuan(key.balance),
            "granted_balance": yuan(key.granted),
            "topped_up_balance": yuan(key.topped_up),
        }
        return {"is_available": key.balance > 0, "balance_infos": [info]}

    @app.get("/finback/info")
    async def info() -> dict[str, Any]:
        """What the chat page asks first: model, context, prices."""
        prices = service.prices
        return {
            "model": service.name,
            "context": service.context,
            "models": service.models,
            "keys_required": service.store is not None,
            "prices": None
            if prices is None
            else {name: float(getattr(prices, name) / per_token(Decimal(1))) for name in ("hit", "miss", "output")},
            "off_peak": _off_peak(prices),
            "version": service.version,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server lives."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and histograms as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(known)


def _off_peak(prices: Prices | None) -> dict[str, Any] | None:
    """When the prices are lower: from a minute of the day in UTC up to another, by a share."""
    if prices is None or prices.off_peak_minutes is None:
        return None
    start, end = prices.off_peak_minutes
    return {"start": start, "end": end, "discount": float(prices.off_peak_discount)}


def _add_page(app: FastAPI) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _file("docs.html")

    @app.get("/static/{path:path}", include_in_schema=False)
    async def static(path: str) -> Response:
        return _file(path)


def _file(path: str) -> Response:
    file = FILES.get(path)  # what is asked for is compared, and never a path to be followed
    if file is None:
        raise APIError(404, f"there is no file {path[:100]}")
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    headers["Content-Security-Policy"] = "frame-ancestors 'none'"  # what the page's own policy cannot say
    return FileResponse(file, headers=headers)


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(request: Request, error: APIError) -> Response:
        response = error_response(request.url.path, error)
        service.metrics.error(response.status_code)
        return response

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return answer(request, error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            where = first["ctx"]["error"] if "ctx" in first else first["msg"]
            return answer(request, APIError(400, f"the body is not valid JSON: {where}"))
        place, words = told([{**each, "loc": each["loc"][1:]} for each in error.errors()], error.body)
        if first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type") and not place:
            return answer(request, APIError(400, "the body must be a JSON object, sent with Content-Type: application/json"))
        return answer(request, APIError(422, words, param=place or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        why = _why_no_json(error.__cause__)
        if why is not None:
            return answer(request, APIError(400, f"the body is not valid JSON: {why}"))
        status = error.status_code if error.status_code in TYPES else 400
        words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible at {request.url.path}"}
        return answer(request, APIError(status, words.get(status, str(error.detail)), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, APIError(500, "the server failed at this request; its log says why"))  # uvicorn logs the traceback


def _why_no_json(cause: BaseException | None) -> str | None:
    """What FastAPI found when it read the body, where it was no error in the grammar of JSON."""
    if isinstance(cause, RecursionError):
        return "it is nested too deeply; make it flatter"
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is no {cause.encoding} text ({cause.reason}); send UTF-8"
    if isinstance(cause, ValueError):  # of int()
        return "a number in it has too many digits; shorten it"
    return None
