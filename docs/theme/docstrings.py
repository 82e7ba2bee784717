"""How docstrings become text of the API pages: roles such as ``:func:`ear_ops.attach``` become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|mod):`\.?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces the roles in all docstrings of a package."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        self._replace_below(pkg)

    def _replace_below(self, documented: Any) -> None:
        if documented.docstring is not None:
            documented.docstring.value = ROLE.sub(lambda role: _link(documented, role[1]), documented.docstring.value)
        for member in documented.members.values():
            if not member.is_alias:
                self._replace_below(member)


def _link(documented: Any, name: str) -> str:
    """A link to what ``name`` means where ``documented`` stands; plain code where the pages do not show it."""
    try:
        path = documented.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
