"""The demo: the whole chain on the bundled organism, offline, on a CPU."""
