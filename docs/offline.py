"""`offline.py SITE` fails if a page of the site loads anything from other hosts."""

import html.parser
import pathlib
import re
import sys

LOADING = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
}
LINKED_ONLY = {"canonical", "next", "prev", "alternate", "edit"}


class Loaded(html.parser.HTMLParser):
    """The addresses that a browser asks for when it shows a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        address = given.get(LOADING.get(tag, ""), "")
        if (
            re.match(r"(https?:)?//", address)
            and given.get("rel") not in LINKED_ONLY
        ):
            self.found.append(address)


def main(site: pathlib.Path) -> int:
    """Prints what is loaded from elsewhere, and returns how much that is."""
    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise SystemExit(f"{site} holds no page.")
    number = 0
    for path in pages:
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        number += len(page.found)
        for address in page.found:
            print(f"{path}: {address}")
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"url\(['\"]?((?:https?:)?//[^)'\"]+)", path.read_text("utf-8")
        ):
            number += 1
            print(f"{path}: {address}")
    print(f"{len(pages)} pages, {number} addresses of other hosts loaded")
    return number


if __name__ == "__main__":
    sys.exit(min(main(pathlib.Path(sys.argv[1])), 1))
