"""Promises of README's tables: every method and topology is there, with the messages and buffers that it really has."""

import re
from pathlib import Path

from fused_dlam import rules, topology

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def rows(header):
    """{name: cells} of the table that begins with this header."""
    table = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return {name: row for row in cells for name in re.findall(r"`([a-z0-9-]+)`", row[0])}


def test_every_method_with_its_messages_and_state():
    table = rows("| method | sends | update |")
    plain = {name for name in rules.ALL if not name.startswith("nesterov-")}
    assert set(table) == plain
    for name in plain:
        messages, state = table[name][3:5]
        rule = rules.ALL[name]
        assert messages == ("" if rule.average == "gradient" else str(rule.messages)), name
        assert state == str(len(rule.state)), name
    for name in rules.NESTEROV:
        assert f"`nesterov-{name}`" in README


def test_every_topology():
    assert set(rows("| topology | each worker hears from |")) == set(topology.FAMILY)
