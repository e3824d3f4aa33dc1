"""Sections of the config that say where findings are shown: trace UIs and experiment trackers.

A module of its own beside ``config``, which holds these sections in ``alerts``; what both need is here.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

VARIABLE = r"^[A-Za-z_]\w*$"
"""Names of environment variables."""


class Section(BaseModel):
    """A part of the config: frozen, and no key in it that nobody reads."""

    # What a validation error quotes may be a URL with a token, and a traceback shows the error that ours comes from.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def checked_url(value: str) -> str:
    """An http(s) URL with a host and nothing secret in it (configs are stored and shown), without a final slash.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if any(mark in value for mark in "@?#"):  # first: what is no URL at all would be repeated in the message
        raise PydanticCustomError("secret", "must hold no user, password or query; use api_key_env")
    if not usable:
        raise ValueError("must be an http:// or https:// URL with a host")
    return value.rstrip("/")


class PhoenixConfig(Section):
    """Findings as annotations on spans in Arize Phoenix."""

    endpoint: str = Field(description="base URL, such as http://localhost:6006")
    api_key_env: str | None = Field(
        None, pattern=VARIABLE, description="environment variable that holds the API key; PHOENIX_API_KEY if it is set"
    )
    content: bool = Field(default=False, description="also send quote and explanation")
    timeout_seconds: float = Field(5.0, gt=0, le=30, description="silence after which a post counts as failed")

    @field_validator("endpoint")
    @classmethod
    def _base_url(cls, value: str) -> str:
        url = checked_url(value)
        if url.endswith("/v1/traces"):
            raise ValueError("must be the base URL, such as http://localhost:6006, without /v1/traces")
        return url


class LangfuseConfig(Section):
    """Findings as scores on observations in Langfuse."""

    host: str | None = Field(
        None, description="base URL, such as https://cloud.langfuse.com; default: LANGFUSE_BASE_URL or LANGFUSE_HOST"
    )
    public_key_env: str = Field("LANGFUSE_PUBLIC_KEY", pattern=VARIABLE, description="variable with the public key")
    secret_key_env: str = Field("LANGFUSE_SECRET_KEY", pattern=VARIABLE, description="variable with the secret key")
    content: bool = Field(default=False, description="also send quote and explanation")
    timeout_seconds: float = Field(5.0, gt=0, le=30, description="silence after which a post counts as failed")

    @field_validator("host")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return None if value is None else checked_url(value)


class TrackerConfig(Section):
    """Alerts as notes on the run in the tracker that the training has open: W&B, MLflow, Trackio, TensorBoard."""

    notes: bool = Field(default=True, description="leave a note for each alert; the figures under nla/ are not meant")
    content: bool = Field(default=False, description="also write quote and explanation into the note")
