"""In front of everything: who may ask, and whether anything is still taken."""

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from llama4_jax.serve.answers import error_response
from llama4_jax.serve.metrics import Metrics
from llama4_jax.serve.protocol import ApiError
from llama4_jax.serve.settings import Settings
from llama4_jax.untrusted_json import shown


class Gate:
    """An application before which requests are looked at.

    - draining: new requests get 503
    - active: requests that are being answered
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = ("localhost", "127.0.0.1", "[::1]", *map(str.lower, settings.hosts))
        self.draining = False
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this answers HTTP alone, and not {scope['type']}")
        try:
            self._check(scope)
        except ApiError as error:
            self._metrics.answered("refused", error.status)
            await error_response(error)(scope, receive, send)
            return
        self.active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.active -= 1

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._settings.local and _without_port(host) not in self._hosts:
            raise ApiError(
                403,
                f"this server is for this machine, as localhost, and not as {shown(host)}: --allow-host adds a name.",
                code="wrong_host",
            )
        if b"transfer-encoding" in headers and b"content-length" in headers:  # a proxy may read the other of them
            raise ApiError(
                400, "a request has either Content-Length or Transfer-Encoding.", headers={"Connection": "close"}
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from pages of other sites are refused.", code="wrong_origin")
        open_to_all = scope["path"] in ("/", "/health", "/ready")
        if self._keys and not open_to_all:
            kind, _, key = headers.get(b"authorization", "").partition(" ")
            given = _digest(key.strip() if kind.lower() == "bearer" else "")
            # All are compared, and in constant time: how long it takes tells nothing.
            if not sum(hmac.compare_digest(given, known) for known in self._keys):
                raise ApiError(
                    401,
                    "a key is needed that this server knows: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.draining and scope["method"] == "POST":
            raise is_draining()


def is_draining() -> ApiError:
    return ApiError(
        503, "the server is going down.", code="draining", headers={"Retry-After": "5", "Connection": "close"}
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
