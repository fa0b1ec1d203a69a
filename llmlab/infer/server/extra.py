"""The packages of the `serve` extra, and what to do where they are missing."""

from importlib.util import find_spec

PACKAGES = ("starlette", "uvicorn", "jinja2", "prometheus_client", "llguidance")


def require_serve() -> None:
    """Raises ValueError, with the way out, where a package that the server needs is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f"llmlab serve needs {', '.join(missing)}: pip install 'llmlab[serve]'")
