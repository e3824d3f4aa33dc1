"""A core install without extras works, and says which extra is missing. Run in such an environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

EXTRAS = (
    "accelerate",
    "langchain_core",
    "prometheus_client",
    "psycopg",
    "langchain_huggingface",
    "sentence_transformers",
)
TOOL = Path(sys.executable).parent / "nla-monitor"
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}


def run(*arguments: str, expect: int) -> str:
    """Run the command line tool; its output, both streams."""
    done = subprocess.run(  # noqa: S603 -- our own tool
        [str(TOOL), *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    output = done.stdout + done.stderr
    if done.returncode != expect:
        raise SystemExit(f"nla-monitor {' '.join(arguments)}: exit {done.returncode}, expected {expect}\n{output}")
    return output


def main() -> None:
    """All checks; leaves with a message at the first that fails."""
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        raise SystemExit(f"not a bare environment: {present}")
    run("--version", expect=0)
    run("rules", "test", "oversight", expect=0)
    run("db", "upgrade", "--database", "sqlite:///bare.db", expect=0)
    run("assets", "write", "assets", "--json", expect=0)
    run("alerts", "list", "--json", "--database", "sqlite:///bare.db", expect=0)
    run("doctor", "--av", "organism:planted/av", "--ar", "organism:planted/ar", expect=0)
    run("worker", "--once", "--database", "sqlite:///bare.db", expect=0)
    for arguments, extra in (
        (("demo",), "demo"),
        (("worker", "--once", "--metrics-port", "0", "--database", "sqlite:///bare.db"), "prometheus"),
        (("db", "check", "--database", "postgresql+psycopg://localhost/none"), "postgres"),
    ):
        said = run(*arguments, expect=2)
        if f"nla-monitor[{extra}]" not in said:
            raise SystemExit(f"nla-monitor {' '.join(arguments)} does not name the extra {extra!r}:\n{said}")
    try:
        import nla_monitor_langchain  # noqa: F401, PLC0415 -- the import is what is checked
    except ImportError as error:
        if "nla-monitor[langchain]" not in str(error):
            raise SystemExit(f"nla_monitor_langchain does not name its extra: {error}") from error
    else:
        raise SystemExit("nla_monitor_langchain imports without langchain-core")
    sys.stdout.write("bare install: ok\n")


if __name__ == "__main__":
    main()
