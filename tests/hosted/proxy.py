"""Failures in front of a real server: requests are passed on to it, unless one of them befalls them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlencode

from tests.hosted.fake import Handler


class Passing(Handler):
    """Passes requests on to `target`, the address of an API."""

    target: str

    def _answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        address = f"{self.target}{path}?{urlencode(query, doseq=True)}"
        headers = {"Content-Type": self.headers["Content-Type"]} if body else {}
        request = urllib.request.Request(address, body or None, headers, method=method)
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.status, _content(reply)
        except urllib.error.HTTPError as error:
            return error.code, _content(error)


def _content(reply: Any) -> Any:
    content = reply.read()
    return json.loads(content) if "json" in reply.headers.get("Content-Type", "") else content
