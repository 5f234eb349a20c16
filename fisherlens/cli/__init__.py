"""The command line: ``fisherlens report``, ``compare``, ``verify``, ``problems`` and ``notebooks``."""

from fisherlens.cli.analyse import report
from fisherlens.cli.group import BAD_INPUT, INTERRUPTED, commands, main
from fisherlens.cli.lists import notebooks, problems
from fisherlens.cli.training import compare, verify

__all__ = ["BAD_INPUT", "INTERRUPTED", "commands", "compare", "main", "notebooks", "problems", "report", "verify"]

for _command in (report, compare, verify, problems, notebooks):  # in the order in which they teach
    commands.add_command(_command)
