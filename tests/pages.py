"""README and the pages of docs/, as the tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/autolr-fast/autolr_fast"
RAW = "https://raw.githubusercontent.com/autolr-fast/autolr_fast/main/"
SITE = "https://autolr-fast.github.io/autolr_fast/"
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "pictures" not in path.parts
)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def python_of(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def links_of(page):
    """The targets of links and pictures."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors_of(page):
    """The anchors that a site, or GitHub, makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def sentences_of(page):
    """The sentences of prose, lists and table cells; a piece of code is one word."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text_of(page), flags=re.DOTALL)
    text = re.sub(r"^::: .*(\n[ ]+.*)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. |\||#)", text):
        for part in block.split("|") if block.startswith("|") else [re.sub(r"^\s*(#+|[-*]|\d+\.) ", "", block)]:
            yield from (" ".join(each.split()) for each in re.split(r"(?<=[.!?])[*)]*\s+", part))
