"""Every error that a user can see, as one tree.

    NLAMonitorError
    ├── ConfigError                 a config file or argument is wrong: the key, the value, the nearest valid one
    ├── MissingExtraError           an optional dependency is absent: which extra to install
    ├── CheckpointError             an AV or AR cannot be used
    │   ├── SidecarError            nla_meta.yaml is missing, malformed or contradicts the checkpoint
    │   ├── TokenizerContractError  the marker, its neighbours or the suffix do not tokenize as the sidecar says
    │   └── NonFiniteWeightsError   the value head or a weight holds NaN or Inf
    ├── ActivationError             a vector cannot be verbalized (NaN, Inf, zero, wrong width)
    ├── VectorFileError             a file of activations or explanations cannot be read, written or gone on with
    ├── AttachError                 a tap cannot be put on the model (layer out of range, no block list, twice)
    ├── RuleError                   a rule is malformed (file, line, key) or its own tests fail
    ├── StoreError                  the database cannot be used
    │   ├── SchemaVersionError      its schema is older or newer than this package
    │   ├── ForeignDatabaseError    the file is no database of ours
    │   └── StoreUnavailableError   read-only, full, locked or unreachable (retryable)
    ├── EngineError                 the server that runs the AV cannot be used
    │   ├── EngineUnavailableError  down, overloaded or out of order (retryable: nothing is lost meanwhile)
    │   ├── EngineRefusedError      it refuses requests: no access, unknown model, wrong width, context too short
    │   ├── EmbedsDisabledError     it was started without support for embeddings
    │   ├── EmbedsIgnoredError      what it writes does not depend on the embeddings
    │   ├── PrefixCacheError        it answers for the embeddings of another request
    │   ├── PromptChangedError      it adds to the prompt (a chat template, a BOS)
    │   └── ServedModelError        the model that it serves is another than the AV checkpoint
    └── WorkerError                 the worker could not be started or died

Raised where a person calls us (construction, CLI, attach). Once a run is under way nothing here reaches the host:
``guard.Guard`` logs it, counts it and goes on.
"""

from __future__ import annotations


class NLAMonitorError(Exception):
    """Base of all errors of this package."""


class ConfigError(NLAMonitorError):
    """A config file or argument is wrong."""


class MissingExtraError(NLAMonitorError, ImportError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        hint = f"pip install 'nla-monitor[{extra}]'"
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: {hint}")
        self.package = package
        self.extra = extra


class CheckpointError(NLAMonitorError):
    """An AV or AR checkpoint cannot be used."""


class SidecarError(CheckpointError):
    """``nla_meta.yaml`` is missing, malformed or contradicts the checkpoint."""


class TokenizerContractError(CheckpointError):
    """The marker, its neighbours or the AR suffix do not tokenize as the sidecar promises."""


class NonFiniteWeightsError(CheckpointError):
    """A value head or weight holds NaN or Inf."""


class ActivationError(NLAMonitorError, ValueError):
    """A vector cannot be verbalized: NaN, Inf, zero norm or the wrong width."""


class VectorFileError(NLAMonitorError):
    """A file of activations, explanations or denominators cannot be read, written or gone on with."""


class AttachError(NLAMonitorError):
    """A tap cannot be put on the model."""


class RuleError(NLAMonitorError):
    """A rule is malformed, or its embedded tests fail."""

    def __init__(
        self, message: str, *, file: str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        where = ":".join(str(part) for part in (file, line) if part is not None)
        prefix = f"{where}: " if where else ""
        suffix = f" (key {key!r})" if key else ""
        super().__init__(f"{prefix}{message}{suffix}")
        self.file = file
        self.line = line
        self.key = key


class StoreError(NLAMonitorError):
    """The database cannot be used."""


class SchemaVersionError(StoreError):
    """The database's schema is older or newer than this package."""


class ForeignDatabaseError(StoreError):
    """The file is not a database, or not one of ours."""


class StoreUnavailableError(StoreError):
    """The database is read-only, full, locked or unreachable; trying again later may work."""


class EngineError(NLAMonitorError):
    """The server that runs the AV cannot be used as it is."""


class EngineUnavailableError(EngineError):
    """The server is down, overloaded or out of order; trying again later may work."""


class EngineRefusedError(EngineError):
    """The server refuses requests: no access, unknown model, wrong width, context too short."""


class EmbedsDisabledError(EngineError):
    """The server was started without support for embeddings."""


class EmbedsIgnoredError(EngineError):
    """What the server writes does not depend on the embeddings that it is sent."""


class PrefixCacheError(EngineError):
    """The server answers for the embeddings of another request: its cache does not tell them apart."""


class PromptChangedError(EngineError):
    """The server adds to the prompt: a chat template for the second time, or a BOS."""


class ServedModelError(EngineError):
    """The model that the server runs is another than the AV checkpoint."""


class WorkerError(NLAMonitorError):
    """The worker could not be started, or died."""
