"""Promise: protocol_table.md says of every row what the tests before this one, test_protocol_*.py, have found."""


def test_the_table_is_not_stale(table):
    table.check()
