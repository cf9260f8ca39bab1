"""JSON as RFC 8259 has it: what Python's decoder lets pass is a fault, wherever the JSON stands."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

from tunery.data.example import ROW, Fault
from tunery.jsonl import JsonObject

_BROKEN_BYTE = re.compile("[\udc80-\udcff]")  # where a byte that is not UTF-8 ends up under errors="surrogateescape"
_HALF_PAIR = "half of a surrogate pair (\\ud8xx) stands alone", "write the character itself"


class StrictDecoder:
    """Decodes JSON and keeps what is wrong with the last value: repeated keys, NaN, numbers beyond all bounds, halves
    of surrogate pairs.

    Attributes:
        faults: of the value decoded last.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _object(self, pairs: list[tuple[str, object]]) -> JsonObject:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = sorted(key for key, count in counts.items() if count > 1)
            self.faults += [(key, "this key stands twice in one object", "keep one of them") for key in twice]
        return value

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self.faults.append((ROW, f"the number {digits[:40]} is too large", "write a smaller one, or a text"))
        return number

    def _constant(self, name: str) -> None:
        self.faults.append((ROW, f"{name} is not JSON", "write null, or a number"))

    def decode(self, text: str, at: int = 0) -> tuple[object, int]:
        """The value that starts at `at`, and where it ends. Raises ValueError, a json.JSONDecodeError if it can."""
        self.faults = []
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            raise ValueError("a number has too many digits") from None  # sys.set_int_max_str_digits
        if "\\ud" in text.lower() and not encodable(value):
            self.faults.append((ROW, *_HALF_PAIR))
        return value, end


def decode_text(text: str) -> tuple[object, list[Fault]]:
    """The value of a text of JSON, such as the arguments of a tool call, and what is wrong with it.

    Raises:
        ValueError: it is not JSON.
    """
    decoder = StrictDecoder()
    start = after_space(text, 0)
    value, end = decoder.decode(text, start)
    if after_space(text, end) != len(text):
        raise json.JSONDecodeError("more text after the end of the value", text, end)
    return value, decoder.faults


def encodable(value: object) -> bool:
    """Whether all texts in a value can be written as UTF-8: no half of a surrogate pair stands alone."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def undecodable(text: str) -> bool:
    """Whether a text of a file holds a byte that is not of the file's encoding."""
    return not text.isascii() and _BROKEN_BYTE.search(text) is not None


_SPACE = re.compile(r"[ \t\n\r]*")


def after_space(text: str, at: int) -> int:
    """The first place from `at` on that is not JSON's white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def json_fault(error: ValueError) -> tuple[str, str]:
    """(column, what JSON expects there)."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}", f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}"
    return ROW, f"invalid JSON: {error}"
