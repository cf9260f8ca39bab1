"""GGUF files (llama.cpp's format): converted once to a dense float32 model in the cache.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers unpacks the quantised blocks;
that takes about 12 s for 135M parameters, and the tokenizer 4 s, so the result is kept under the file's hash.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import ModelError, TuneryError
from tunery.jsonl import JsonObject
from tunery.models.hashes import cached_sha256
from tunery.models.hf_logging import first_line, quiet
from tunery.models.portable import save_tokenizer
from tunery.paths import cache_dir, file_sha256, read_json, write_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NOTE = "conversion.json"
"""Written last into a cache entry: where it came from, and the hash of each of its files."""

FORM = 4
"""Of the cache's entries; another number where the same file would now be converted in another way."""

DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Tokenizers of GGUF files (tokenizer.ggml.pre) that cut every digit off before they cut text as GPT-2 does."""

_MAGIC = b"GGUF"
_TRIED = (
    "Hello, world!",
    "  two spaces,\ttabs\nand lines\n\n",
    "Żółć 你好 🙂 12345.6",
    "a list:\n\n1. one  2. two",
    "<|im_start|>user\nhi<|im_end|>\n",
)
"""Texts that must give the same tokens before and after the conversion."""


@dataclass(frozen=True)
class Converted:
    """A GGUF file's model in transformers' format.

    Attributes:
        folder: that holds it.
        license: as the file states it.
        file_type: of most of the file's weights, as llama.cpp calls it ("Q4_1"); None if it does not say.
    """

    folder: Path
    license: str | None
    file_type: str | None


def convert(file: Path) -> Converted:
    """A GGUF file's model in transformers' format.

    Its folder is made on the first call, whole or not at all, by one process at a time; a damaged one is made again.

    Raises:
        ModelError: it is no GGUF file, a part of one, or of a kind that transformers cannot read.
    """
    _check_file(file)
    from filelock import FileLock

    digest = cached_sha256(file)
    entry = cache_dir() / "gguf" / f"{digest}-{FORM}"
    if (note := _sound(entry)) is None:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(entry.with_suffix(".lock")).acquire()
        except OSError as error:
            hint = "set TUNERY_CACHE to a folder with room for it"
            raise ModelError(f"{entry.parent} cannot be written: {error}", hint) from error
        with held:
            if (note := _sound(entry)) is None:  # another process may have made it while we waited
                _sweep(entry)
                sys.stderr.write(f"converting {file.name} once (about 20 s for 100 MB) …\n")
                write_folder(entry, lambda folder: _fill(folder, file, digest))
                note = _sound(entry)
    if note is None:
        raise ModelError(f"the converted copy of {file.name} cannot be read back from {entry}", "check that disk")
    return Converted(entry, note.get("license"), note.get("file_type"))


def _check_file(file: Path) -> None:
    try:
        with open(file, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "check its permissions") from error
    if magic != _MAGIC:
        raise ModelError(f"{file} is not a GGUF file (it does not begin with {_MAGIC.decode()})", "download it again")
    if (part := re.search(r"-\d{5}-of-(\d{5})", file.name)) and int(part[1]) > 1:
        raise ModelError(f"{file} is one part of several", "join them with llama.cpp's `llama-gguf-split --merge`")


def _sound(entry: Path) -> JsonObject | None:
    """What the note of a cache entry says, if every file is as it was written; else None."""
    try:
        note = read_json(entry / NOTE)
        intact = all(cached_sha256(entry / name) == digest for name, digest in note["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return note if intact else None


def _sweep(entry: Path) -> None:
    """Remove what killed conversions of this file left. Called under the lock."""
    for leftover in entry.parent.glob(f".{entry.name}.*-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fill(folder: Path, file: Path, digest: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(stderr=True):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
            _cut_digits(tokenizer, _text(file, "tokenizer.ggml.pre"))
            _end_as_the_file_says(tokenizer, file)
            tokenizer.clean_up_tokenization_spaces = False  # transformers 5.17 sets it, ignores it and warns of it
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **place
            )
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
            again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (TuneryError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # transformers' way to say that a file is not readable
            raise _unreadable(file, error) from error
        raise
    except Exception as error:  # whatever a foreign file makes the readers raise
        raise _unreadable(file, error) from error
    if _behaviour(tokenizer) != _behaviour(again):
        raise ModelError(
            f"the tokenizer of {file.name} changed while it was converted, so it is not used",
            "use the model's safetensors release from the hub instead",
        )
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    write_json(
        folder / NOTE,
        {
            "source": str(file),
            "sha256": digest,
            "license": _text(file, "general.license"),
            "file_type": _file_type(file),
            "files": files,
        },
    )


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} cannot be converted: {first_line(error)}",
        "use the model's safetensors release from the hub instead",
    )


def _behaviour(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    """What must survive the conversion: tokens of some texts, control tokens, chat template."""
    ids = [(tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _TRIED]
    return ids, len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template


def _cut_digits(tokenizer: PreTrainedTokenizerFast, cut: str | None) -> None:
    """Cut digits off as the file says; transformers, which makes the tokenizer from the file, leaves that out.

    "…:\\n\\n1" is then two line breaks in one token and a digit, as the model learnt it and llama.cpp reads it, and not
    two single line breaks and a digit.
    """
    if cut not in DIGITS_APART:
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _end_as_the_file_says(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Take the end-of-text token that the file names; transformers 5.17 takes the one that begins a text."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("tokenizer.ggml.eos_token_id")
    if field is not None and (number := int(field.parts[field.data[0]][0])) != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)


def _file_type(file: Path) -> str | None:
    """`general.file_type` by its name in llama.cpp, without the "MOSTLY_" or "ALL_" before it."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).fields.get("general.file_type")
    if field is None:
        return None
    try:
        name = LlamaFileType(int(field.parts[field.data[0]][0])).name
    except ValueError:  # of a llama.cpp that is newer than the library
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def bits_of(file_type: str | None) -> int | None:
    """About how many bits such a file has for a weight; None where that is 16 or more, or not known."""
    few = re.match(r"(?:I?Q|TQ|MXFP)(\d)", file_type or "")
    return int(few[1]) if few else None


def few_bits(name: str, file_type: str | None) -> str | None:
    """What to know of a base of that name that comes from such a file; None where nothing is lost."""
    bits = bits_of(file_type)
    return f"the base {name} is read from a file with about {bits} bits a weight ({file_type})" if bits else None


def source_of(folder: Path) -> Path | None:
    """The GGUF file that a folder of the cache was made from; None for other folders."""
    try:
        return Path(read_json(folder / NOTE)["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text(file: Path, key: str) -> str | None:
    """A text of the file's metadata, such as `general.license`."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get(key)
    return bytes(field.parts[field.data[0]]).decode("utf-8", "replace") if field else None
