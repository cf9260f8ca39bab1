"""Questions to a model: none asked twice, none lost, and what a server does not know left out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosted.conftest import Said
from tests.hosted.fake import MODEL, Failure, Fake
from tunery.config_hosted import HostedConfig
from tunery.errors import HostedError, ResumableError
from tunery.evaluation.answers import Answer, AnswerBook, Question
from tunery.hosted import client as client_module
from tunery.hosted.client import Service
from tunery.hosted.querying import Asker, ask_all


def film(number: int) -> Question:
    text = f"film {number} is {'fine' if number % 2 else 'dull'}"
    return Question(f"f:{number}", ({"role": "user", "content": text},), reference="good" if number % 2 else "bad")


FILMS = [film(number) for number in range(12)]
TUNED = "ft:gpt-4.1-mini:org::1"


def ask(
    service: Service,
    path: Path,
    questions: list[Question] = FILMS,
    parallel: int = 3,
    logprobs: bool = False,
    fresh: bool = False,
) -> list[Answer]:
    return ask_all(Asker(service, TUNED, 8, logprobs, fresh), AnswerBook(path), questions, parallel, service.note)


def test_answers_come_in_the_order_of_the_questions_and_are_kept(fake: Fake, service: Service, tmp_path: Path) -> None:
    answers = ask(service, tmp_path / "answers.jsonl")
    assert [answer.text for answer in answers] == [question.reference for question in FILMS]
    assert answers[0].usage == {"prompt_tokens": 10, "completion_tokens": 1}
    assert all(answer.seconds > 0 for answer in answers)
    assert all(request["temperature"] == 0 and request["max_tokens"] == 8 for request in fake.asked)
    assert ask(service, tmp_path / "answers.jsonl") == answers
    assert len(fake.asked) == len(FILMS)
    assert AnswerBook(tmp_path / "answers.jsonl").get("another model", FILMS[0], 8) is None
    assert AnswerBook(tmp_path / "answers.jsonl").get(TUNED, FILMS[0], 9) is None, "it might have been cut"


def test_a_question_that_stands_twice_is_asked_once(fake: Fake, service: Service, tmp_path: Path) -> None:
    answers = ask(service, tmp_path / "answers.jsonl", [film(1), film(2), film(1)])
    assert [answer.text for answer in answers] == ["good", "bad", "good"]
    assert len(fake.asked) == 2


def test_a_failure_of_the_first_question_asks_no_other(fake: Fake, service: Service, tmp_path: Path) -> None:
    fake.failures.append(Failure("POST", "/chat", status=429, code="insufficient_quota"))
    with pytest.raises(ResumableError, match="no credit left"):
        ask(service, tmp_path / "answers.jsonl")
    assert fake.count("POST /chat") == 1
    assert [answer.text for answer in ask(service, tmp_path / "answers.jsonl")] == [one.reference for one in FILMS]


def test_what_was_under_way_when_one_failed_is_kept(fake: Fake, service: Service, tmp_path: Path) -> None:
    ask(service, tmp_path / "answers.jsonl", FILMS[:1])
    before = fake.answer

    def answer(model: str, asked: str) -> str:
        if "film 5" in asked:
            fake.failures.append(Failure("POST", "/chat", times=1, status=429, code="insufficient_quota"))
        return before(model, asked)

    fake.answer = answer
    with pytest.raises(ResumableError):
        ask(service, tmp_path / "answers.jsonl")
    kept = len(FILMS) - len(AnswerBook(tmp_path / "answers.jsonl").missing(TUNED, FILMS, 8))
    assert kept == len(fake.asked), "everything that was answered"
    assert ask(service, tmp_path / "answers.jsonl")[5].text == "good"


def test_a_line_that_a_crash_cut_short_is_asked_again(fake: Fake, service: Service, tmp_path: Path) -> None:
    book = tmp_path / "answers.jsonl"
    ask(service, book, FILMS[:3])
    content = book.read_bytes()
    book.write_bytes(content[:-20])
    ask(service, book, FILMS[:3])
    assert len(fake.asked) == 4
    assert AnswerBook(book).missing(TUNED, FILMS[:3], 8) == []


def test_a_question_that_is_refused_does_not_stop_the_others(fake: Fake, service: Service, tmp_path: Path) -> None:
    forbidden = Question("f:x", ({"role": "user", "content": "something forbidden"},))
    answers = ask(service, tmp_path / "answers.jsonl", [FILMS[1], forbidden, FILMS[2]])
    assert [answer.is_text for answer in answers] == [True, False, True]
    assert answers[1].refused == "the question was refused"
    again = ask(service, tmp_path / "answers.jsonl", [FILMS[1], forbidden, FILMS[2]])
    assert [answer.is_text for answer in again] == [True, False, True]
    assert len(fake.asked) == 4, "the refused one again"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("billing_hard_limit_reached", ResumableError, r"no credit left \(400"),
        ("insufficient_quota", ResumableError, "no credit left"),
        ("invalid_request", HostedError, "refuses it"),
    ],
)
def test_what_is_no_fault_of_the_question_is_no_answer(
    fake: Fake, service: Service, tmp_path: Path, code: str, kind: type[Exception], words: str
) -> None:
    fake.failures.append(Failure("POST", "/chat", skip=1, status=400, code=code))
    with pytest.raises(kind, match=words):
        ask(service, tmp_path / "answers.jsonl", FILMS[:3], parallel=1)
    answers = ask(service, tmp_path / "answers.jsonl", FILMS[:3])
    assert [answer.text for answer in answers] == ["bad", "good", "bad"]
    assert len(fake.asked) == 3


def test_what_a_server_does_not_know_is_left_out(fake: Fake, service: Service, tmp_path: Path) -> None:
    fake.length_name, fake.knows_logprobs = "max_completion_tokens", False
    answers = ask(service, tmp_path / "answers.jsonl", FILMS[:3], logprobs=True)
    assert [answer.text for answer in answers] == ["bad", "good", "bad"]
    assert answers[0].logprobs is None
    assert fake.asked[-1]["max_completion_tokens"] == 8
    assert len(fake.asked) == 5, "found out once"


def test_log_probabilities_are_kept_where_they_are_given(fake: Fake, service: Service, tmp_path: Path) -> None:
    ask(service, tmp_path / "answers.jsonl", FILMS[:1], logprobs=True)
    (answer,) = ask(service, tmp_path / "answers.jsonl", FILMS[:1], logprobs=True)
    assert answer.logprobs == (("bad", -0.05),)


def test_an_answer_may_take_long_and_is_asked_for_twice_at_most(
    fake: Fake, notes: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(client_module, "LONG_TIMEOUT", 0.6)
    service, answer = Service(HostedConfig(), notes.append), fake.answer

    def slow(model: str, asked: str) -> str:
        time.sleep(seconds)
        return answer(model, asked)

    fake.answer, seconds = slow, 0.3
    assert ask(service, tmp_path / "answers.jsonl", FILMS[:1])[0].text == "bad"
    seconds = 0.9
    with pytest.raises(ResumableError, match="could not be reached"):
        ask(service, tmp_path / "answers.jsonl", FILMS[1:2])
    assert len(fake.asked) == 3, "one, and one twice"


def test_a_model_that_is_gone_is_told_and_a_fresh_one_waited_for(
    fake: Fake, service: Service, tmp_path: Path, pauses: list[float]
) -> None:
    fake.gone = (TUNED,)
    with pytest.raises(HostedError, match="does not exist"):
        ask(service, tmp_path / "answers.jsonl")
    assert pauses == []
    fake.gone = ()
    fake.failures.append(Failure("POST", "/chat", times=3, status=404, message="not yet"))
    assert ask(service, tmp_path / "answers.jsonl", FILMS[:1], fresh=True)[0].text == "bad"
    assert len(pauses) == 3
    assert MODEL in fake.models
