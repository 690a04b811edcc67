"""The web page at /: one file, read once, and headers that let it run its own script and nothing else."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path


def _allowed(tag: str, html: str) -> str:
    """CSP's names for what stands in each element of this kind."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in inline)


_HTML = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_POLICY = {
    "default-src": "'none'",
    "script-src": _allowed("script", _HTML),
    "style-src": _allowed("style", _HTML),
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # innerHTML and the like throw
    "trusted-types": "'none'",
}

PAGE = _HTML.encode()
PAGE_HEADERS = {  # names as Exchange.reply takes them
    "content_security_policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x_content_type_options": "nosniff",
    "referrer_policy": "no-referrer",
    "cache_control": "no-cache",
}
