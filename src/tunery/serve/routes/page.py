"""The page and what belongs to it: read once, at the start, and looked up by name. No request becomes a path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tunery.serve.api_errors import ApiError

WEB = Path(__file__).resolve().parent.parent / "web"

POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy of the page: nothing inline, nothing from elsewhere, no framing, no HTML made of text."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file, or "not modified" if the browser has it."""
        headers = {"content-security-policy": POLICY, "cache-control": "no-cache", "etag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def read_parts(folder: Path = WEB) -> dict[str, PageFile]:
    """The page's files by their names."""
    parts = {}
    for path in sorted(folder.glob("*")):
        if path.suffix in _TYPES and path.is_file():
            content = path.read_bytes()
            parts[path.name] = PageFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return parts


def page_router(parts: dict[str, PageFile]) -> APIRouter:
    """The routes of the page."""
    router = APIRouter()

    def part(request: Request, name: str) -> Response:
        if name not in parts:
            raise ApiError(404, "There is no such part of the page.", code="unknown_url")
        return parts[name].response(request)

    @router.get("/")
    def index(request: Request) -> Response:
        return part(request, "index.html")

    @router.get("/web/{name}")
    def file(request: Request, name: str) -> Response:
        return part(request, name)

    return router
