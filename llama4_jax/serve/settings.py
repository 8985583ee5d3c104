"""What a server is told, and what its clients may take."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them, may take."""

    body_bytes: int = 32 * 2**20  # of a request
    all_bodies_bytes: int = 256 * 2**20  # of those that are being read and prepared
    body_seconds: float = 60.0  # until a body has come
    header_seconds: float = 20.0  # until the headers of a request have come
    unread_tokens: int = 1024  # of a stream whose client reads too slowly
    send_seconds: float = 60.0  # that a client may read nothing at all
    connections: int = 2048


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    - model: the name that requests and replies call the model by
    - context: tokens of a prompt and its reply together
    - vocab_size: of the model
    - api_keys: one of which each request must have; none: anybody may ask
    - images_under: the folder that pictures may be read from; None: data: URLs alone
    - local: it listens to this machine alone, so no other name than this machine's can be right in a Host header
    - hosts: but these, by which a proxy leads to it
    """

    model: str
    context: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    images_under: Path | None = None
    local: bool = True
    hosts: tuple[str, ...] = ()
    limits: Limits = Limits()
