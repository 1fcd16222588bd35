"""The README is short and true: its loop runs, its sentences are short, and its links lead somewhere."""

import torch
import torch.nn.functional as F

from .helpers import mlp
from .pages import RAW, REPOSITORY, ROOT, SITE, anchors_of, links_of, python_of, sentences_of, text_of

README = "README.md"


def test_it_is_short():
    assert len(text_of(README).splitlines()) <= 120


def test_no_sentence_is_long():
    long = [sentence for sentence in sentences_of(README) if len(sentence.split()) >= 25]
    assert not long


def test_the_loop_runs_as_it_stands():
    model = mlp()
    (loop,), (x, y) = python_of(README), (torch.randn(12, 5), torch.randint(3, (12,)))
    scope = {"model": model, "loss_fn": F.cross_entropy, "loader": [(x, y)] * 20, "epochs": 3}
    first = F.cross_entropy(model(x), y).item()
    exec(loop, scope)
    assert scope["scheduler"].last_probe.step == 30  # the second half has none
    assert F.cross_entropy(model(x), y).item() < 0.5 * first


def test_links_lead_to_a_page_or_file():
    """None is relative: the README is shown in other places than the repository."""
    links = links_of(README)
    assert len(links) > 15
    for link in links:
        if link.startswith(SITE):
            name, _, anchor = link.removeprefix(SITE).partition("#")
            folder = "docs/" + name.rstrip("/")
            pages = [page for page in (f"{folder}.md", f"{folder}/index.md") if (ROOT / page).is_file()]
            assert pages, link
            assert not anchor or anchor in anchors_of(pages[0]), link
        else:
            file = link.removeprefix(RAW).removeprefix(f"{REPOSITORY}/blob/main/")
            assert (ROOT / file.removeprefix(f"{REPOSITORY}/tree/main/")).exists(), link
