"""The one table of methods, and everything that repeats it."""

import dataclasses
import pathlib
import re

import pytest

from anchor_jax.cache import catalog, policies, tables
from anchor_jax.cache.actions import SwitchAction
from anchor_jax.cache.catalog import CATALOG, POLICIES, ROPES, SWITCHES, TEACHER
from anchor_jax.cache.junctions import Junction
from anchor_jax.cache.policies import Recache
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative, RopeRule
from anchor_jax.streaming.recipe import describe, rebuild

ROOT = pathlib.Path(__file__).parents[2]
CACHE = ROOT / "anchor_jax" / "cache" / "README.md"
PAGES = [ROOT / "README.md", CACHE]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def below(kind):
    """Returns a class and every class that derives from it."""
    return {kind}.union(*map(below, kind.__subclasses__()))


def test_policies_are_the_catalogs():
    assert policies.POLICIES is POLICIES
    assert [*POLICIES, TEACHER] == list(CATALOG)
    assert [name for name, one in CATALOG.items() if one.policy is None] == [TEACHER]


@pytest.mark.parametrize(
    "table", [CATALOG, ROPES, SWITCHES], ids=["", "rope", "switch"]
)
def test_every_entry_has_one_sentence(table):
    sentences = [entry.about for entry in table.values()]

    assert len(set(sentences)) == len(sentences)
    assert all(sentence and sentence == sentence.strip(" .") for sentence in sentences)
    assert not any("\n" in sentence or "|" in sentence for sentence in sentences)


@pytest.mark.parametrize("path", PAGES, ids=["README", "cache/README"])
def test_tables_of_the_pages_are_those_of_the_catalog(path):
    text = path.read_text()

    assert "<!-- anchor-jax policies: " in text
    assert tables.updated(text) == text, (
        "generate the table again: anchor-jax policies"
        f" --update={path.relative_to(ROOT)}"
    )


def test_pages_list_the_methods_that_have_a_source():
    names = [line.split("`")[1] for line in tables.markdown(["policy", "source"])[2:]]

    assert names == [name for name, entry in CATALOG.items() if entry.source]
    assert {"anchor_forcing", "longlive", "causvid", TEACHER} <= set(names)


def test_an_unknown_column_of_a_page_is_refused():
    with pytest.raises(ValueError, match="did you mean 'source'"):
        tables.updated("<!-- anchor-jax policies: sorce -->\n")


def test_every_part_of_a_method_is_in_the_catalog():
    kinds = below(Junction) | below(RopeRule) | below(SwitchAction)

    assert kinds - set(catalog.PARTS) == {RopeRule, SwitchAction}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("cut", [None, 45])
def test_a_rope_rule_is_read_again_from_a_recipe(name, cut):
    rule = ROPES[name].make(9, cut)

    assert type(rule) is ROPES[name].rule
    assert rebuild(describe(rule), "here") == rule


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_action_is_read_again_from_a_recipe(name):
    action = SWITCHES[name].action

    assert rebuild(describe(action), "here") == action


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_read_again_from_a_recipe(name):
    assert rebuild(describe(POLICIES[name]), "here") == POLICIES[name]


def test_ropes_take_the_window_or_a_range_of_their_own():
    made = {name: rope.make(9, 45) for name, rope in ROPES.items()}

    assert made["absolute"] == Absolute()
    assert made["relative"] == Relative(range=9, cut=45)
    assert made["tri_region"] == Relative(range=21, cut=45)
    assert made["bounded"] == Bounded(range=21, cut=45)
    assert made["ranked"] == Ranked(range=9, cut=45)
    ends = {name for name, rope in ROPES.items() if rope.ends_at_window}
    assert {"relative", "ranked"} <= ends
    assert not {"absolute", "tri_region", "bounded"} & ends


@pytest.mark.parametrize("rule", [Bounded(range=12), Ranked(range=12)])
@pytest.mark.parametrize("zero", [False, True])
def test_a_rule_refuses_a_sink_that_is_replaced(rule, zero):
    longlive = POLICIES["longlive_relative"]
    replaced = Recache(rewrite_sink=True, zero_sink=zero)

    with pytest.raises(ValueError, match="re-cache that replaces the sink"):
        dataclasses.replace(longlive, positions=rule, on_switch=replaced)


def test_a_rule_is_released_as_the_published_code_has_it():
    assert Relative(6, cut=45).released() == Ranked(6, cut=45)
    for rule in (Absolute(), Relative(12), Bounded(21, cut=45), Ranked(6, cut=45)):
        assert rule.released() == rule


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_name_policies_of_the_catalog_and_no_list_of_them(path):
    text = path.read_text()
    named = re.findall(r"\.policy = \"(\w+)\"|policy: str = \"(\w+)\"", text)

    assert {name for pair in named for name in pair if name} <= CATALOG.keys()
    assert not any(f"{name}, " in text for name in (*ROPES, *SWITCHES, "longlive"))


def test_the_table_names_rope_rules_as_the_config_does():
    shown = {line.split()[0]: line for line in tables.text() if line}

    assert "tri_region 0-20" in shown["anchor_forcing"]
    assert "relative 0-11" in shown["longlive_relative"]
    assert "ranked 0-5" in shown["infinity_rope_release"]
