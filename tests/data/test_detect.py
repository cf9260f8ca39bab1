import pytest

from tunery.config import Columns, DataConfig
from tunery.data.detect import check_columns, detect
from tunery.errors import ConfigError


def config(**settings) -> DataConfig:
    return DataConfig(train="x.jsonl", **settings)


def row(*names: str) -> list[dict[str, str]]:
    return [dict.fromkeys(names, "x")]


@pytest.mark.parametrize(
    ("names", "kind", "columns"),
    [
        (["messages"], "chat", {"messages": "messages"}),
        (["messages", "tools"], "chat", {"messages": "messages", "tools": "tools"}),
        (["id", "conversations"], "chat", {"messages": "conversations"}),
        (["prompt", "prompt_id", "messages"], "chat", {"messages": "messages"}),
        (["prompt", "completion"], "completion", {"prompt": "prompt", "completion": "completion"}),
        (["prompt", "response"], "completion", {"prompt": "prompt", "completion": "response"}),
        (
            ["question", "answer", "context"],
            "completion",
            {"prompt": "question", "completion": "answer", "context": "context"},
        ),
        (["input", "output"], "completion", {"prompt": "input", "completion": "output"}),
        (
            ["instruction", "input", "output", "text"],
            "completion",
            {"prompt": "instruction", "input": "input", "completion": "output"},
        ),
        (["text", "label"], "classification", {"text": "text", "label": "label"}),
        (["Review", "Sentiment"], "classification", {"text": "Review", "label": "Sentiment"}),
        (["text", "label", "label_text"], "classification", {"text": "text", "label": "label"}),
        (["sentence", "class"], "classification", {"text": "sentence", "label": "class"}),
        (["text"], "text", {"text": "text"}),
        (["content", "url"], "text", {"text": "content"}),
    ],
)
def test_usual_names(names, kind, columns):
    shape = detect(row(*names), config())
    assert (shape.kind, shape.columns) == (kind, columns)
    assert f"Kind {kind}" in shape.notes[0]


def test_a_column_that_only_some_rows_have_is_found():
    assert detect([{"text": "a"}, {"text": "b", "label": "x"}], config()).kind == "classification"


def test_plain_text():
    assert detect(["once upon a time"], config()).kind == "text"
    with pytest.raises(ConfigError, match="plain text"):
        detect(["once upon a time"], config(kind="chat"))


@pytest.mark.parametrize(
    ("settings", "kind", "columns"),
    [
        ({"columns": Columns(text="a", label="b")}, "classification", {"text": "a", "label": "b"}),
        ({"columns": Columns(text="a"), "kind": "text"}, "text", {"text": "a"}),
        ({"columns": Columns(prompt="a", completion="b")}, "completion", {"prompt": "a", "completion": "b"}),
        ({"columns": Columns(messages="a")}, "chat", {"messages": "a", "completion": "completion"}),
    ],
)
def test_settings_win(settings, kind, columns):
    shape = detect(row("a", "b", "text", "label", "prompt", "completion"), config(**settings))
    assert (shape.kind, shape.columns) == (kind, columns)


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["text", "label", "prompt", "completion"], {}, "data.kind"),
        (["messages", "prompt", "completion"], {}, "data.kind"),
        (["a", "b"], {}, "cannot tell what the columns hold: a, b"),
        (["review", "sentence", "label"], {}, "data.columns.text"),
        (["text", "Label", "LABEL"], {}, "data.columns.label"),
        (["text"], {"kind": "classification"}, "data.columns.label: NAME"),
        (["text", "labels"], {"columns": Columns(text="text", label="label")}, "did you mean labels?"),
        (["text", "label"], {"columns": Columns(label="text", text="text")}, "two roles"),
        (["text", "label"], {"columns": Columns(label="label", chosen="text")}, "several kinds"),
        (["text", "label"], {"kind": "chat", "columns": Columns(text="text")}, "columns.text has no meaning"),
        (["text", "label"], {"kind": "text", "labels": ("a", "b")}, "labels has no meaning"),
        (["text"], {"kind": "text", "system": "Be kind."}, "system has no meaning"),
        (["messages"], {"kind": "chat", "instruction": "Sort."}, "instruction has no meaning"),
        (["messages", "prompt", "completion"], {}, "several kinds: chat, completion"),
        (["prompt", "chosen"], {"columns": Columns(chosen="chosen")}, "needs a column for the rejected"),
    ],
)
def test_doubt_is_an_error_that_names_the_setting(names, settings, words):
    with pytest.raises(ConfigError) as error:
        detect(row(*names), config(**settings))
    assert words in str(error.value)


def test_labels_mean_classification():
    assert detect(row("text", "label", "prompt", "completion"), config(labels=("x", "y"))).kind == "classification"


def test_a_further_file_must_have_the_columns():
    shape = detect(row("text", "label"), config())
    check_columns(shape, row("label", "text", "more"), "b.csv")
    with pytest.raises(ConfigError, match=r"b\.csv has no column 'text'") as error:
        check_columns(shape, row("texts", "label"), "b.csv")
    assert "did you mean texts?" in str(error.value)
    with pytest.raises(ConfigError, match="plain text"):
        check_columns(shape, ["plain"], "b.txt")
