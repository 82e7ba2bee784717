"""Finding the places in a model: the blocks, the attention inside a block, the model that receives the mask.

Looks, never changes: everything that can be wrong with a request is found here, before the first hook is registered.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .interface import uses_interface
from .sites import AttentionSite, HiddenSite, ProjectionSite


def unwrap(model: nn.Module) -> nn.Module:
    """The module below ``torch.compile`` and ``DistributedDataParallel``; ``DataParallel`` raises."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: DataParallel runs replicas in threads that would share one recorder; "
                "use DistributedDataParallel (torchrun, accelerate launch) or a single device"
            )
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class Layout:
    """The places of one model. ``root``: the module whose forward is one recording."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._paths = {module: path for path, module in root.named_modules()}

    def attention(self, layer: int) -> AttentionSite:
        """The self-attention inside block ``layer``, counted from 1."""
        path, block = self.block(layer)
        kind = type(block).__name__
        found = [(name, module) for name, module in block.named_modules() if uses_interface(module)]
        found = [(name, module) for name, module in found if not _is_cross_attention(name, module)]
        if not found:
            raise ValueError(
                f"layer: layer {layer} ({path}, {kind}) has no self-attention that goes through the attention "
                f"interface of transformers, so its queries and keys cannot be taken; if its attention is a plain "
                f"softmax(scale * Q K^T), name the projections with query=, key= and num_heads="
            )
        if len(found) > 1:
            names = ", ".join(f"{path}.{name}" for name, _ in found)
            raise ValueError(f"layer: layer {layer} ({kind}) has several self-attentions ({names}), expected one")
        name, module = found[0]
        if getattr(module, "sinks", None) is not None:
            raise ValueError(
                f"layer: layer {layer} ({path}, {kind}) has attention sinks, which the attention losses do not support"
            )
        return AttentionSite(path=_join(path, name), module=module, model=self._receiver(_join(path, name)))

    def projections(self, query: str, key: str, num_heads: int, num_key_value_heads: int | None) -> ProjectionSite:
        """Two projection modules by their paths; their outputs are ``[B, L, num_heads * D]`` and ``[B, S, ...]``."""
        modules = dict(self.root.named_modules())
        for argument, path in (("query", query), ("key", key)):
            if path not in modules:
                last = path.rsplit(".", 1)[-1]
                similar = [name for name in modules if name.rsplit(".", 1)[-1] == last]
                hint = f"did you mean {similar[0]!r}?" if similar else "see model.named_modules()"
                raise ValueError(f"{argument}: {type(self.root).__name__} has no module {path!r}; {hint}")
        if modules[query] is modules[key]:
            raise ValueError(
                f"key: {key!r} is the same module as query; one fused projection is not supported, "
                f"query and key must be modules of their own"
            )
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        for argument, path, heads in (("query", query, num_heads), ("key", key, kv_heads)):
            width = getattr(modules[path], "out_features", None)
            if isinstance(width, int) and width % heads:
                raise ValueError(f"{argument}: the {width} features of {path!r} do not divide into {heads} heads")
        receiver = self._receiver(query)
        rotary = next((m for m in modules[receiver].modules() if "rotary" in type(m).__name__.lower()), None)
        if rotary is not None:
            raise ValueError(
                f"query: the model turns queries and keys after the projections ({type(rotary).__name__}), so the "
                f"projections alone do not give its attention; use layer= instead"
            )
        return ProjectionSite(query, key, modules[query], modules[key], num_heads, kv_heads, receiver)

    def embeddings(self) -> HiddenSite:
        """What enters the first block: the embedding layer's output, LayerNorm and dropout included."""
        path, block = self.block(1)
        return HiddenSite(path, block, "input", self._receiver(path))

    def hidden_states(self, layer: int) -> HiddenSite:
        """What leaves block ``layer``, counted from 1, before any final norm of the model."""
        path, block = self.block(layer)
        return HiddenSite(path, block, "output", self._receiver(path))

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self._blocks()[1])

    def block(self, layer: int) -> tuple[str, nn.Module]:
        """Path and module of block ``layer``, counted from 1."""
        path, blocks = self._blocks()
        if not 1 <= layer <= len(blocks):
            raise ValueError(
                f"layer: expected 1 to {len(blocks)}, {type(self.root).__name__} has {len(blocks)} layers ({path}) "
                f"counted from 1; got {layer}"
            )
        return _join(path, str(layer - 1)), blocks[layer - 1]

    def _blocks(self) -> tuple[str, nn.ModuleList]:
        """The main ``ModuleList``: the outermost one with as many entries as the configuration has layers."""
        stack = self._stack()
        name = type(stack).__name__
        lists: list[tuple[str, nn.ModuleList]] = []
        for path, module in stack.named_modules():
            inside_another = any(path.startswith(f"{outer}.") for outer, _ in lists)
            if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
                lists.append((path, module))
        expected = _num_layers(stack)
        fitting = [entry for entry in lists if expected is None or len(entry[1]) == expected]
        if len(fitting) == 1:
            path, blocks = fitting[0]
            return _join(self._paths[stack], path), blocks
        listed = ", ".join(f"{path} ({len(blocks)} entries)" for path, blocks in lists) or "none"
        if fitting:
            raise ValueError(
                f"layer: several module lists of {name} could be its layers: {listed}; attach to the submodel that has "
                f"only one of them"
            )
        wanted = "" if expected is None else f" with {expected} entries, the layers of its configuration"
        raise ValueError(
            f"layer: found no module list{wanted} in {name} (module lists: {listed}); a model that shares its layers "
            f"or keeps them elsewhere is not supported"
        )

    def _stack(self) -> nn.Module:
        """The one transformer inside root: the only outermost ``PreTrainedModel`` (its encoder), else root itself."""
        outermost = [
            module
            for path, module in self.root.named_modules()
            if _is_pretrained(module) and not any(_is_pretrained(parent) for parent in self._parents(path))
        ]
        if len(outermost) > 1:
            names = ", ".join(f"{self._paths[module]} ({type(module).__name__})" for module in outermost)
            raise ValueError(f"model: {type(self.root).__name__} holds several models ({names}); attach to one of them")
        if not outermost:
            return self.root
        model: Any = outermost[0]
        return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model

    def _parents(self, path: str) -> list[nn.Module]:
        """The modules above ``path``, root first."""
        names = path.split(".") if path else []
        return [self.root.get_submodule(".".join(names[:depth])) for depth in range(len(names))]

    def _receiver(self, path: str) -> str:
        """Path of the model that receives the mask for ``path``: the innermost ``PreTrainedModel`` there, or root."""
        for parent in reversed([*self._parents(path), self.root.get_submodule(path)]):
            if _is_pretrained(parent):
                return self._paths[parent]
        return ""


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    described = f"{name}.{type(module).__name__}".lower()
    return "cross" in described or "encoder_attn" in described or "encdec" in described


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # not loaded: then no module can be one
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _num_layers(stack: nn.Module) -> int | None:
    config: Any = getattr(stack, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), "num_hidden_layers", None)
