"""The command line, ``nla-monitor``. Importing this is cheap: every command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the command's exit code."""
    from nla_monitor.cli.app import run

    sys.exit(run(arguments))
