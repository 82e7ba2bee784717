"""How the pages of the repository become pages of the site: links that leave docs/, and code with prompts."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
# Files outside of docs/ that the site holds too, at their path in the repository.
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/**/*.md", "benchmarks/results/**/*.png")
LINK = re.compile(r"(?P<start>!?\[(?P<text>[^\[\]]*)\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of ``OUTSIDE``."""
    for pattern in OUTSIDE:
        for path in sorted(REPOSITORY.glob(pattern)):
            files.append(File.generated(config, path.relative_to(REPOSITORY).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links work in the site that work in the repository, and marks code with prompts as such."""
    folder, docs = Path(page.file.abs_src_path).parent, Path(config.docs_dir)

    def in_site(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / link["target"]))
        path = path / "README.md" if path.is_dir() else path
        if not path.exists():
            return link[0]  # an address, or a mistake that the strict build reports
        uri = path.relative_to(docs if path.is_relative_to(docs) else REPOSITORY).as_posix()
        if files.get_file_from_path(uri) is None:  # the site does not hold the file, so its path has to do
            return f"{link['text']} (`{uri}`)"
        return f"{link['start']}({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{link['anchor'] or ''})"

    return LINK.sub(in_site, markdown).replace("```python\n>>> ", "```pycon\n>>> ")
