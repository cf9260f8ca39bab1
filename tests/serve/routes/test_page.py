"""The page's files: what is served, as what, and under which policy."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request

from tunery.serve.routes.page import read_parts


def asked(**headers: str) -> Request:
    return Request(
        {"type": "http", "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}
    )


def test_only_files_of_the_page_are_parts(tmp_path: Path) -> None:
    for name in ("index.html", "app.js", "style.css", "icon.svg", "notes.md", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.js").mkdir()
    assert sorted(read_parts(tmp_path)) == ["app.js", "icon.svg", "index.html", "style.css"]
    assert read_parts(tmp_path / "nowhere") == {}


def test_types_policy_and_tags(tmp_path: Path) -> None:
    (tmp_path / "app.js").write_text("let a = 1;")
    part = read_parts(tmp_path)["app.js"]
    fresh = part.response(asked())
    assert (fresh.status_code, fresh.body) == (200, b"let a = 1;")
    assert fresh.headers["content-type"].startswith("text/javascript")
    assert fresh.headers["cache-control"] == "no-cache"
    assert "trusted-types 'none'" in fresh.headers["content-security-policy"]
    assert "unsafe" not in fresh.headers["content-security-policy"]
    assert part.response(asked(if_none_match=fresh.headers["etag"])).status_code == 304
    (tmp_path / "app.js").write_text("let a = 2;")
    changed = read_parts(tmp_path)["app.js"].response(asked(if_none_match=fresh.headers["etag"]))
    assert changed.body == b"let a = 2;"
