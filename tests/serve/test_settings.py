"""The settings of a server, and the command that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.test_cli import tunery
from tunery.cli import cli
from tunery.errors import ConfigError
from tunery.serve import server_settings as serve_settings
from tunery.serve.server_settings import make_settings, named, read_task_defaults
from tunery.versions import install_command


def test_bases_and_aliases_are_seen_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    found = make_settings(bases=("./base", str(tmp_path / "base"), "Owner/Name"), aliases={"gpt": "base"})
    assert found.bases == (str(tmp_path / "base"), "Owner/Name")
    assert found.aliases == {"gpt": str(tmp_path / "base")}


def test_where_things_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_HOME", str(tmp_path / "own"))
    assert make_settings(bases=("b",)).home == tmp_path / "own"
    monkeypatch.delenv("TUNERY_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert make_settings(bases=("b",)).home == tmp_path / "tunery"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bases": ()}, "bases"),
        ({"aliases": {"gpt": "other"}}, "--base other"),
        ({"port": 70000}, "port"),
        ({"engine": "localhost:8001"}, "http://127.0.0.1:8001"),
        ({"engine_kind": "sglang"}, "engine_kind"),
        ({"slots": 0}, "slots"),
    ],
)
def test_mistakes_are_one_error(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_settings(**{"bases": ("b",), **values})


def test_pairs() -> None:
    assert named(("a=b", " c = d=e "), "aliases") == {"a": "b", "c": "d=e"}
    for wrong in (("a",), ("=b",), ("a=",), ("a=b", "a=c")):
        with pytest.raises(ConfigError, match="aliases"):
            named(wrong, "aliases")


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_API_KEYS", " one, two ,,")
    assert serve_settings.keys_from_environment() == ("one", "two")
    monkeypatch.delenv("TUNERY_API_KEYS")
    assert serve_settings.keys_from_environment() == ()


def test_settings_for_all_jobs(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text("lora:\n  rank: 8\ntrain:\n  learning_rate: 1e-4\ndata:\n  max_length: 512\n")
    assert read_task_defaults(path) == {
        "lora": {"rank": 8},
        "train": {"learning_rate": 1e-4},
        "data": {"max_length": 512},
    }
    path.write_text("")
    assert read_task_defaults(path) == {}
    path.write_text("lora:\n  rnak: 8\n")
    with pytest.raises(ConfigError, match=r"jobs.yaml:2:lora.rnak.*did you mean lora.rank"):
        read_task_defaults(path)
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="seed cannot be set for all jobs"):
        read_task_defaults(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--base"]),
        (["--base", "b", "--alias", "gpt"], ["NAME=VALUE"]),
        (["--base", "b", "--alias", "gpt=c"], ["--base c"]),
        (["--base", "b", "--host", "0.0.0.0"], ["TUNERY_API_KEYS"]),
        (["--base", "b", "--task-defaults", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--base", "b", "--port", "99999"], ["99999"]),
        (["--base", "b", "--adaptor", "x=y"], ["--adapter"]),
        (["--base", "b", "--home", "/dev/null/x"], ["/dev/null/x", "--home"]),
    ],
)
def test_the_command_s_mistakes(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = tunery("serve", "--home", str(tmp_path / "home"), *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["serve", "--base", "b"])
    assert isinstance(result.exception, ConfigError)
    assert "uvicorn" in result.exception.message
    assert result.exception.hint == install_command("serve")
