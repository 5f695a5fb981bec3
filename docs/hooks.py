"""Puts the notebooks, which lie beside `docs`, into the site and lists them."""

import json
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
PLACE = "<!-- notebooks -->"


def notebooks() -> list[tuple[str, str, str]]:
    """File name, title and question of each notebook, from its first cell."""
    found = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        title, _, rest = "".join(first["source"]).partition("\n")
        found.append(
            (
                path.name,
                title.lstrip("# ").strip(),
                rest.strip().partition("\n\n")[0],
            )
        )
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every notebook in the navigation, below the page that lists them."""
    for section in config.nav or ():
        if isinstance(section, dict) and "Notebooks" in section:
            pages = [{title: f"notebooks/{name}"} for name, title, _ in notebooks()]
            section["Notebooks"] = ["notebooks.md", *pages]
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the notebooks as if they lay in `docs/notebooks`."""
    for name, _, _ in notebooks():
        # Its path in the site is its path in the repository.
        path, root = f"notebooks/{name}", str(FOLDER.parent)
        files.append(File(path, root, config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """The notebooks where they are asked for; links to the threads it names."""
    thread = r"\b([\w.-]+/[\w.-]+)#(\d+)\b"
    markdown = re.sub(thread, r"[\1#\2](https://github.com/\1/issues/\2)", markdown)
    entries = [
        f"- [{title}](notebooks/{name}): {text}"
        for name, title, text in notebooks()
    ]
    return markdown.replace(PLACE, "\n".join(entries))
