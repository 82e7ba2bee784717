"""Check that the attention captured from a model equals the attention that eager attention returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import ear_ops
from ear_ops.capture import Layout, find_attention
from ear_ops.ops.probabilities import structure_mask

from .architectures import NotSwept, batch_for, build, build_attempt, run

TOLERANCE = 1e-5
STAND_IN = "flash_attention_2"
ALIKE = "attention is the same in both views of this small model, so a comparison says nothing"
NO_MATRIX = "eager attention returns no matrix of probabilities to compare with"


class KeepingPull(ear_ops.AttentionPull):
    """An attention pull that keeps its reading."""

    reading: Any = None

    def term(self, reading: Any, reading_aug: Any) -> Tensor:
        self.reading = reading
        return super().term(reading, reading_aug)


def check(model_type: str) -> dict[str, Any]:
    """Return the row of a model type in the table of architectures.

    The ``status`` of a row is one of these:

    - ``"correct"``: every matrix differs by at most :data:`TOLERANCE` on real rows, and the output of the model has the
      same bits with and without the recorder.
    - ``"wrong"``: a matrix or the output differs.
    - ``"refused"``: no layer can be captured. The entry ``refused`` says why.
    - ``"not compared"``: eager attention returns no matrix, or the same matrix for both views.
    - ``"not swept"``: the type is not a text or vision model, or it cannot be built small.

    Rounding alone may exceed the tolerance in a model with sharp attention. A row that is wrong by little is therefore
    made again in float64 (``difference_float64``): that makes a rounding difference smaller, but not a mistake.
    """
    row = _check(model_type, torch.float32)
    if row["status"] == "wrong" and row["output_identical"] and max(row["difference"].values()) <= 10 * TOLERANCE:
        precise = _check(model_type, torch.float64)
        if precise["status"] == "correct":
            row |= {"status": "correct", "difference_float64": precise["difference"]}
    return row


def _check(model_type: str, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"type": model_type}
    try:
        kind, model, attempt = build(model_type)
    except NotSwept as reason:
        return row | {"status": "not swept", "reason": str(reason)}
    row["kind"] = kind
    layers, refused = _requests(model)
    errors: dict[str, float] = {}
    spread, identical, compared = 0.0, True, set()
    oracle = build_attempt(model_type, attempt, "eager")
    oracle.load_state_dict(model.state_dict())
    model, oracle = model.to(dtype), oracle.to(dtype)
    with torch.no_grad():
        run(
            oracle, _batch(model, kind, "right", dtype)
        )  # the first run of BigBird replaces its attention, where inputs are short
    for copy in (model, oracle) if dtype == torch.float64 else ():
        with contextlib.suppress(ValueError, AttributeError):
            copy.set_experts_implementation("eager")  # the grouped product of experts takes no float64
    implementation = model.config._attn_implementation
    ways = [implementation, *({"eager"} - {implementation})]
    if model._supports_flash_attn and any(not layer_site(model, layer).inside for layer in layers):
        ways.append(STAND_IN)
    for way in ways:
        subject = oracle if way == "eager" else model
        for side in ("right",) if kind == "vision" else ("right", "left"):
            batch = _batch(model, kind, side, dtype)
            expected = _eager_maps(oracle, batch, layers)
            stand_in_maps: dict[Any, Tensor] = {}
            try:
                with flash_stand_in(subject, stand_in_maps) if way == STAND_IN else contextlib.nullcontext():
                    captured, unchanged = _captured(subject, batch, layers, refused, way)
            except Exception as error:
                if way != STAND_IN:
                    raise
                row["stand_in"] = f"{type(error).__name__}: {error}"[
                    :160
                ]  # the model does not run under the stand-in, with or without a recorder
                break
            identical = identical and unchanged
            for layer, (reading, term) in captured.items():
                if layer not in expected:
                    refused.setdefault(NO_MATRIX, []).append(layer)
                    continue
                difference, distance = _compare(reading, term, expected[layer], batch)
                computed = stand_in_maps.get(layer_site(model, layer).place.modules[0])
                differs = difference > 10 * TOLERANCE
                if computed is not None and differs and _compare(reading, term, computed, batch)[0] <= TOLERANCE:
                    row["stand_in"] = "the model itself attends differently under it, and so does what is captured"
                    continue
                errors[way] = max(errors.get(way, 0.0), difference)
                spread = max(spread, distance)
                compared.add(layer)
    row |= {"refused": {reason: sorted(set(map(str, which))) for reason, which in refused.items()}}
    if not compared:
        return row | {"status": "not compared" if NO_MATRIX in row["refused"] else "refused"}
    close = all(error <= TOLERANCE for error in errors.values())
    if identical and close and spread <= 1e-3:
        row["refused"] = {ALIKE: sorted(map(str, compared)), **row["refused"]}
        return row | {"status": "not compared"}
    sites = [layer_site(oracle, layer) for layer in compared]
    tolerance = (
        TOLERANCE if dtype == torch.float32 else TOLERANCE / 10
    )  # some models compute the softmax in float32 all the same
    good = identical and all(error <= tolerance for error in errors.values())
    return row | {
        "status": "correct" if good else "wrong",
        "mechanism": " + ".join(sorted({_mechanism(site) for site in sites})),
        "attention": sorted({type(site.place.modules[0]).__name__ for site in sites}),
        "layers": len(compared),
        "difference": errors,
        "output_identical": identical,
        "largest_distance_of_views": spread,
    }


def _batch(model: Any, kind: str, side: str, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = batch_for(model, kind, side)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def layer_site(model: Any, layer: int | str) -> Any:
    return Layout(model).attention(layer)


def _mechanism(site: Any) -> str:
    return "inside the module" if site.inside else "attention interface"


def _requests(model: Any) -> tuple[list[int | str], dict[str, list[Any]]]:
    """Return the layers to capture, and the refused layers by reason."""
    layout = Layout(model)
    refused: dict[str, list[Any]] = {}
    numbers: list[int | str] = []
    with contextlib.suppress(ValueError):
        numbers = list(range(1, layout.depth + 1))
    accepted = [n for n in numbers if _accepts(layout, n, refused)]
    decoder = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None
    if accepted and decoder is None:
        return accepted, refused
    inside = {id(part) for part in (model if decoder is None or not accepted else decoder).modules()}
    paths = [path for path, module, _ in find_attention("", model) if id(module) in inside]
    if not paths and not refused:
        refused["no attention that can be taken"] = ["all"]
    return accepted + [path for path in paths if _accepts(layout, path, refused)], refused


def _accepts(layout: Layout, layer: int | str, refused: dict[str, list[Any]]) -> bool:
    try:
        layout.attention(layer)
    except ValueError as error:
        refused.setdefault(str(error)[:300], []).append(layer)
        return False
    return True


def _eager_maps(oracle: Any, batch: dict[str, Tensor], layers: list[int | str]) -> dict[int | str, Tensor]:
    """Return the attention matrix of each layer of a model with eager attention.

    A matrix comes from the first of these places that has it: the output of the model, if that has an entry for each
    layer; the output of the module; the result of the attention function (SAM 2); the input of a dropout (MobileViT).
    Where a module returns scores instead of probabilities (ProphetNet), the matrix is their softmax.
    """
    returned: dict[int | str, Tensor] = {}
    dropped: dict[int | str, Tensor] = {}
    computed: dict[Any, Any] = {}
    handles = []
    for layer in layers:
        for module in layer_site(oracle, layer).place.modules:

            def keep(_: Any, __: Any, output: Any, layer: int | str = layer) -> None:
                entries = output[1:] if isinstance(output, tuple) else ()
                maps = [entry for entry in entries if _is_matrix(entry)]
                maps = maps or [entry.softmax(-1) for entry in entries if _may_be_matrix(entry)]
                if maps:
                    returned[layer] = maps[-1]

            def keep_dropped(_: Any, inputs: Any, layer: int | str = layer) -> None:
                if _is_matrix(inputs[0]):
                    dropped[layer] = inputs[0]

            handles.append(module.register_forward_hook(keep))
            dropouts = [part for part in module.modules() if isinstance(part, torch.nn.Dropout)]
            handles += [part.register_forward_pre_hook(keep_dropped) for part in dropouts]
    try:
        with torch.no_grad(), _keeping_results(computed):
            output = run(oracle, batch, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    attentions = getattr(output, "attentions", None) or getattr(output, "encoder_attentions", None) or ()
    numbers = [layer for layer in layers if isinstance(layer, int)]
    if numbers and isinstance(attentions, (tuple, list)) and len(attentions) == Layout(oracle).depth:
        returned |= {n: attentions[n - 1] for n in numbers if _is_matrix(attentions[n - 1])}
    for layer in layers:
        weights = [computed.get(module) for module in layer_site(oracle, layer).place.modules]
        if layer not in returned and len(weights) == 1 and _is_matrix(weights[0]):
            returned[layer] = weights[0]
    return dropped | returned


@contextlib.contextmanager
def _keeping_results(weights: dict[Any, Any]) -> Iterator[None]:
    """Keep the second result of every attention function, by module."""
    lookup = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        function = lookup(self, name, default)

        def keeping(module: Any, *arguments: Any, **kwargs: Any) -> Any:
            output = function(module, *arguments, **kwargs)
            weights[module] = output[1]
            return output

        return keeping

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = lookup


def _may_be_matrix(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dim() >= 3 and entry.is_floating_point()


def _is_matrix(entry: Any) -> bool:
    """Return whether an entry holds probabilities. T5 also returns its position bias, which must not be taken."""
    if not _may_be_matrix(entry):
        return False
    finite = entry.nan_to_num()  # a padding row has no key to attend to and may be NaN
    return bool((finite >= 0).all()) and bool((finite.sum(-1) <= 1.01).all())


def _captured(
    model: Any, batch: dict[str, Tensor], layers: list[int | str], refused: dict[str, list[Any]], way: str
) -> tuple[dict[int | str, tuple[Any, Tensor]], bool]:
    """Return reading and term of each layer, and whether the recorder leaves the output of the model unchanged."""
    plain = run(model, batch)
    try:
        with ear_ops.attach(model, [KeepingPull(layers)]) as ear:
            output = run(model, batch)
            ear.loss()
    except (ValueError, RuntimeError) as error:
        if len(layers) == 1:
            refused.setdefault(f"in loss() under {way}: {error}"[:300], []).append(layers[0])
            return {}, True
        single = [_captured(model, batch, [layer], refused, way) for layer in layers]
        captured = {layer: entry for entries, _ in single for layer, entry in entries.items()}
        return captured, all(unchanged for _, unchanged in single)
    captured = {}
    for layer, pull in zip(layers, ear.regularizers, strict=True):
        assert isinstance(pull, KeepingPull)
        captured[layer] = pull.reading, ear.components()[pull.name]
    return captured, _same(plain, output)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict):
        return all(_same(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)):
        return all(map(_same, first, second))
    return True


def _compare(reading: Any, term: Tensor, expected: Tensor, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Compare the matrix and the term of a layer with eager attention.

    Returns:
        The largest difference of the matrix on real rows or of the term, and the largest difference of the two views.
    """
    actual = reading.probabilities().detach()
    if expected.dim() == 3 and expected.numel() == actual.numel():  # SAM: [B * H, L, S]
        expected = expected.view(actual.shape)
    if actual.shape != expected.shape:
        return float("inf"), 0.0
    rows, _, queries, keys = expected.shape
    attention_mask = batch.get("attention_mask")
    real = torch.ones(rows, queries, dtype=torch.bool)
    key_mask = torch.ones(rows, keys, dtype=torch.bool)
    if attention_mask is not None:
        if queries == attention_mask.shape[1]:
            real = attention_mask.bool()
        elif reading.query_mask is not None:
            real = reading.query_mask
        if keys == attention_mask.shape[1]:
            key_mask = attention_mask.bool()
        elif reading.attention_mask is not None:
            key_mask = reading.attention_mask
    difference = (actual - expected).abs().amax(dim=(1, 3))[real].max()
    half = rows // 2
    masks = {"attention_mask": key_mask, "query_mask": real}
    expected_term = ear_ops.attention_mse(expected, backend="reference", **masks)
    both = real[:half] & real[half:]
    spread = (expected[:half] - expected[half:]).abs().amax(dim=(1, 3))[both].max()
    return max(float(difference), float((term - expected_term).abs())), float(spread)


@contextlib.contextmanager
def flash_stand_in(model: Any, maps: dict[Any, Tensor]) -> Iterator[None]:
    """Register a function in plain torch under the name of FlashAttention, which does not run on a CPU.

    The function takes a mask ``[B, S]``, as FlashAttention does.

    Args:
        model: the model that uses the function meanwhile.
        maps: gets the matrix of the last call of each module.
    """
    before, original = model.config._attn_implementation, AttentionInterface()[STAND_IN]

    def keeping(module: Any, *arguments: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, maps[module] = _flash(module, *arguments, **kwargs)
        return output, None

    AttentionInterface.register(STAND_IN, keeping)
    model.config._attn_implementation = STAND_IN
    try:
        yield
    finally:
        model.config._attn_implementation = before
        AttentionInterface.register(STAND_IN, original)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return the output and the attention matrix."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.shape[-1] ** -0.5 if scaling is None else scaling) * query @ key.transpose(-1, -2)
    if kwargs.get("position_bias") is not None:
        raise ValueError("FlashAttention takes no position bias")
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    allowed = structure_mask(query.shape[2], key.shape[2], causal, kwargs.get("sliding_window"))
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool) if allowed is None else allowed
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"FlashAttention takes a mask [B, S], got {list(attention_mask.shape)}")
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    maps = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (maps @ value).transpose(1, 2).contiguous(), maps.detach()
