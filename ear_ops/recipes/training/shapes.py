"""Whether the content of a JSON file has the shape that its readers rely on."""

from __future__ import annotations

from typing import Any

from ear_ops.errors import shown

NUMBER = (int, float)
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value from JSON differs from a shape, in words, or None where it fits.

    Args:
        value: of the file.
        shape: a type; a tuple of shapes, of which one fits; a list with the shape of every item; or a dict with the
            shape of each key. A key that ends in `?` may be missing. The key `*` stands for all keys.
        place: of the value in the file, such as `languages.en`.
    """
    if isinstance(shape, tuple):
        choices = [misfit(value, choice, place) for choice in shape]
        return None if None in choices else choices[-1]
    kind, kind_of_value = shape if isinstance(shape, type) else type(shape), type(value)
    if kind_of_value is not kind:
        return f"{place or 'the content'} should be {_KINDS[kind]}, but is {shown(value)}"
    inner: list[tuple[Any, Any, Any]] = []  # place, value and shape
    if isinstance(shape, list):
        inner = [(number, item, shape[0]) for number, item in enumerate(value)]
    elif isinstance(shape, dict):
        for key, value_shape in shape.items():
            name = key.removesuffix("?")
            if key == "*":
                inner += [(name, item, value_shape) for name, item in value.items()]
            elif name in value:
                inner.append((name, value[name], value_shape))
            elif name == key:
                return f"{f'{place}.' if place else ''}{name} is missing"
    problems = (misfit(item, item_shape, f"{place}.{name}" if place else str(name)) for name, item, item_shape in inner)
    return next((problem for problem in problems if problem is not None), None)
