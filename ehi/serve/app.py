"""The paths of the service, their status codes, and who may ask."""

import asyncio
import contextlib
import hmac
import logging
import time
from base64 import b64encode
from hashlib import sha256
from importlib import resources

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ehi.serve.batches import Batcher
from ehi.serve.counters import CONTENT_TYPE, Counters
from ehi.serve.limits import Limits, is_local
from ehi.serve.reader import Question, Reader
from ehi.serve.schema import (
    UNSET,
    Answer,
    Error,
    Health,
    openapi,
    sentence,
)

logger = logging.getLogger("ehi.serve")
_OPEN = ("/", "/health", "/openapi.json")  # they need no token and show no document
_WHOLE = ("beam", "rerank", "allow", "deny")
_SETTINGS = (*_WHOLE, "min_prob", "where")
_MOST_MEMBERS = 1000  # documents of a leaf that one request may ask for


def make_app(
    reader: Reader,
    limits: Limits,
    *,
    token: str | None = None,
    local_only: bool = False,
    refresh_seconds: float = 1.0,
    workers: int = 1,
) -> Starlette:
    """The service as an ASGI application.

    Args:
        reader: of the index.
        limits: of requests.
        token: what `Authorization: Bearer ...` must say, or None to let all ask.
        local_only: answer only requests for names of this machine, so that no web page
            can ask through a name of its own that leads here.
        refresh_seconds: time between two looks for a new manifest.
        workers: searches at the same time.
    """
    service = Service(reader, limits, token, refresh_seconds, workers)
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/search", service.search, methods=["POST"]),
            Route("/leaves/{leaf}", service.leaf),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            Route("/openapi.json", service.openapi),
        ],
        exception_handlers={HTTPException: _refused, Exception: _failed},
        lifespan=service.lifespan,
    )
    app.add_middleware(
        Guard, token=token, local_only=local_only, counters=service.counters
    )
    return app


class Service:
    """What the paths answer: see `make_app`."""

    def __init__(self, reader, limits, token, refresh_seconds, workers):
        self.reader, self.limits, self.token = reader, limits, token
        self.refresh_seconds = refresh_seconds
        self.counters = Counters()
        self.waiting = 0
        self.batcher = Batcher(
            self._answer, most=limits.batch_queries, seconds=limits.batch_seconds,
            workers=workers,
        )  # fmt: skip
        self.html, self.page_headers = _page()
        self._show_state()

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        """Follows the folder while the service runs."""
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            self.batcher.close()

    async def search(self, request: Request) -> Response:
        """The best documents for texts or vectors."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise HTTPException(
                415, "send JSON, with the header Content-Type: application/json"
            )
        body = await self._body(request)
        with self._place():
            state = self.reader.state
            asked = _decoded(state, body)
            words, queries = asked.asked()
            if words and state.encoder is None:
                raise HTTPException(409, state.why_not)
            if not words:
                queries = [np.array(query, np.float32) for query in queries]
            question = Question(
                state,
                words,
                int(asked.k),
                _settings(asked),
                asked.documents,
                asked.paths,
            )
            try:
                results = await self.batcher.ask(question, queries)
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
        return _json(Answer(results, state.index.num_documents, state.generation))

    async def leaf(self, request: Request) -> Response:
        """The documents in a leaf."""
        state, name = self.reader.state, request.path_params["leaf"]
        number = _whole(name)
        if number is None or number >= state.index.num_leaves:
            raise HTTPException(
                404, f"there is no leaf {name!r}: they are numbered from 0 to "
                f"{state.index.num_leaves - 1}",
            )  # fmt: skip
        given = request.query_params.get("limit", "20")
        limit = _whole(given)
        if limit is None or not 1 <= limit <= _MOST_MEMBERS:
            raise HTTPException(
                422, f"limit is a whole number from 1 to {_MOST_MEMBERS}, got {given!r}"
            )
        with self._place():
            found = await asyncio.to_thread(self.reader.leaf, number, limit)
        return _json(found)

    async def health(self, request: Request) -> Response:
        """What is served."""
        state = self.reader.state
        index, status = state.index, "stale" if self.reader.error else "ok"
        return _json(
            Health(
                status, index.num_documents, index.num_leaves, index.width,
                state.encoder is not None, state.generation, index.fields or UNSET,
            )
        )  # fmt: skip

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self.counters.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """The description of all this."""
        state = self.reader.state
        described = openapi(
            state.decoder.type, state.index.num_leaves, _MOST_MEMBERS, bool(self.token)
        )
        return _json(described)

    async def page(self, request: Request) -> Response:
        """The search page."""
        return Response(self.html, headers=self.page_headers)

    async def _body(self, request):
        """The body of a request, if it is small and arrives in time."""
        most, seconds = self.limits.body_bytes, self.limits.body_seconds
        large = HTTPException(413, f"a body has at most {most:,} bytes")
        if (_whole(request.headers.get("content-length", "0")) or 0) > most:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise large
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not arrive within {seconds:g} seconds"
            ) from None
        return bytes(body)

    @contextlib.contextmanager
    def _place(self):
        """A place among the requests that wait for the index."""
        if self.waiting >= self.limits.waiting:
            raise HTTPException(
                503, f"{self.waiting} requests are waiting already: try again soon",
                {"retry-after": "1"},
            )  # fmt: skip
        self.waiting += 1
        self.counters.waiting.inc()
        try:
            yield
        finally:
            self.waiting -= 1
            self.counters.waiting.dec()

    def _answer(self, question, queries):
        with self.counters.search_seconds.time():
            results = self.reader.answer(question, queries)
        self.counters.batches.observe(len(queries))
        return results

    async def _follow(self):
        while True:
            await asyncio.sleep(self.refresh_seconds)
            error = self.reader.error
            if await asyncio.to_thread(self.reader.refresh):
                self.counters.refreshes.inc()
            if self.reader.error and self.reader.error != error:
                logger.warning("the index stays as it was: %s", self.reader.error)
            self._show_state()

    def _show_state(self):
        state = self.reader.state
        self.counters.documents.set(state.index.num_documents)
        self.counters.generation.set(state.generation)
        self.counters.stale.set(bool(self.reader.error))


class Guard:
    """Refuses who may not ask, counts requests and times them.

    Args:
        app: what answers the others.
        token, local_only: as of `make_app`.
        counters: the Counters.
    """

    def __init__(self, app, *, token, local_only, counters):
        self.app, self.counters = app, counters
        self.expected = token and token.encode()
        self.local_only = local_only

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # the client went away

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-content-type-options", b"nosniff")
                ]  # fmt: skip
            await send(message)

        path = _known(scope["path"])
        app = self._refusal(path, scope) or self.app
        try:
            await app(scope, receive, counted)
        except ClientDisconnect:
            pass
        except Exception:
            status = 500
            raise
        finally:
            self.counters.requests.labels(path, status).inc()
            seconds = time.perf_counter() - started
            self.counters.seconds.labels(path).observe(seconds)

    def _refusal(self, path, scope):
        """The answer to one who may not ask, else None."""
        headers = dict(scope["headers"])
        if self.local_only:
            host = headers.get(b"host", b"localhost").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_local(name.strip("[]")):
                return _error(421, f"{host} is not a name of this machine")
        if self.expected and path not in _OPEN:
            given = headers.get(b"authorization", b"")
            scheme, _, secret = given.partition(b" ")
            same = hmac.compare_digest(secret, self.expected)
            if not same or scheme.lower() != b"bearer":
                words = "send the header Authorization: Bearer TOKEN"
                words = words if not given else "the token is wrong"
                return _error(401, words, {"www-authenticate": "Bearer"})
        return None


def _known(path):
    """A path as metrics name it: clients must not make names up."""
    if path.startswith("/leaves/"):
        return "/leaves"
    return path if path in (*_OPEN, "/search", "/metrics") else "other"


def _decoded(state, body):
    """The request in a body.

    Raises:
        HTTPException: 400 for what is not JSON, 422 for what does not fit.
    """
    try:
        return state.decoder.decode(body)
    except msgspec.ValidationError as error:
        words = sentence(error, state.decoder.type, state.index.width)
        raise HTTPException(422, words) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def _settings(asked):
    """The arguments of `Index.search` that a request gives."""
    found = {name: getattr(asked, name, UNSET) for name in _SETTINGS}
    found |= {name: _whole_numbers(found[name]) for name in _WHOLE}
    if found["rerank"]:  # UNSET is false
        found["rerank"] = max(found["rerank"], int(asked.k))
    return tuple((name, x) for name, x in found.items() if x is not UNSET)


def _whole_numbers(value):
    """A number, or ids, without floats."""
    if value is UNSET or isinstance(value, str):
        return value
    if isinstance(value, list):
        return tuple(map(_whole_numbers, value))
    return int(value)


def _whole(text):
    """A whole number of a few digits, else None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _json(value, status=200, headers=None):
    return Response(
        msgspec.json.encode(value), status, headers, media_type="application/json"
    )


def _error(status, words, headers=None):
    return _json(Error(words), status, headers)


async def _refused(request, error):
    words = error.detail
    if error.status_code == 404 and words == "Not Found":
        words = f"there is no {request.url.path}: see /openapi.json"
    if error.status_code == 405:
        words = f"{request.url.path} does not answer {request.method}"
    return _error(error.status_code, words, error.headers)


async def _failed(request, error):
    return _error(500, "the service made a mistake, which its log describes")


def _page():
    """The search page, and headers by which it can load nothing else."""
    html = (resources.files("ehi.serve") / "page.html").read_text(encoding="utf-8")
    allowed = [
        "default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    ]  # fmt: skip
    for kind in ("script", "style"):
        inside = html.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        allowed.append(f"{kind}-src 'sha256-{digest}'")
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(allowed),
        "referrer-policy": "no-referrer",
    }
    return html, headers
