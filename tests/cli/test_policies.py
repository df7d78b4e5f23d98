import re

from anchor_jax.cache.catalog import CATALOG, ROPES, SWITCHES
from anchor_jax.cli import main

PAGE = """# A page

<!-- anchor-jax policies: policy, at a switch -->
| old |
|---|
| row |

After.
"""


def test_every_policy_rope_rule_and_switch_action_is_listed(capsys):
    assert main.main(["policies"]) == 0
    printed = capsys.readouterr().out

    for table in (CATALOG, ROPES, SWITCHES):
        for name, entry in table.items():
            assert re.search(
                rf"^{name} .*{re.escape(entry.about)}$", printed, re.MULTILINE
            )


def test_a_policys_memory_is_shown(capsys):
    assert main.main(["policies", "anchor_forcing"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert "re-cache  33-41@12-20  0-2@0-2" in lines
    expected = "57        57-59@18-20  0-2@0-2  51-56@12-17  42-44@6-8"
    assert expected in lines


def test_the_teacher_is_explained(capsys):
    assert main.main(["policies", "wan_teacher"]) == 0
    printed = capsys.readouterr().out
    assert CATALOG["wan_teacher"].about in printed and "no blocks" in printed


def test_an_unknown_policy_is_refused(capsys):
    assert main.main(["policies", "longlife"]) == 2
    assert "did you mean 'longlive'" in capsys.readouterr().err


def test_a_table_on_a_page_is_generated_again(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(PAGE)

    assert main.main(["policies", f"--update={path}"]) == 0

    lines = path.read_text().splitlines()
    assert lines[:5] == [
        *PAGE.splitlines()[:3],
        "| policy | at a switch |",
        "|---|---|",
    ]
    assert "| `infinity_rope` | flush to sink + 2 |" in lines
    assert lines[-2:] == ["", "After."] and "| row |" not in lines
    path.write_text(PAGE.replace("at a switch", "at a swich"))
    assert main.main(["policies", f"--update={path}"]) == 2
    assert "did you mean 'at a switch'" in capsys.readouterr().err
    assert main.main(["policies", f"--update={tmp_path / 'none.md'}"]) == 2
