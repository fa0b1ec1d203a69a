"""What a server is told, and what it allows."""

from dataclasses import dataclass, field

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Name, address and limits of a server."""

    name: str
    """What clients call the model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all networks of the machine."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as bearer token; None lets everyone in who reaches the port."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host header may have besides loopback's, while the server listens on loopback alone."""
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins (https://example.org) may call the server from a browser; none by default."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Larger bodies are refused."""
    max_prompt_tokens: int | None = None
    """Longer prompts are refused; None for as long as the model takes."""
    max_new_tokens: int | None = None
    """Requests for more new tokens are refused; None for as many as the model has positions."""
    max_samples: int = 128
    """Prompts times samples of one request."""
    max_concurrent: int = 512
    """Requests that are answered at one time; more are told to come back."""
    max_seconds: float = 600.0
    """Time for one request, from its first byte to its last."""
    body_seconds: float = 30.0
    """Time for a request's body to arrive."""
    grace_seconds: float = 30.0
    """On SIGTERM, time for the requests under way to finish."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_samples", "max_concurrent", "max_seconds", "body_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; leave it out for the model's own limit")
        if self.grace_seconds < 0:
            raise ValueError(f"grace_seconds={self.grace_seconds} is negative; 0 stops at once")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port} is not in 0 ... 65535; 0 takes any free one")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("the API key is empty, or has spaces around it or characters that headers cannot carry")

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK
