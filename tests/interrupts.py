"""Processes that are to be interrupted by Ctrl-C."""

from __future__ import annotations

import signal


def listen_to_ctrl_c() -> None:
    """``preexec_fn``: a shell that runs the tests in the background makes its children deaf to SIGINT; undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
