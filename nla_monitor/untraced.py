"""The monitor's own work leaves no spans of instrumentation packages.

Whoever instruments HTTP clients, databases or models in a process means the application. Our SQL, our posts about
alerts and the AV's own requests would be noise in its traces, and the monitor would watch itself. OpenTelemetry has a
mark for that, which instrumentation packages honour (also OpenInference's); it travels in the context.

The mark stands in an empty context: where an instrumentation hands contexts on to new threads, work that goes on for
hours must not be told as part of the request during which its thread happened to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import context as api

# The API gives the mark no public name; instrumentation packages look for it under both of these keys
# (opentelemetry.instrumentation.utils.suppress_instrumentation, 0.40b0 to 0.66b2).
_QUIET: Final = api.Context({api._SUPPRESS_INSTRUMENTATION_KEY: True, "suppress_instrumentation": True})  # noqa: SLF001


@contextmanager
def untraced() -> Iterator[None]:
    """Around work of ours; also a decorator. Our own spans are made all the same: they name their sources themselves.

    Not around code of the host (listeners, callbacks), whose spans are its own.
    """
    token = api.attach(_QUIET)
    try:
        yield
    finally:
        api.detach(token)
