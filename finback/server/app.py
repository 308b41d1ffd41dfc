"""The FastAPI application: routes, limits and errors. What a route answers is written by its door."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from finback.server import openai
from finback.server.config import is_loopback
from finback.server.errors import TYPES, APIError
from finback.server.keys import nano, yuan
from finback.server.schemas import ChatRequest, CompletionRequest, ErrorBody, told
from finback.server.service import Service
from finback.server.wire import ClientGone, stream, whole

logger = logging.getLogger("finback.server")

STATIC = Path(__file__).parent / "static"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 402, 403, 404, 413, 422, 429, 500, 503)
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with stream its events", "content": {"application/json": {}, "text/event-stream": {}}},
    **ERRORS,
}


def create_app(service: Service) -> FastAPI:
    """The server over a service; the engine's thread runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.endings.finish()
        service.worker.stop()

    app = FastAPI(title="finback", version=service.version, lifespan=lifespan, redoc_url=None)
    _add_chat(app, service)
    _add_facts(app, service)
    _add_page(app)
    _add_errors(app, service)
    config = service.config
    if config.allow_origin:
        app.add_middleware(CORSMiddleware, allow_origins=list(config.allow_origin), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, config=config)
    return app


def _add_chat(app: FastAPI, service: Service) -> None:
    seconds = service.config.keep_alive_seconds

    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        key = service.authenticate(request.headers)
        job = openai.chat_job(service, body, key)
        if body.stream:
            return await stream(request, openai.chat_events(service, body, job), service.endings, seconds)
        return await whole(request, openai.chat_answer(service, body, job), service.endings, seconds)

    async def completions(request: Request, body: CompletionRequest) -> Response:
        key = service.authenticate(request.headers)
        job = openai.completion_job(service, body, key)
        if body.stream:
            return await stream(request, openai.completion_events(service, body, job), service.endings, seconds)
        return await whole(request, openai.completion_answer(service, body, job), service.endings, seconds)

    for prefix in ("", "/v1", "/beta", "/beta/v1"):
        shown = prefix in ("/v1", "/beta")
        app.post(f"{prefix}/chat/completions", responses=ANSWER, response_model=None, include_in_schema=shown)(chat_completions)
        app.post(f"{prefix}/completions", responses=ANSWER, response_model=None, include_in_schema=shown)(completions)


def _add_facts(app: FastAPI, service: Service) -> None:
    async def models(request: Request) -> dict[str, Any]:
        service.key_of(request.headers)
        entries = [{"id": name, "object": "model", "created": service.created, "owned_by": "finback"} for name in service.models]
        return {"object": "list", "data": entries}

    for prefix in ("", "/v1"):
        app.get(f"{prefix}/models", responses=ERRORS, include_in_schema=bool(prefix))(models)

    @app.get("/user/balance", responses=ERRORS)
    async def balance(request: Request) -> dict[str, Any]:
        key = service.key_of(request.headers)
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
        prices = service.prices
        return {
            "model": service.name,
            "context": service.context,
            "models": service.models,
            "keys_required": service.store is not None,
            "prices": None
            if prices is None
            else {n: float(getattr(prices, n)) / nano_per_yuan_million() for n in ("hit", "miss", "output")},
            "version": service.version,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def nano_per_yuan_million() -> int:
    """Nano-yuan per token of one yuan per million tokens."""
    from decimal import Decimal

    return nano(Decimal(1)) // 10**6


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @app.get("/static/{path:path}", include_in_schema=False)
    async def static(path: str) -> Response:
        return _file(path)


def _file(path: str) -> Response:
    file = (STATIC / path).resolve()
    if not file.is_relative_to(STATIC.resolve()) or not file.is_file():
        raise APIError(404, f"there is no file {path}")
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return FileResponse(file, headers=headers)


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(error: APIError) -> Response:
        service.metrics.error(error.status)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return answer(error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            where = first["ctx"]["error"] if "ctx" in first else first["msg"]
            return answer(APIError(400, f"the body is not valid JSON: {where}"))
        place, words = told(dict(first))
        if first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type") and not place:
            return answer(APIError(400, "the body must be a JSON object, sent with Content-Type: application/json"))
        return answer(APIError(422, words, param=place or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in TYPES else 400
        words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible at {request.url.path}"}
        return answer(APIError(status, words.get(status, str(error.detail)), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(APIError(500, "the server failed at this request; its log says why"))  # uvicorn logs the traceback


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Refuses bodies that are too large while they arrive, and, without keys, requests that do not name this machine: a web page that
    has its own name point here (DNS rebinding) names itself."""

    def __init__(self, app: Any, config: Any) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.config.keys is None and not is_loopback(_host_name(headers.get("host", ""))):
            await _refuse(
                send, APIError(403, "without keys this server answers only requests to localhost; start it with --keys FILE")
            )
            return
        limit, read = self.config.max_request_bytes, 0
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            await _refuse(send, _too_large(limit))
            return

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            before, read = read, read + len(message.get("body", b""))
            if read <= limit:
                return message
            if before <= limit:
                await _refuse(send, _too_large(limit))
            return {"type": "http.disconnect"}  # for the application the client is gone

        async def unless_refused(message: Message) -> None:
            if read <= limit:
                await send(message)

        await self.app(scope, counted, unless_refused)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the body is larger than {limit} bytes; shorten it", code="request_too_large")


def _host_name(host: str) -> str:
    """Without the port: [::1]:8000 -> ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


async def _refuse(send: Send, error: APIError) -> None:
    response = JSONResponse(error.body(), error.status)
    start = {"type": "http.response.start", "status": error.status, "headers": response.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body})
