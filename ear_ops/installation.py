"""Where this installation of the package came from, for messages that say how to mend it.

No package index has ear-ops, so a message never says ``pip install ear-ops``.
"""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_CHECKOUT = Path(__file__).resolve().parents[1]
_BUILD_TOOLS = "'setuptools>=77' ninja"  # what a build without isolation finds in the environment
_UNKNOWN = "from the path or URL that it was installed from (no package index has it, and pip kept no record of it)"


def install(extra: str) -> str:
    """How to install the package again with an extra, such as ``"train"``: a command, or words."""
    source = _source()
    if source is None:
        return f"install ear-ops[{extra}] again {_UNKNOWN}"
    options, place = source
    with_extra = f"ear-ops[{extra}] @ {place}" if "://" in place else f"{place}[{extra}]"
    return f"{_pip()} install --no-build-isolation {options}{shlex.quote(with_extra)}"


def rebuild() -> str:
    """How to build the kernels again for the torch that is installed: a command, or words."""
    source = _source()
    pip = _pip()
    command = f"{pip} install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"
    with_tools = f"{pip} install {_BUILD_TOOLS} && {command}"
    if source is None:
        return f"reinstall ear-ops with: {with_tools} {_UNKNOWN}"
    options, place = source
    if place.endswith(".whl"):  # built for one torch
        return f"install the wheel of ear-ops for this torch, or its source distribution with: {with_tools} FILE"
    return f"reinstall with: {with_tools} {options}{shlex.quote(place)}"


def hidden_copy() -> Path | None:
    """The folder of an installed ``ear_ops`` in whose place this source tree runs; None where there is none."""
    if any(_CHECKOUT.glob("ear_ops-*.dist-info")):  # these files are installed themselves
        return None
    elsewhere = [path for path in sys.path if Path(path).resolve() != _CHECKOUT]
    distribution = next(iter(metadata.distributions(name="ear-ops", path=elsewhere)), None)
    if distribution is None:
        return None
    facts = _facts(distribution)
    editable = facts.get("dir_info", {}).get("editable")
    folder = Path(_path(facts["url"]), "ear_ops") if editable else Path(str(distribution.locate_file("ear_ops")))
    return None if folder.resolve() == _CHECKOUT / "ear_ops" else folder


def _distribution() -> metadata.Distribution | None:
    try:
        return metadata.distribution("ear-ops")
    except metadata.PackageNotFoundError:
        return None


def _facts(distribution: metadata.Distribution) -> dict[str, Any]:
    """What pip or uv wrote down of where a package came from."""
    try:
        facts: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
        return facts
    except ValueError:
        return {}


def _path(url: str) -> str:
    return url2pathname(urlsplit(url).path)


def _pip() -> str:
    """The command of the installer: environments that uv made have no pip."""
    distribution = _distribution()
    return "uv pip" if distribution and (distribution.read_text("INSTALLER") or "").strip() == "uv" else "pip"


def _source() -> tuple[str, str] | None:
    """Options of pip, and the path or URL that the package was installed from; None where that is not known.

    Python files in a checkout are that checkout. Other installations have what pip wrote down in ``direct_url.json``.
    """
    if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "csrc").is_dir():
        return "--editable ", str(_CHECKOUT)
    distribution = _distribution()
    facts = _facts(distribution) if distribution else {}
    url = facts.get("url")
    if not url:
        return None
    editable = "--editable " if facts.get("dir_info", {}).get("editable") else ""
    if url.startswith("file:"):
        return editable, _path(url)
    version_control = facts.get("vcs_info", {}).get("vcs")
    return editable, f"{version_control}+{url}" if version_control else url
