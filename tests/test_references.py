"""References: what code says of a page, and pages of one another, leads somewhere.

Code refers to a page below `anchor_jax` and to headings on it: PAGE, "HEADING".
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "anchor_jax"
FOLDERS = ("anchor_jax", "configs", "launch", "tests")
CODE = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
PAGES = [ROOT / "README.md"] + [
    path for name in FOLDERS for path in sorted((ROOT / name).rglob("README.md"))
]
# Documents that the repository does not have; split, as this file is searched too.
GONE = ("algorithm" + ".md", "design" + "-notes", "style" + ".md")
REFERENCE = re.compile(r'([\w/]*\w/README\.md)((?:, "[^"]+")+)')
MENTION = re.compile(r"\b(?:cache|porting|training|wan)/README\.md\b(?!, \"|\")")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def flat(text):
    """Returns code with comment signs gone and every white space one space."""
    return " ".join(re.sub(r"^\s*#+ ", " ", text, flags=re.MULTILINE).split())


def headings(path):
    """Returns the headings of a page, without those inside code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE)


def anchor(heading):
    """Returns what a link to a heading ends in."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def references(text):
    """Returns page and heading of every reference in a file of code."""
    return [
        (page, heading)
        for page, quoted in REFERENCE.findall(flat(text))
        for heading in re.findall(r'"([^"]+)"', quoted)
    ]


def problems(text):
    """Returns the faults of the references in a file of code."""
    found = [f"names {name}" for name in GONE if name in text]
    found += [f"names {page} without a heading" for page in MENTION.findall(flat(text))]
    for page, heading in references(text):
        path = PACKAGE / page
        if not path.is_file():
            found.append(f"{page} does not exist")
        elif heading not in headings(path):
            found.append(f"{page} has no heading {heading!r}")
    return found


def dead_links(path):
    """Returns the links of a page to anchors that do not exist."""
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text())
    return [
        f"{page}#{fragment}"
        for page, fragment in links
        if "://" not in page
        if not (target := path.parent / page if page else path).is_file()
        or fragment not in map(anchor, headings(target))
    ]


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_code_refers_to_existing_sources(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_link_to_anchors_that_are_there(path):
    assert dead_links(path) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_two_headings_have_one_anchor(path):
    anchors = [anchor(heading) for heading in headings(path)]

    assert len(set(anchors)) == len(anchors)


def test_references_are_found():
    found = [one for path in CODE for one in references(path.read_text())]

    assert len(found) > 40
    assert {page.partition("/")[0] for page, _ in found} >= {"cache", "training", "wan"}


@pytest.mark.parametrize(
    ("page", "heading", "expected"),
    [
        ("cache/README.md", "Re-cache", []),
        ("cache/README.md", "No such part", ["no heading 'No such part'"]),
        ("cache/README.md", "re-cache", ["no heading 're-cache'"]),
        ("nowhere/README.md", "Re-cache", ["nowhere/README.md does not exist"]),
        ("wan/README.md", "Head", []),
    ],
)
@pytest.mark.parametrize("between", [" ", "\n    ", "\n    # "])
def test_a_reference_is_checked_wherever_its_line_breaks(
    page, heading, expected, between
):
    text = f'    # Source: {page},{between}"{heading}".'.replace("such ", "such\n# ")

    found = problems(text)

    assert len(found) == len(expected)
    assert all(ours.endswith(end) for ours, end in zip(found, expected, strict=True))


def test_several_headings_of_a_page_are_all_checked():
    text = '{}, "D2", "D99", and {}, "D1"'.format(
        "cache/README.md", "training/README.md"
    )

    assert references(text)[2] == ("training/README.md", "D1")
    (found,) = problems(text)
    assert found.endswith("no heading 'D99'")


@pytest.mark.parametrize(
    "text", [f"see {GONE[0]} 7.1", "see {}, 3".format("wan/README.md")]
)
def test_other_forms_are_refused(text):
    assert len(problems(text)) == 1


def test_a_link_to_no_anchor_is_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# A, b!\n[x](#a-b) [y](#c) [z](other.md#a)\n```\n# c\n```\n")

    assert dead_links(page) == ["#c", "other.md#a"]


def test_every_difference_has_a_heading_and_a_link():
    found = [
        heading
        for page in ("cache", "training")
        for heading in headings(PACKAGE / page / "README.md")
        if re.fullmatch(r"D\d+", heading)
    ]
    text = (PACKAGE / "cache" / "README.md").read_text()

    assert sorted(found, key=lambda name: int(name[1:])) == [
        f"D{number}" for number in range(1, 29)
    ]
    assert all(
        re.search(rf"\[{name}\]\([^)]*#{name.lower()}\)", text) for name in found
    )
