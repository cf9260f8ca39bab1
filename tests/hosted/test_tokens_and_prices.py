"""What a task would cost: tokens near those of the real vocabulary, and prices from a dated list."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest

from tunery.config_hosted import HostedConfig
from tunery.errors import ConfigError
from tunery.hosted.costs import Price, base_name, billed_tokens, dollars, load_prices
from tunery.openai_api.token_counter import LONGEST_ROW, TokenCounter

COUNTED = {
    "The film is a delight from start to finish, and its two leads have never been better.": 19,
    "Der Film ist von Anfang bis Ende ein Vergnügen, und die Hauptdarsteller waren nie besser.": 21,
    "Этот фильм радует от начала и до конца.": 10,
    "这部电影从头到尾都很精彩。": 11,
    "def add(first: int, second: int) -> int:\n    return first + second\n": 19,
    '{"name": "Ada", "born": 1815, "city": "London"}': 19,
}
"""Text → tokens in o200k_base, counted with the vocabulary itself."""


@pytest.mark.parametrize("text", COUNTED, ids=lambda text: text[:12])
def test_an_estimate_is_near_the_count(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    counter = TokenCounter("gpt-4.1-mini")
    assert not counter.exact
    assert counter.text(text) == pytest.approx(COUNTED[text], rel=0.3, abs=1)


def test_a_conversation_counts_its_marks_and_an_answer_can_be_cut() -> None:
    counter = TokenCounter("gpt-4o")
    message = {"role": "user", "content": "one two three"}
    assert counter.conversation([message, message]) == 2 * (4 + counter.text("one two three"))
    assert counter.prompt([message]) == counter.conversation([message]) + 3
    pair = {"input": {"messages": [message]}, "preferred_output": [message], "non_preferred_output": [message]}
    assert counter.row(pair) == 4 * counter.conversation([message])
    assert counter.first("one two three four", 2) == "one two"
    assert counter.first("one two", 5) == "one two"


def test_tiktoken_counts_once_its_vocabulary_is_there_and_is_never_made_to_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Encoding:
        def encode(self, text: str, disallowed_special: object) -> list[int]:
            return list(range(len(text)))

        def decode(self, ids: list[int]) -> str:
            return "x" * len(ids)

    def get_encoding(name: str) -> Encoding:
        asked.append(name)
        return Encoding()

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))  # type: ignore[arg-type]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert not TokenCounter("gpt-4.1").exact
    assert asked == []
    address = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
    for name in ("o200k_base", "cl100k_base"):
        (tmp_path / hashlib.sha1(address.format(name).encode()).hexdigest()).write_text("")
    counter = TokenCounter("gpt-4.1")
    assert counter.exact
    assert counter.text("abc") == 3
    assert counter.first("abcdef", 4) == "xxxx"
    TokenCounter("ft:gpt-3.5-turbo-0125:org::1")
    TokenCounter("gpt-4o-mini-2024-07-18")
    assert asked == ["o200k_base", "cl100k_base", "o200k_base"]
    assert not TokenCounter("Qwen/Qwen3-8B").exact, "its vocabulary is another one"
    assert TokenCounter("o4-mini").exact


# --------------------------------------------------------------------------- prices


@pytest.fixture(autouse=True)
def _no_list_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNERY_PRICES", raising=False)


def test_our_list_knows_the_models_by_any_of_their_names_and_says_when_it_was_checked() -> None:
    prices = load_prices(HostedConfig(), openais_own=True)
    assert "2026-" in prices.words
    assert "check them" in prices.words
    for name in ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", "ft:gpt-4.1-mini-2025-04-14:org::abc"):
        assert prices.of(name).of_training(2_000_000) == 10.0
    assert prices.of("gpt-4o-mini").of_training(1_000_000) == 3.0
    assert prices.of("gpt-4.1").of_answers(1_000_000, 100_000, tuned=True) == pytest.approx(4.2)
    assert prices.of("gpt-4.1-nano").of_answers(1000, 1000, tuned=True) is None
    assert prices.of("something-else") == Price()
    assert base_name("ft:gpt-4o:org:suffix:id") == "gpt-4o"


def test_another_server_has_no_prices_unless_a_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_prices(HostedConfig(), openais_own=False).of("gpt-4.1") == Price()
    (tmp_path / "own.toml").write_text('checked = 2026-01-02\n[models."my-model"]\ntraining = 2\n')
    own = load_prices(HostedConfig(prices=str(tmp_path / "own.toml")), openais_own=False)
    assert own.of("my-model").of_training(500_000) == 1.0
    assert "2026-01-02" in own.words
    monkeypatch.setenv("TUNERY_PRICES", str(tmp_path / "own.toml"))
    assert load_prices(HostedConfig(), openais_own=False).of("my-model").training == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not toml at all", "not valid TOML"),
        ("checked = 1", r"has no \[models.NAME\]"),
        ('[models."x"]\ntraning = 1', "holds more than prices"),
        ('[models."x"]\ntraining = "3"', "models.x.training is not a price"),
        ('[models."x"]\ntraining = -3', "models.x.training is not a price"),
    ],
)
def test_a_list_that_is_none_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "own.toml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_prices(HostedConfig(prices=str(tmp_path / "own.toml")), openais_own=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prices(HostedConfig(prices=str(tmp_path / "none.toml")), openais_own=True)


def test_small_amounts_are_not_rounded_to_nothing() -> None:
    assert [dollars(amount) for amount in (0, 0.0004, 0.25, 12.5, 1234.0)] == [
        "$0",
        "$0.0004",
        "$0.25",
        "$12.50",
        "$1,234.00",
    ]


def test_a_row_beyond_what_is_trained_is_counted_as_cut() -> None:
    assert billed_tokens([10, LONGEST_ROW + 5], 2) == 2 * (10 + LONGEST_ROW)
