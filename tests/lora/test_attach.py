"""Finding targets on every architecture, putting adapters on and taking them off."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.shapes import EXPERT_SHAPES, SHAPES, tiny_model, token_ids
from tunery.errors import AdapterError, TargetError
from tunery.fast.adapters import apply_lora
from tunery.lora.attach import (
    active_adapter,
    adapter_names,
    adapter_state,
    attach,
    disabled,
    lora_layers,
    remove,
    set_active,
    trainable_parameters,
)
from tunery.lora.dropout import DropoutClock
from tunery.lora.targets import find_targets, untouched_linear_weights

ATTENTION = {
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
}
USUAL_ATTENTION = {f"self_attn.{leaf}_proj" for leaf in "qkvo"}
MLP = {
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {"fc1", "fc2"},
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
USUAL_MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def in_both_layers(names: list[str]) -> set[str]:
    """Names within the layer; each must have been found in layers 0 and 1."""
    layers = [{n.split(f".{i}.", 1)[1] for n in names if f".{i}." in n} for i in (0, 1)]
    assert layers[0] == layers[1]
    assert len(names) == 2 * len(layers[0])
    return layers[0]


def randomise(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give an adapter values as if it were trained, exact in float32."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_state(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_shortcuts_find_the_layers_of_every_architecture(shape: str) -> None:
    model = tiny_model(shape)
    attention, mlp = ATTENTION.get(shape, USUAL_ATTENTION), MLP.get(shape, USUAL_MLP)
    assert in_both_layers(find_targets(model, "attention")) == attention
    assert in_both_layers(find_targets(model, "mlp")) == mlp
    assert in_both_layers(find_targets(model, "all-linear")) == attention | mlp
    assert find_targets(model, ["mlp", "attention"]) == find_targets(model, "all-linear")
    assert untouched_linear_weights(apply_lora(model, rank=2)) == []


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_fused_experts_are_reported_and_never_silently_skipped(shape: str) -> None:
    model = tiny_model(shape)
    assert in_both_layers(find_targets(model, "all-linear")) == USUAL_ATTENTION
    for target in ("mlp", "experts", "down_proj", "*.experts.*", "model.layers.0.mlp.*"):
        with pytest.raises(TargetError, match=r"experts"):
            find_targets(model, target)
    assert in_both_layers(find_targets(model, "model.layers.*", exclude=["mlp"])) == USUAL_ATTENTION
    untouched = untouched_linear_weights(apply_lora(model, rank=2))
    assert len(untouched) == 6
    assert "model.layers.1.mlp.experts.gate_up_proj" in untouched


def test_linear_experts_are_found_and_their_routers_are_not() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Linear(32, 4)
        layer.mlp.shared_expert_gate = nn.Linear(32, 1)
        layer.mlp.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(32, 8)}) for _ in range(2))
    names = find_targets(model, "mlp")
    assert names == [f"model.layers.{i}.mlp.experts.{e}.w1" for i in (0, 1) for e in (0, 1)]
    assert find_targets(model, "gate") == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]  # asked for by name


def test_names_endings_patterns_and_exclusion() -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    assert find_targets(llama, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert find_targets(gpt2, "mlp.c_proj") == [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]
    assert find_targets(gpt2, ["lm_head", "wte"]) == ["transformer.wte", "lm_head"]
    assert len(find_targets(llama, "model.layers.1*.mlp.*")) == 3
    assert len(find_targets(llama, "model.layers.0.*")) == 7
    assert len(find_targets(llama, "all-linear", exclude=["model.layers.0"])) == 7
    assert len(find_targets(llama, "all-linear", exclude=["o_proj", "*.mlp.*"])) == 6
    assert find_targets(llama, ["embed_tokens"]) == ["model.embed_tokens"]


@pytest.mark.parametrize("targets", ["q_porj", ["q_proj", "q_porj"], "model.*.q_porj"])
def test_nothing_matched_lists_what_could_be(targets: str | list[str]) -> None:
    with pytest.raises(TargetError) as error:
        find_targets(tiny_model("llama"), targets)
    text = str(error.value)
    assert "q_porj" in text
    assert "did you mean q_proj?" in text
    assert "q_proj (2), k_proj (2)" in text
    assert "lm_head (1)" in text
    assert error.value.exit_code == 2


def test_what_lora_cannot_adapt_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(TargetError, match=r"model\.layers\.0\.input_layernorm \(a LlamaRMSNorm"):
        find_targets(model, "input_layernorm")
    with pytest.raises(TargetError, match="holds q_proj, k_proj"):
        find_targets(model, "self_attn")
    with pytest.raises(TargetError, match="OPTLearnedPositionalEmbedding"):
        find_targets(tiny_model("opt"), "embed_positions")


def test_exclusions_that_miss_or_take_everything_are_errors() -> None:
    model = tiny_model("llama")
    with pytest.raises(TargetError, match="exclude: 'o_porj'"):
        find_targets(model, "all-linear", exclude=["o_porj"])
    for targets in ("attention", "q_proj", "model.*.q_proj"):
        with pytest.raises(TargetError, match="is excluded"):
            find_targets(model, targets, exclude="self_attn")


@pytest.mark.parametrize("shape", [*SHAPES, *EXPERT_SHAPES])
def test_the_base_is_exact_when_the_adapter_is_off_or_fresh(shape: str) -> None:
    model = tiny_model(shape)
    before = logits(model)
    names = attach(model, rank=3, alpha=6.0)
    assert list(lora_layers(model)) == names
    assert torch.equal(logits(model), before)  # B is zero
    randomise(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with disabled(model):
        assert active_adapter(model) is None
        assert torch.equal(logits(model), before)
    assert active_adapter(model) == "default"
    remove(model, "default")
    assert lora_layers(model) == {}
    assert torch.equal(logits(model), before)


def test_removing_puts_the_original_modules_back() -> None:
    model = tiny_model("gpt2")
    before = {name: id(module) for name, module in model.named_modules()}
    apply_lora(model, rank=2, targets=["all-linear", "wte", "lm_head"])
    remove(model, "default")
    assert {name: id(module) for name, module in model.named_modules()} == before
    with pytest.raises(AdapterError, match="no adapter named"):
        remove(model, "default")


def test_two_adapters_on_one_base() -> None:
    model = tiny_model("llama", torch.float64)
    base = logits(model)
    attach(model, rank=2, alpha=4.0, targets="attention", name="first")
    attach(model, rank=5, alpha=5.0, targets="all-linear", name="second")
    randomise(model, "first", 1)
    randomise(model, "second", 2)
    assert adapter_names(model) == ["first", "second"]
    both = {}
    for name in ("first", "second"):
        set_active(model, name)
        both[name] = logits(model)
        alone = tiny_model("llama", torch.float64)
        rank, alpha, targets, seed = (2, 4.0, "attention", 1) if name == "first" else (5, 5.0, "all-linear", 2)
        attach(alone, rank=rank, alpha=alpha, targets=targets)
        randomise(alone, seed=seed)
        assert torch.equal(both[name], logits(alone))
    remove(model, "second")
    set_active(model, "first")
    assert torch.equal(both["first"], logits(model))
    assert len(lora_layers(model)) == 8
    set_active(model, None)
    assert torch.equal(base, logits(model))
    with pytest.raises(AdapterError, match="first"):
        set_active(model, "second")


def test_the_same_name_twice_is_refused_and_changes_nothing() -> None:
    model = apply_lora(tiny_model("llama"), rank=2)
    randomise(model)
    before = logits(model)
    with pytest.raises(AdapterError, match="already has an adapter"):
        apply_lora(model, rank=4)
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(AdapterError, match="no adapter can have"):
        apply_lora(tiny_model("llama"), **wrong)  # type: ignore[arg-type]


def test_a_shared_layer_is_adapted_in_all_its_places() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    apply_lora(model, rank=2, targets="mlp")
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert len(trainable_parameters(model)) == 2 * 3


def test_the_start_follows_from_the_seed_whatever_the_dtype() -> None:
    values = [
        adapter_state(apply_lora(tiny_model("llama", dtype), rank=4, seed=seed))
        for dtype, seed in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 1), (torch.float32, 2))
    ]
    for key, tensor in values[0].items():
        assert torch.equal(tensor, values[1][key])
        assert torch.equal(tensor.double(), values[2][key])
        assert key.endswith("lora_B.weight") or not torch.equal(tensor, values[3][key])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_adapter_tensor_moves_in_two_steps_and_nothing_else(shape: str) -> None:
    model = tiny_model(shape)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    apply_lora(model, rank=2, targets=["all-linear", embedding, "lm_head"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable_parameters(model)}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if ".lora_" in key}


def test_the_clock_reaches_every_layer_and_layers_differ() -> None:
    model, clock = tiny_model("llama"), DropoutClock(enabled=True)
    attach(model, rank=2, alpha=4.0, dropout=0.5, clock=clock)
    randomise(model)
    layers = list(lora_layers(model).values())
    assert {id(layer.dropouts["default"].clock) for layer in layers} == {id(clock)}
    assert [layer.dropouts["default"].layer for layer in layers] == list(range(14))
    clock.set(0, 1, 0)
    first = logits(model)
    assert torch.equal(first, logits(model))
    clock.set(0, 2, 0)
    assert not torch.equal(first, logits(model))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_hugging_face_trainer_trains_saves_and_resumes(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def trainer(steps: int) -> Trainer:
        model = apply_lora(tiny_model(shape, tied=True), rank=2, dropout=0.1, targets=["all-linear", "lm_head"])
        rows = [{"input_ids": row, "labels": row} for row in token_ids(8)]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            report_to=[],
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=2,
        )
        return Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]

    straight = trainer(4)
    straight.train()
    saved = [t.clone() for t in adapter_state(straight.model).values()]  # type: ignore[arg-type]
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # a checkpoint of the Trainer holds the base under its own names
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(base), logits(tiny_model(shape, tied=True)))
    for one, other in zip(saved, adapter_state(resumed.model).values(), strict=True):  # type: ignore[arg-type]
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


def test_retying_an_adapted_head_keeps_it_tied() -> None:
    model = apply_lora(tiny_model("llama", tied=True), rank=2, targets=["lm_head", "embed_tokens"])
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(adapter_state(model)) == 4
