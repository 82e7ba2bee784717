"""Finding the places in a model: the blocks, the attention inside a block, the model that receives the mask.

This file only looks. It refuses a wrong request before the first hook is registered.
"""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ear_ops.capture.logits import LogitsSite
from ear_ops.capture.multihead import MultiheadSite
from ear_ops.capture.relations import RelationSite
from ear_ops.capture.sites import AttentionSite, HiddenSite, Place, ProjectionSite, Surroundings
from ear_ops.capture.taps.inside import computes_attention
from ear_ops.capture.taps.interface import uses_interface
from ear_ops.capture.taps.multihead import is_multihead


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
        self._modules = dict(root.named_modules())
        self._paths = {module: path for path, module in self._modules.items()}

    def attention(self, layer: int | str) -> AttentionSite | MultiheadSite:
        """The self-attention inside block ``layer``, counted from 1, or the attention at or inside a module path."""
        if isinstance(layer, str):
            return self._attention_at(layer)
        block = self.block(layer, with_attention=True)
        described = f"layer {layer} ({block.path}, {type(block.modules[0]).__name__})"
        attentions: list[Attention] = []
        for module in block.modules:
            inside = [
                attention
                for attention in find_attention(self._paths[module], module)
                if not _is_cross_attention(attention.path, attention.module)
            ]
            if not inside:
                raise ValueError(
                    f"layer: {described} has no self-attention that calls the attention interface of transformers, "
                    f"scaled_dot_product_attention or softmax, or is an nn.MultiheadAttention, so its attention cannot "
                    f"be taken; if it is a plain softmax(scale * Q K^T), name the projections with query=, key= and "
                    f"num_heads="
                )
            if len(inside) > 1:
                names = ", ".join(attention.path for attention in inside)
                raise ValueError(
                    f"layer: {described} has several self-attentions ({names}), expected one; give the path of one"
                )
            attentions += inside
        path = attentions[0].path if block.calls == 1 else block.path
        modules = tuple(attention.module for attention in attentions)
        return self._site(block._replace(path=path, modules=modules), attentions[0])

    def layers(self, pattern: str) -> list[int | str]:
        """What ``"all"``, ``"middle"`` or a pattern of module paths (``"decoder.layers.*.self_attn"``) stands for.

        ``"all"`` is every block with a self-attention, ``"middle"`` block 6 of 12. In a pattern ``*`` matches anything.
        """
        if pattern in ("all", "middle"):
            _, blocks, count = self._blocks(with_attention=True)
            if pattern == "middle":
                return [max(count // 2, 1)]
            if count != len(blocks):
                return list(range(1, count + 1))
            return [n + 1 for n, block in enumerate(blocks) if find_attention("", block)]
        if not any(character in pattern for character in "*?["):
            return [pattern]
        wrapper = next((w for w in self._wrappers() if fnmatch.filter(self._modules, w + pattern)), "")
        matched = [path for path in self._modules if fnmatch.fnmatchcase(path, wrapper + pattern)]
        name = type(self.root).__name__
        if not matched:
            raise ValueError(f"layer: no module path of {name} matches {pattern!r}; {self._known()}")
        attentions = [attention.path for attention in find_attention("", self.root) if attention.path in matched]
        if not attentions:
            raise ValueError(
                f"layer: {pattern!r} matches {len(matched)} modules of {name} ({matched[0]}, ...), "
                f"none of them an attention; {self._known()}"
            )
        return [path.removeprefix(wrapper) for path in attentions]

    def full_path(self, path: str) -> str:
        """``path`` as the root has it: one inside a wrapper that keeps its model as ``.module`` is found there."""
        return next((w + path for w in self._wrappers() if w + path in self._modules), path)

    def _wrappers(self) -> Iterator[str]:
        """What to put before a path: nothing, then ``"module."`` for each wrapper, such as the engine of DeepSpeed."""
        prefix, wrapped = "", self.root
        yield prefix
        while (inside := wrapped._modules.get("module")) is not None:
            prefix, wrapped = f"{prefix}module.", inside
            yield prefix

    def _attention_at(self, path: str) -> AttentionSite | MultiheadSite:
        path = self.full_path(path)
        if path not in self._modules:
            raise ValueError(f"layer: {type(self.root).__name__} has no module {path!r}; {self._known()}")
        attentions = find_attention(path, self._modules[path])
        if len(attentions) > 1:
            attentions = [a for a in attentions if not _is_cross_attention(a.path, a.module)] or attentions
        if len(attentions) != 1:
            names = ", ".join(attention.path for attention in attentions) or "none"
            raise ValueError(f"layer: expected one attention at {path!r}, found {names}; {self._known()}")
        attention = attentions[0]
        return self._site(Place(attention.path, (attention.module,)), attention)

    def _known(self) -> str:
        paths = [attention.path for attention in find_attention("", self.root)]
        listed = ", ".join(paths[:3]) + (f", ... ({len(paths)} in all)" if len(paths) > 3 else "")
        return f"attentions of this model: {listed}" if paths else "this model has no attention that can be taken"

    def _site(self, place: Place, attention: Attention) -> AttentionSite | MultiheadSite:
        path, module, computes_itself = attention
        if is_multihead(module):
            return self._multihead_site(place, path, module)
        if getattr(module, "sinks", None) is not None:
            raise ValueError(
                f"layer: {path} ({type(module).__name__}) has attention sinks, which the losses do not support"
            )
        model = self._receiver(path)
        cross = _is_cross_attention(path, module)
        receiver: Any = self._modules[model]
        names = list(inspect.signature(receiver.forward).parameters)
        if "decoder_attention_mask" not in names:
            key_mask = "encoder_attention_mask" if cross else "attention_mask"
            return AttentionSite(place, model, key_mask, "attention_mask", inside=computes_itself)
        decoder = receiver.get_decoder() if hasattr(receiver, "get_decoder") else None
        in_decoder = "decoder" in path if decoder is None else any(module is part for part in decoder.modules())
        query_mask = "decoder_attention_mask" if in_decoder else "attention_mask"
        key_mask = "attention_mask" if cross else query_mask
        return AttentionSite(place, model, key_mask, query_mask, inside=computes_itself)

    def _multihead_site(self, place: Place, path: str, module: Any) -> MultiheadSite:
        adds = "add_bias_kv" if module.bias_k is not None else "add_zero_attn" if module.add_zero_attn else None
        if adds is not None:
            raise ValueError(
                f"layer: {path} (nn.MultiheadAttention) has {adds}=True, which adds a key that is no token; the losses "
                f"compare tokens and do not support it"
            )
        around = self._surroundings(path)
        is_cross = _is_cross_attention(path, module) or module is getattr(around.module, "multihead_attn", None)
        return MultiheadSite(place, self._receiver(path), around, is_cross)

    def _surroundings(self, path: str) -> Surroundings:
        kinds = nn.TransformerEncoder, nn.TransformerDecoderLayer
        around = (parent for parent in reversed(self._parents(path)) if isinstance(parent, kinds))
        return Surroundings(path, next(around, None))

    def projections(
        self,
        query: str,
        key: str,
        num_heads: int,
        num_key_value_heads: int | None,
        cross_attention: bool | None = None,
    ) -> ProjectionSite:
        """Two projection modules by their paths; their outputs are ``[B, L, num_heads * D]`` and ``[B, S, ...]``."""
        modules = self._modules
        query, key = self.full_path(query), self.full_path(key)
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
        return ProjectionSite(self.root, query, key, num_heads, kv_heads, receiver, cross_attention)

    def embeddings(self) -> HiddenSite:
        """What enters the first block: the embedding layer's output, LayerNorm and dropout included."""
        block = self.block(1, argument="model")  # whoever asks for embeddings has no layer to give
        return HiddenSite(block, "input", self._receiver(block.path), self._surroundings(block.path))

    def hidden_states(self, layer: int) -> HiddenSite:
        """What leaves block ``layer``, counted from 1, before any final norm of the model."""
        block = self.block(layer)
        return HiddenSite(block, "output", self._receiver(block.path), self._surroundings(block.path))

    def logits(self) -> LogitsSite:
        """What the model predicts."""
        is_encoder_decoder = getattr(getattr(self.root, "config", None), "is_encoder_decoder", False)
        return LogitsSite(self.root, "decoder_attention_mask" if is_encoder_decoder else "attention_mask")

    def relations(self, layer: int | str, of: str) -> RelationSite:
        """The queries, keys or values (``of``) of an attention, which is found as by :meth:`attention`."""
        return RelationSite(self.attention(layer), of)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return self._blocks()[2]

    def block(self, layer: int, with_attention: bool = False, argument: str = "layer") -> Place:
        """Block ``layer``, counted from 1; ``with_attention``: in the list of blocks that has the attentions.

        ``argument``: what errors name.
        """
        path, blocks, count = self._blocks(with_attention, argument)
        if not 1 <= layer <= count:
            raise ValueError(
                f"layer: expected 1 to {count}, {type(self.root).__name__} has {count} layers ({path}) "
                f"counted from 1; got {layer}"
            )
        if count != len(blocks):
            return Place(path, tuple(blocks), layer - 1, count)
        return Place(_join(path, str(layer - 1)), (blocks[layer - 1],))

    def _blocks(self, with_attention: bool = False, argument: str = "layer") -> tuple[str, nn.ModuleList, int]:
        """Path, main ``ModuleList`` and number of layers.

        The main list is the outermost one with as many entries as the configuration has layers. Or it is the only list
        that has attentions, with fewer entries than layers: the model then runs its entries repeatedly (ALBERT).
        """
        stack = self._stack()
        name = type(stack).__name__
        lists: list[tuple[str, nn.ModuleList]] = []
        for path, module in stack.named_modules():
            inside_another = any(path.startswith(f"{outer}.") for outer, _ in lists)
            if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
                lists.append((path, module))
        expected = _num_layers(stack)
        fitting = [entry for entry in lists if expected is None or len(entry[1]) == expected]
        if len(fitting) > 1 and with_attention:
            fitting = [entry for entry in fitting if find_attention(*entry)]
        if not fitting and expected is not None:
            shared = [entry for entry in lists if find_attention(*entry)]
            if len(shared) == 1 and expected % len(shared[0][1]) == 0:
                fitting = shared
        if len(fitting) == 1:
            path, blocks = fitting[0]
            return _join(self._paths[stack], path), blocks, len(blocks) if expected is None else expected
        listed = ", ".join(f"{path} ({len(blocks)} entries)" for path, blocks in lists) or "none"
        by_path = "give the path of an attention module as the layer" if with_attention else ""
        if fitting:
            raise ValueError(
                f"{argument}: several module lists of {name} could be its layers: {listed}; attach to the submodel "
                f"that has only one of them{by_path and ', or '}{by_path}"
            )
        wanted = "" if expected is None else f" with {expected} entries, the layers of its configuration"
        raise ValueError(
            f"{argument}: found no module list{wanted} in {name} (module lists: {listed}); "
            f"{by_path or 'attach to a model whose blocks are in one nn.ModuleList'}"
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


class Attention(NamedTuple):
    """An attention module of a model: its path, and whether it computes its attention by itself.

    The others call the attention interface of transformers.
    """

    path: str
    module: nn.Module
    computes_itself: bool


def find_attention(path: str, module: nn.Module) -> list[Attention]:
    """The attentions at or below ``module``, which lies at ``path``.

    Where any goes through the attention interface, only those that do: the rest are gates and routers.
    """
    inner = [(_join(path, name), child) for name, child in module.named_modules()]
    through_interface = [Attention(name, child, False) for name, child in inner if uses_interface(child)]
    return through_interface or [
        Attention(name, child, True) for name, child in inner if is_multihead(child) or computes_attention(name, child)
    ]


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
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None
