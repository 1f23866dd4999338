"""README, LOG.md and docs/: how long they are, how wide, and where their links lead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "LOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    """Returns the relative links of a page, [text](target) or [name]: target, which lead nowhere, and the names of
    reference links which have no target."""
    targets = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.M))
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *targets.values()]
    lost = [name for name in re.findall(r"\]\[([^\]]+)\]", text) if name not in targets]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            lost.append(link)
    return lost


def test_the_first_page_and_the_log_stay_short():
    assert len(read("README.md").splitlines()) <= 140
    assert len(read("LOG.md").splitlines()) <= 500


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_120_columns(page):
    """Rows of tables in docs/ may be longer: Markdown cannot break them. So may a line that holds one long link."""
    wide = [line for line in read(page).splitlines() if len(line) > 120]
    if page.startswith("docs/"):
        wide = [line for line in wide if not line.startswith("|")]
    assert not [line for line in wide if " " in line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    assert not broken_links(page, read(page))


def test_a_broken_link_is_named():
    text = "[a](nothing.md) [b](../README.md#start) [c](#no-such-part) [d](https://x.org/y) ![e][badge]"
    assert broken_links("docs/data.md", text) == ["badge", "nothing.md", "#no-such-part"]
    assert broken_links("docs/data.md", "[a][x] [b](#the-hub)\n\n[x]: cloud.md\n") == []


def test_every_long_entry_is_linked_from_the_log():
    linked = set(re.findall(r"\((docs/log/[\w-]+\.md)", read("LOG.md")))
    assert linked == {page for page in PAGES if page.startswith("docs/log/")}


def test_ci_runs_the_command_of_the_readme():
    command = "pip install -r tests/requirements.txt && pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert command in read("README.md").splitlines()
    assert f"{command} || exit" in read(".ci/run").splitlines()
