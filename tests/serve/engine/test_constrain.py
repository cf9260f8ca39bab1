"""Answers held to a form by a grammar, whatever the model would rather say."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from tests.serve.engine.templates import FORMS
from tests.tiny import tiny_tokenizer
from tunery.data.render import Renderer
from tunery.serve.api_errors import ApiError
from tunery.serve.engine.constrain import Grammars, Matcher, json_grammar
from tunery.serve.engine.tools import call_grammar, find_form, read_calls

pytest.importorskip("llguidance")

TOKENIZER = tiny_tokenizer()
SIZE = len(TOKENIZER) + 5  # a model may have more rows than the tokenizer has tokens
END = 2
GRAMMARS = Grammars(TOKENIZER, SIZE, [END])


def text_of(tokens: list[int]) -> str:
    text = TOKENIZER.decode(tokens)
    assert isinstance(text, str)
    return text


def random_answer(matcher: Matcher, seed: int, most: int = 2000) -> tuple[str, bool]:
    """An answer of random allowed tokens, prone to end its texts: (text, whether it is complete)."""
    rng, tokens = random.Random(seed), []
    for _ in range(most):
        allowed = matcher.allowed().nonzero().flatten().tolist()
        names = TOKENIZER.convert_ids_to_tokens(allowed)
        ends = [token for token, name in zip(allowed, names, strict=True) if name.startswith('"')]
        token = rng.choice(ends if ends and rng.random() < 0.4 else allowed)
        if token == END:
            return text_of(tokens), True
        matcher.accept(token)
        tokens.append(token)
        if matcher.done:
            return text_of(tokens), True
    return text_of(tokens), False


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum"] + (["object", "array"] * 2 if depth < 3 else [])
    kind = rng.choice(kinds)
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 3, None, True, 'a "b"'], 3)}
    if kind == "object":
        names = rng.sample(["a", "bc", "d e", "ü"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(0, 3)}
    return {"type": kind, **({"maxLength": 12} if kind == "string" else {})}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value has the form of a schema of `random_schema`."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return isinstance(value, dict) and set(value) == set(inner) and all(valid(value[k], inner[k]) for k in inner)
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(valid(each, schema["items"]) for each in value)
        )
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, types[kind])


@pytest.mark.parametrize("seed", range(25))
def test_a_schema_is_always_kept_to(seed: int) -> None:
    schema = random_schema(random.Random(seed))
    matcher = GRAMMARS.matcher(json_grammar(schema, strict=True), "response_format")
    text, complete = random_answer(matcher, seed)
    assert complete
    assert valid(json.loads(text), schema)


def test_any_object_is_an_object() -> None:
    complete = 0
    for seed in range(12):
        text, ended = random_answer(GRAMMARS.matcher(json_grammar(None, False), "response_format"), seed, 400)
        complete += ended
        if ended:
            assert isinstance(json.loads(text), dict)
    assert complete > 3


def test_blanks_cannot_go_on_for_ever() -> None:
    matcher = GRAMMARS.matcher(json_grammar({"type": "object"}, False), "response_format")
    blank = TOKENIZER.convert_tokens_to_ids("Ġ")
    assert isinstance(blank, int)
    matcher.accept(TOKENIZER.convert_tokens_to_ids("{"))  # type: ignore[arg-type]
    count = 0
    while matcher.allowed()[blank]:
        matcher.accept(blank)
        count += 1
        assert count < 100
    assert count > 0


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 4}, False),
        ({"type": "nonsense"}, False),
        ({"type": "string", "pattern": "(unclosed"}, True),
        ({"$ref": "#/$defs/missing"}, True),
        ({"type": "object", "unevaluatedProperties": False, "not": {"type": "object"}}, True),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: dict[str, Any], strict: bool) -> None:
    with pytest.raises(ApiError) as caught:
        GRAMMARS.matcher(json_grammar(schema, strict), "response_format")
    assert (caught.value.status, caught.value.param) == (400, "response_format")


def test_the_mask_covers_the_models_rows_beyond_the_tokenizer() -> None:
    allowed = GRAMMARS.matcher(json_grammar(None, False), "response_format").allowed()
    assert allowed.shape == (SIZE,)
    assert not allowed[len(TOKENIZER) :].any()
    assert allowed.dtype is torch.bool


def test_copies_go_their_own_ways() -> None:
    one = GRAMMARS.matcher(json_grammar({"enum": ["ab", "cd"]}, True), "response_format")
    one.accept(TOKENIZER.convert_tokens_to_ids('"'))  # type: ignore[arg-type]
    two = one.copy()
    one.accept(TOKENIZER.convert_tokens_to_ids("a"))  # type: ignore[arg-type]
    assert two.allowed()[TOKENIZER.convert_tokens_to_ids("c")]
    assert not one.allowed()[TOKENIZER.convert_tokens_to_ids("c")]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["Oslo", "Ås"]}},
            },
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("family", FORMS)
def test_forced_calls_are_calls_in_the_templates_form(family: str, parallel: bool) -> None:
    form = find_form(Renderer(tiny_tokenizer(FORMS[family])))
    grammar = call_grammar(form, TOOLS[:1], TOKENIZER, parallel)
    several = 0
    for seed in range(16):
        text, complete = random_answer(GRAMMARS.matcher(grammar, "tools"), seed)
        assert complete
        calls = read_calls(text, form, frozenset(["weather"]))
        assert calls
        several += len(calls) > 1
        for call in calls:
            assert call.name == "weather"
            value = json.loads(call.arguments)
            assert set(value) == {"city", "days"}
            assert value["city"] in ("Oslo", "Ås")
    assert (several > 0) == (parallel and form.joint is not None)


def test_any_of_the_tools_can_be_called() -> None:
    form = find_form(Renderer(tiny_tokenizer(FORMS["hermes"])))
    grammar = call_grammar(form, TOOLS, TOKENIZER, False)
    names = set()
    for seed in range(20):
        text, complete = random_answer(GRAMMARS.matcher(grammar, "tools"), seed, 400)
        if complete:
            names |= {call.name for call in read_calls(text, form, frozenset(["weather", "stop"]))}
    assert names == {"weather", "stop"}


def test_control_tokens_of_the_form_are_forced_as_tokens() -> None:
    template = FORMS["hermes"].replace("<tool_call>", "<|im_start|>")
    form = find_form(Renderer(tiny_tokenizer(template)))
    assert "<|im_start|>" in form.opening
    matcher = GRAMMARS.matcher(call_grammar(form, TOOLS, TOKENIZER, False), "tools")
    assert matcher.allowed().nonzero().flatten().tolist() == [1]
