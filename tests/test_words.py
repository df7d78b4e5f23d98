"""Plain English: phrases that docstrings, messages, comments and pages avoid.

A phrase stands here with the words to write instead. A quotation that must keep a
phrase goes into `QUOTATIONS`.
"""

import ast
import io
import json
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("anchor_jax", "configs", "launch", "tests")
CODE = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
CODE.append(ROOT / "setup.py")
PAGES = [ROOT / "README.md"] + [
    path
    for name in (*FOLDERS, ".github")
    for path in sorted((ROOT / name).rglob("*.md"))
]
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))
SCRIPTS = [
    ROOT / ".ci" / "run",
    ROOT / "launch" / "Dockerfile",
    ROOT / "launch" / "clusters" / "jobset.yaml",
    *sorted((ROOT / "launch").rglob("*.sh")),
    *sorted((ROOT / "launch").rglob("*.sbatch")),
]
AVOID = {
    r"\bso many\b": "the name of the number: '`steps` updates', 'this many devices'",
    r"\btold\b": "'is given', 'knows' or 'is known'",
    r"(?:^|[.;:] )Of (?!course)": "a sentence with a subject: 'Part of ...'",
    r"^\s*\**\w+: of ": "the noun first: 'seed: seed of the noise'",
    r"^\s*\w+: likewise\b": "the meaning again, or 'as for `x`'",
    r"\bexpected \d+ ?(?:\+|or more\b)": "'must be at least N'",
    r"\bexpected more than\b": "'must be above N'",
    r"\bfill(?:s|ed)? up\b": "'is inferred', 'is padded'",
    r"\b(?:goes|go|went|gone|going) on\b": "'continues', 'resumes', 'takes place'",
    r"\b(?:frames|bytes|operations) a second\b": "'per second'",
    r"\bmended\b": "'repaired'",
    r"\basked for\b": "'requested'",
    r"\bwhatever\b": "'every', 'any', 'independent of'",
    r"\b(?:known|heard|is said) of\b": "'about', or a verb",
    r"\bput (?:it|them|the \w+) back\b": "'restore it'",
    r"\bno number of\b": "'not a number of'",
    r"\b(?:which|it|that|one|guidance|1) is none\b": "'is not one', 'is off'",
    r"\bat hand\b": "'available', 'this machine'",
    r"\bas (?:it is|they are|it lies|they lie)(?= ?[.,;:|])": "'unchanged'",
    r"\bcomes? to that\b": "'in addition', 'the total is'",
    r"\bunder way\b": "'current', 'running', 'unfinished'",
    r"\bmakes? no sense\b": "'cannot be combined', 'is invalid'",
    r"\b(?:is|are) not there\b": "'is missing', 'is absent'",
    r"\bwithout a value\b": "'None', 'default'",
    r"\banew\b": "'again'",
    r"\bbegun\b": "'started'",
    r"\btrained along\b": "'trained too'",
    r"\bwhat is wrong with\b": "'the faults of'",
    r"\ball the same[;.]": "'anyway'",
    r"\bfor good\b": "'permanently', 'never evicted'",
    r"\bleads? away from\b": "'negative prompt of the guidance'",
    r"\b(?:lies?|lay) (?:in|on|beside|below|near)\b": "'is in', 'is beside'",
    r"\bwhat lies\b": "'the content of ...'",
    r"\b(?:lines?|messages?|notes?|reports?|sentence) on (?!standard\b|stderr\b)": (
        "'... about'"
    ),
    r"\bfrom (?:a|the|that|now|it)(?: \w+)? on\b": "'from', 'after', 'starting at'",
    r"\bfor ever\b": "'without end', 'unlimited'",
    r"\blooked for\b": "'searched', 'expected'",
    r"\bhalf (?:made|way)\b": "'incomplete', 'in the middle'",
    r"\banother \w+ than\b": "'different from', 'other than'",
    r"\bwhere there is none\b": "'if there is no ...'",
    r"\bwhat is wanted\b": "'the requested ...'",
    r"\bcounts? apart\b": "'separately'",
    r"\bfits? no\b": "'does not fit into any'",
    r"\b[Ss]o (?:long|large|many) an?\b": "'such a long'",
    r"\bby turns\b|\bin turn with\b": "'alternately'",
    r"\b(?<![Tt]here\s)(?:is|are) no (?!longer\b|more\b|less\b)[a-z]": "'is not a'",
}
"""Regular expressions of phrases, with the words to write instead."""

QUOTATIONS: set[tuple[str, str]] = set()
"""(file, line without its indent) of quotations that keep a phrase."""


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def strings(tree):
    """Yields line and text of every string, with the parts of f-strings joined."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(map(id, ast.walk(node)))
            parts = [
                p.value if isinstance(p, ast.Constant) else "{}" for p in node.values
            ]
            yield node.lineno, "".join(parts)
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in inner:
            yield node.lineno, node.value


def names(tree):
    """Yields line and name of every function and class, as words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")


def texts(path):
    """Yields the first line and the text of everything that a reader may see."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(content)["cells"]
        yield from ((1, "".join(cell["source"])) for cell in cells)
        return
    if path.suffix != ".py":
        comments = re.sub(r"^# ?", "", content, flags=re.MULTILINE)
        yield 1, content if path.suffix == ".md" else comments
        return
    tree = ast.parse(content)
    yield from strings(tree)
    yield from names(tree)
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#! ")


def found(path):
    """Yields a line for each phrase of a file that is to be avoided."""
    for first, text in texts(path):
        for pattern, instead in AVOID.items():
            # A phrase may be broken over lines, but not over paragraphs.
            broken = pattern.replace(" ", r"(?: |\n *)")
            for match in re.finditer(broken, text, re.MULTILINE):
                number = text.count("\n", 0, match.start())
                line = text.split("\n")[number].strip()
                if (name_of(path), line) not in QUOTATIONS:
                    phrase = " ".join(match[0].split())
                    yield f"{name_of(path)}:{first + number}: {phrase!r}: {instead}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        path
        for path in CODE + PAGES + NOTEBOOKS + SCRIPTS
        if path.name != "test_words.py"
    ],
    ids=name_of,
)
def test_files_are_in_plain_english(path):
    problems = list(found(path))

    assert not problems, "write instead:\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""Returns so\n  many."""', 1),
        ('f"{1} is put\x20back: put it back"', 1),
        ("# Of a script.\nx = 1", 1),
        ("def test_what_goes_on():\n    pass", 1),
        ('"""Doc.\n\nArgs:\n  seed: of the noise.\n"""', 1),
        ('"""Makes one of two."""', 0),
    ],
)
def test_phrases_are_found(tmp_path, monkeypatch, text, count):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text(text)

    assert len(list(found(path))) == count
