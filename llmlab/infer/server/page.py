"""The chat page: one HTML file that needs nothing else, and the policy that keeps it so."""

import base64
import hashlib
import re
from importlib.resources import files


def chat_page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: its own script and style by their hashes, its own server, no more."""
    page = files("llmlab.infer.server").joinpath("page.html").read_text(encoding="utf-8")
    (script,), (style,) = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
