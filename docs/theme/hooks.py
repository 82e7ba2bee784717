"""How the pages of the repository become pages of the site: links that leave docs/, source, notebooks, prompts."""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
# Files outside of docs/ that the site holds too, at their path in the repository.
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", *(f"benchmarks/results/**/*.{kind}" for kind in ("md", "png", "svg")))
LINK = re.compile(r"(?P<start>!?\[(?P<text>[^\[\]]*)\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of ``OUTSIDE``, and a page for each notebook."""
    for pattern in OUTSIDE:
        for path in sorted(REPOSITORY.glob(pattern)):
            files.append(File.generated(config, path.relative_to(REPOSITORY).as_posix(), abs_src_path=str(path)))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links work in the site that work in the repository, and marks code with prompts as such.

    A line that is only a link to a Python file becomes its source. A notebook becomes Markdown.
    """
    source, docs = Path(page.file.abs_src_path), Path(config.docs_dir)
    folder = source.parent
    if source.suffix == ".ipynb":
        markdown = notebook_markdown(json.loads(markdown))

    def in_site(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / link["target"]))
        path = path / "README.md" if path.is_dir() else path
        if not path.exists():
            return link[0]  # an address, or a mistake that the strict build reports
        if path.suffix == ".py" and link[0] in markdown.splitlines():
            title = path.relative_to(REPOSITORY).as_posix()
            return f'```python title="{title}"\n{path.read_text(encoding="utf-8")}```'
        path = path.with_suffix(".md") if path.suffix == ".ipynb" else path
        uri = path.relative_to(docs if path.is_relative_to(docs) else REPOSITORY).as_posix()
        if files.get_file_from_path(uri) is None:  # the site does not hold the file, so its path has to do
            return f"{link['text']} (`{uri}`)"
        return f"{link['start']}({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{link['anchor'] or ''})"

    in_site_markdown = LINK.sub(in_site, markdown).replace("```python\n>>> ", "```pycon\n>>> ")
    if source.suffix == ".ipynb":
        in_site_markdown += f"\n\n[Download this notebook]({source.name})\n"
    return in_site_markdown


def notebook_markdown(notebook: dict[str, Any]) -> str:
    """The cells of an executed notebook and their output."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            texts = output.get("data", {"text/plain": output.get("text")})
            data = {kind: "".join(lines) for kind, lines in texts.items()}
            if "image/png" in data:
                pixels = "".join(data["image/png"].split())
                parts.append(f'<img alt="The picture that this code draws" src="data:image/png;base64,{pixels}">')
            elif "text/html" in data:
                parts.append(data["text/html"])
            else:
                parts.append(f"```text\n{data['text/plain'].rstrip()}\n```")
    return "\n\n".join(parts)
