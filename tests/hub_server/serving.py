"""The server: a Hub over HTTP, and what may go wrong on the way."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api import Api
from .hub import Hub
from .repo import HubError


@dataclass
class Fault:
    """Something to go wrong with requests that match.

    Args:
        method (`str`): Regular expression that the whole method matches.
        path (`str`): Regular expression found somewhere in the path as sent (quoted, without a query).
        status (`int`, *optional*): Status to answer with.
        cut (`bool`): Drop the connection instead: once some of the body is read, before any answer.
        delay (`float`): Seconds to wait first.
        apply (`bool`): Carry the request out, and only then answer with `status` or drop the connection.
        before (`Callable`, *optional*): Called just before the request is handled. It may itself use the server.
        times (`int`): How many requests it strikes.
        skip (`int`): How many matching requests it lets pass first.
        headers (`dict[str, str]`): Sent along with `status`, for example `Retry-After`.
    """

    method: str
    path: str
    status: int | None = None
    cut: bool = False
    delay: float = 0.0
    apply: bool = False
    before: Callable[[], object] | None = None
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


class _Protocol(H11Protocol):
    """Lets the application see the connection, so that it can cut it."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


def application(hub: Hub) -> Callable:
    """The ASGI application that serves a hub, faults and all."""

    async def refuse(request: Request, error: HubError) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    async def discard(message: dict) -> None:
        pass

    handle = Starlette(routes=Api(hub).routes(), exception_handlers={HubError: refuse})

    async def serve_request(scope, receive, send) -> None:
        method, path = scope["method"], scope["raw_path"].decode()
        hub.log.append((method, path, {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}))
        if old := next((old for old in hub.renamed if f"/{old}" in path), None):
            url = str(Request(scope).url).replace(f"/{old}", f"/{hub.renamed[old]}", 1)
            return await RedirectResponse(url, 307)(scope, receive, send)
        scope["path"] = path  # as sent: otherwise a quoted slash would separate parts
        fault = next((fault for fault in hub.faults if fault.strikes(method, path)), None)
        if fault is not None:
            await asyncio.sleep(fault.delay)
        if fault is not None and fault.before is not None:
            await run_in_threadpool(fault.before)
        if fault is None or (fault.status is None and not fault.cut):
            return await handle(scope, receive, send)
        if fault.apply:
            await handle(scope, receive, discard)
        elif fault.cut:
            await receive()  # some of the body
        else:
            await Request(scope, receive).body()  # a client that still sends might miss the answer
        if not fault.cut:
            message = "This went wrong on purpose"
            headers = {"X-Error-Message": message, **fault.headers}
            return await JSONResponse({"error": message}, fault.status, headers)(scope, receive, send)
        scope["state"]["transport"].abort()
        while (await receive())["type"] != "http.disconnect":
            pass

    return serve_request


@contextmanager
def serve(hub: Hub | None = None, port: int = 0) -> Iterator[Hub]:
    """Serves a hub on 127.0.0.1, in a thread.

    Args:
        hub (`Hub`, *optional*): Hub to serve, a new one by default.
        port (`int`): Port; 0 takes any that is free.

    Yields:
        `Hub`: The hub, with its `url`.
    """
    hub = hub or Hub()
    options = {"http": _Protocol, "ws": "none", "lifespan": "off", "log_config": None, "timeout_graceful_shutdown": 1}
    options["timeout_keep_alive"] = 600  # a client that is slow may use a connection just when it is closed
    server = uvicorn.Server(uvicorn.Config(application(hub), **options))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # asyncio sends at once only if it sees the protocol
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join(timeout=10)
