"""Where this installation of the package came from, for messages that say how to mend it.

No package index has ear-ops, so a message never says ``pip install ear-ops``.
"""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_CHECKOUT = Path(__file__).resolve().parents[1]
_UNKNOWN = "from the path or URL that it was installed from (no package index has it, and pip kept no record of it)"


def install(extra: str) -> str:
    """How to install the package again with an extra, such as ``"train"``: a command, or words."""
    source = _source()
    if source is None:
        return f"install ear-ops[{extra}] again {_UNKNOWN}"
    options, place = source
    with_extra = f"ear-ops[{extra}] @ {place}" if "://" in place else f"{place}[{extra}]"
    return f"pip install --no-build-isolation {options}{shlex.quote(with_extra)}"


def rebuild() -> str:
    """How to build the kernels again for the torch that is installed: a command, or words."""
    source = _source()
    if source is None or source[1].endswith(".whl"):  # a wheel has its kernels in it
        return f"reinstall ear-ops with pip install --no-build-isolation --force-reinstall --no-deps {_UNKNOWN}"
    options, place = source
    return f"reinstall with: pip install --no-build-isolation --force-reinstall --no-deps {options}{shlex.quote(place)}"


def _source() -> tuple[str, str] | None:
    """Options of pip, and the path or URL that the package was installed from; None where that is not known.

    Python files in a checkout are that checkout. Other installations have what pip wrote down in ``direct_url.json``.
    """
    if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "csrc").is_dir():
        return "--editable ", str(_CHECKOUT)
    try:
        facts: dict[str, Any] = json.loads(metadata.distribution("ear-ops").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    url = facts.get("url")
    if not url:
        return None
    editable = "--editable " if facts.get("dir_info", {}).get("editable") else ""
    if url.startswith("file:"):
        return editable, url2pathname(urlsplit(url).path)
    version_control = facts.get("vcs_info", {}).get("vcs")
    return editable, f"{version_control}+{url}" if version_control else url
