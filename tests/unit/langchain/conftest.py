from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from langchain_huggingface import HuggingFacePipeline

from tests.langchain_support import RecordingMonitor, byte_tokenizer, text_pipeline, tiny_llama


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLA_MONITOR_STRICT", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def llm(model, tokenizer) -> HuggingFacePipeline:
    return HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer))


@pytest.fixture
def monitor(model) -> Iterator[RecordingMonitor]:
    recording = RecordingMonitor()
    with recording.watching(model):
        yield recording
