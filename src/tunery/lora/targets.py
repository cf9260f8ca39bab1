"""Which layers an adapter goes beside: from the words of `lora.targets` to full module names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tunery.errors import TargetError
from tunery.lora.layer import LoRALayer, can_wrap
from tunery.models.typed import named_modules, unwrapped
from tunery.text import did_you_mean

SHORTCUTS = ("all-linear", "attention", "mlp")

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|fc\d?|moe|experts?)([._]|$)")


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model as it is without adapters, by full name, in model order; the root is left out."""
    inside: str | None = None
    for name, module in named_modules(model):
        if not name or (inside and name.startswith(inside)):
            continue
        inside = None
        if isinstance(module, LoRALayer):
            inside, module = f"{name}.", module.base
        yield name, module


def find_targets(model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    """The layers that `targets` names, in model order.

    Args:
        targets: one or more of
            "all-linear", every linear layer inside the decoder layers: not the output head, not the routers of experts;
            "attention", "mlp", those of them that belong to attention, or to the feed-forward part;
            a name or the end of one ("q_proj", "mlp.c_proj", "embed_tokens", "lm_head");
            a pattern with * or ? over full names ("model.layers.1*.mlp.*"), which passes over norms.
        exclude: names or patterns of layers to leave out; naming a module leaves out all that is inside it.

    Raises:
        TargetError: an entry matches nothing, or something that LoRA cannot adapt.
    """
    modules = dict(plain_modules(model))
    fused = _fused_weights(modules)
    wanted, unwanted = _as_tuple(targets), _as_tuple(exclude)
    for item in unwanted:
        if not any(_within(item, name) for name in (*modules, *fused)):
            raise _nothing_matched(f"exclude: {item!r}", item, modules, fused)
    if not wanted:
        raise _nothing_matched("an empty list of targets", "", modules, fused)
    left_out = {name for name in (*modules, *fused) if any(_within(item, name) for item in unwanted)}
    chosen: set[str] = set()
    for item in wanted:
        found = _shortcut(model, modules, item) if item in SHORTCUTS else _named(modules, fused, item, left_out)
        if not found:
            raise _nothing_matched(f"targets: {item!r}", item, modules, fused)
        if not found - left_out:
            raise TargetError(f"targets: every layer that {item!r} names is excluded", "name fewer layers in exclude")
        chosen |= found - left_out
    return [name for name in modules if name in chosen]


def untouched_linear_weights(model: nn.Module) -> list[str]:
    """Weight matrices inside the decoder layers that no adapter stands beside, by parameter name.

    Besides layers that were not asked for, these are the routers of experts, and experts fused into one parameter.
    """
    in_layer = _layer_paths(model)
    return [
        name
        for name, parameter in _base_parameters(model)
        if parameter.ndim >= 2 and not name.endswith("bias") and in_layer(name) is not None
    ]


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted = tuple(f"{name}." for name, module in named_modules(model) if isinstance(module, LoRALayer))
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(adapted))


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_pattern(item: str) -> bool:
    return "*" in item or "?" in item


def _matches(item: str, name: str) -> bool:
    return fnmatchcase(name, item) if _is_pattern(item) else f".{name}".endswith(f".{item}")


def _within(item: str, name: str) -> bool:
    """`item` names this module, or one that it is inside of."""
    parts = name.split(".")
    return any(_matches(item, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _layer_paths(model: nn.Module) -> Callable[[str], str | None]:
    """A function from full names to names within their decoder layer ("self_attn.q_proj"); None outside the layers."""
    model = unwrapped(model)
    decoder = unwrapped(model.get_decoder()) if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next((name for name, module in named_modules(model) if module is decoder), "")
    start = rf"{re.escape(prefix)}\." if prefix else ""
    layer = re.compile(start + r"(?:[^.\d][^.]*\.)+?\d+\.(.+)")

    def path(name: str) -> str | None:
        match = layer.fullmatch(name)
        return match[1] if match else None

    return path


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a linear layer picks experts: it is called a router, or stands as a gate beside experts."""
    parts = name.split(".")
    for end, part in enumerate(parts):
        owner = modules.get(".".join(parts[:end]))
        if "router" in part:
            return True
        if part in ("gate", "shared_expert_gate") and owner is not None:
            return any("expert" in sibling for sibling, _ in owner.named_children())
    return False


def _shortcut(model: nn.Module, modules: Mapping[str, nn.Module], word: str) -> set[str]:
    in_layer = _layer_paths(model)
    found: set[str] = set()
    for name, module in modules.items():
        path = in_layer(name)
        if path is None or isinstance(module, nn.Embedding) or not can_wrap(module) or _is_router(name, modules):
            continue
        attention = bool(_ATTENTION.search(path))
        mlp = not attention and bool(_MLP.search(path))
        if word == "all-linear" or (word == "attention" and attention) or (word == "mlp" and mlp):
            found.add(name)
    return found


def _named(modules: Mapping[str, nn.Module], fused: Sequence[str], item: str, left_out: set[str]) -> set[str]:
    names = [name for name in modules if _matches(item, name)]
    if _is_pattern(item):  # containers, activations and norms are passed over, weight matrices are not
        names = [name for name in names if any(p.ndim >= 2 for p in modules[name].parameters(recurse=False))]
    unfit = [name for name in names if name not in left_out and not can_wrap(modules[name])]
    wrong = [f"{name} ({_why_not(modules[name])})" for name in unfit]
    wrong += [
        f"{name} (the weights of all experts in one parameter)"
        for name in fused
        if _matches(item, name) and name not in left_out and name.rpartition(".")[0] not in unfit
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise TargetError(
            f"targets: {item!r} names what LoRA cannot adapt: {', '.join(wrong[:3])}{more}",
            "name linear or embedding layers, or leave these out with lora.exclude",
        )
    return set(names)


def _why_not(module: nn.Module) -> str:
    children = [name for name, _ in module.named_children()]
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if any(p.ndim >= 3 for p in own):
        return f"fused weights in a {type(module).__name__}"
    if own:
        return f"a {type(module).__name__}, which is not a plain linear or embedding layer"
    if children:
        return f"a module that holds {', '.join(children[:4])}"
    return f"a {type(module).__name__}, which has no weight matrix"


def _fused_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """Parameters that hold the weights of several experts, [experts, in, out] or so."""
    return [
        f"{name}.{key}"
        for name, module in modules.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 3 and key != "weight"
    ]


def _nothing_matched(where: str, item: str, modules: Mapping[str, nn.Module], fused: Sequence[str]) -> TargetError:
    leaves = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if can_wrap(module))
    known = [] if item in SHORTCUTS else [*leaves, *SHORTCUTS]
    meant = did_you_mean(item.rsplit(".", 1)[-1], known)
    hint = f"{meant} " if meant else ""
    hint += f"layers of this model: {', '.join(f'{leaf} ({count})' for leaf, count in leaves.items())}"
    hint += f"; or {', '.join(SHORTCUTS)}"
    if fused:
        hint += f". Its experts are fused into single parameters ({fused[0]}, …), which LoRA layers cannot adapt"
    return TargetError(f"{where} matches no layer of this model", hint)
