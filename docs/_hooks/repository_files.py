"""A hook of MkDocs: pages of the repository that lie outside docs/, and files that pages link to, become pages of the site.

The repository has no public address yet, so a link to a file must lead to a copy of it. Copies are under `repository/`, at the
path of the file in the repository; a source file is shown as a block of code, a notebook by its cells, and a folder as a list of
its files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIES = "repository"
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<file>[^)\s"#]+)(?P<anchor>#[^)\s"]*)?(?P<after>[)"])')


def github_slug(text: str, separator: str) -> str:
    """Return the anchor that GitHub gives to a heading, so that links between pages are the same in both."""
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", separator)


def on_config(config: Any) -> Any:
    """Name headings as GitHub does."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": github_slug}
    return config


def repository_path(src_uri: str) -> PurePosixPath:
    """Return the path in the repository of the file that a page of the site shows."""
    if not src_uri.startswith(f"{COPIES}/"):
        return PurePosixPath("docs", src_uri)
    path = PurePosixPath(src_uri).relative_to(COPIES)
    return path if path.suffix == ".md" and (ROOT / path).is_file() else path.with_suffix("")


def site_path(path: PurePosixPath) -> str:
    """Return the page or file of the site for a path in the repository."""
    if path.parts[:1] == ("docs",):
        return str(path.relative_to("docs"))
    if (ROOT / path).is_dir():
        return f"{COPIES}/{path}.md"
    return f"{COPIES}/{path}" if path.suffix in (".md", ".png", ".svg") else f"{COPIES}/{path}.md"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to what is not in blocks of code."""
    parts, end = [], 0
    for block in _FENCE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def _target(page: PurePosixPath, link: str) -> PurePosixPath | None:
    """Return the path in the repository that a link on a page leads to; None for other sites and missing files."""
    if "://" in link:
        return None
    path = PurePosixPath(os.path.normpath(page.parent / link))
    return path if path.parts[0] != ".." and (ROOT / path).exists() else None


def rewrite_links(text: str, page: PurePosixPath) -> str:
    """Let the links of a page lead to the site's pages; `page`: the path in the repository."""
    here = PurePosixPath(site_path(page)).parent

    def rewrite(link: re.Match[str]) -> str:
        target = _target(page, link["file"])
        if target is None:
            return link[0]
        path = os.path.relpath(site_path(target), here)
        if link["before"].endswith('"') and path.endswith(".md"):
            path = f"{path[:-3]}.html"  # MkDocs does not look at HTML
        return f"{link['before']}{path}{link['anchor'] or ''}{link['after']}"

    return _outside_code(text, lambda part: _LINK.sub(rewrite, part))


def _linked(text: str, page: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield the files and folders outside docs/ that a page links to."""
    for link in _LINK.finditer(_FENCE.sub("", text)):
        target = _target(page, link["file"])
        if target is not None and target.parts[0] != "docs":
            yield target


def content(path: PurePosixPath) -> str:
    """Return the Markdown that shows a file or a folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(one.name for one in file.iterdir() if one.is_file())
        return f"# {path}/\n\n" + "".join(f"- [{name}]({path.name}/{name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"] == "code", "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{source}\n```" if is_code else source for is_code, source in cells) + "\n"
    language = {".py": "python", ".cpp": "cpp", ".yaml": "yaml", ".cff": "yaml"}.get(path.suffix, "text")
    return f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and what those pages link to."""
    texts = [(PurePosixPath("docs", file.src_uri), file.content_string) for file in files.documentation_pages()]
    seen: set[PurePosixPath] = set()
    while texts:
        page, text = texts.pop()
        for path in sorted(set(_linked(text, page)) - seen):
            seen.add(path)
            if path.suffix in (".png", ".svg"):
                files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
                continue
            shown = content(path)
            files.append(File.generated(config, site_path(path), content=shown))
            # A folder's page lies beside the folder, as a file of its parent.
            texts.append((path, shown))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of each page before MkDocs reads them."""
    return rewrite_links(markdown, repository_path(page.file.src_uri))
