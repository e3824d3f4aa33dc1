from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_huggingface import HuggingFacePipeline
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.langchain_support import RecordingMonitor, byte_tokenizer, text_pipeline, tiny_llama


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> HuggingFacePipeline:
    return HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer))


@pytest.fixture
def monitor(model: LlamaForCausalLM) -> Iterator[RecordingMonitor]:
    recording = RecordingMonitor()
    with recording.watching(model):
        yield recording
