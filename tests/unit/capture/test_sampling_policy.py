"""What a config asks for beyond random positions: patterns, roles, text, bursts, sinks; and what it may not ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_kit import EOS, PAD, VOCAB, capturing, make_model, token_batch, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_monitor.capture import sampling
from nla_monitor.capture.budget import NormSinks
from nla_monitor.capture.policy import RANDOM, build_policy, whole
from nla_monitor.capture.sampling import choose
from nla_monitor.capture.triggers import TextTriggers
from nla_monitor.config import CaptureConfig, load_config
from nla_monitor.errors import ConfigError
from nla_monitor.records import AgentContext

_CHATML = (
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% else %}{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no tools') }}{% endif %}"
    "{% endfor %}"
)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and the control tokens of some chat templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens(["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>"], special_tokens=True)
    fast.chat_template = template
    return fast


def _triggered(tokenizer: Any, text: str, **config: Any) -> dict[str, list[str]]:
    """Trigger → the text up to each position that it takes."""
    policy = build_policy(CaptureConfig(tokens_per_sequence=0, triggers_per_sequence=8, **config), tokenizer)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    choice = choose(whole(policy), ids, torch.ones_like(ids, dtype=torch.bool))
    assert choice is not None
    found: dict[str, list[str]] = {}
    for row in sorted(choice.meta.tolist(), key=lambda row: row[sampling.POSITION]):
        if row[sampling.VALID]:
            before = tokenizer.decode(ids[0, : row[sampling.POSITION] + 1])
            found.setdefault(policy.name(row[sampling.KIND]), []).append(before)
    return found


def test_roles_of_a_template_with_control_tokens() -> None:
    tokenizer = byte_tokenizer(_CHATML)
    ask, think = "<|im_start|>user\nhi<|im_end|>", "\n<|im_start|>assistant\n"
    tool = "\n<|im_start|>user\n<tool_response>\n"
    text = f"{ask}{think}ho<|im_end|>{tool}42"
    found = _triggered(tokenizer, text, role_triggers=("turn_end", "assistant", "tool_result"))
    assert found == {
        "turn_end": [ask, f"{ask}{think}ho<|im_end|>"],
        "assistant": [ask + think],
        "tool_result": [f"{ask}{think}ho<|im_end|>{tool}"],
    }


_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}"}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
_BARE = (
    '{% for m in messages %}{% if m.tool_calls %}[A]{"name": "{{ m.tool_calls[0].function.name }}"}[/A]'
    "{% else %}[{{ m.role[0] }}]{{ m.content }}[/]{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)


def test_the_opening_of_a_tool_call_is_found_in_the_template() -> None:
    tokenizer = byte_tokenizer(_TOOLS)
    tokenizer.add_tokens(["<tool_call>"], special_tokens=True)
    before = "<|im_start|>assistant\nlet me look\n<tool_call>"
    found = _triggered(tokenizer, f'{before}\n{{"name": "ls"}}</tool_call><|im_end|>', role_triggers=("tool_call",))
    assert found == {"tool_call": [before]}


def test_without_a_token_of_its_own_a_tool_call_opens_with_its_text() -> None:
    found = _triggered(byte_tokenizer(_BARE), '[A]{"name": "ls"}[/A]', role_triggers=("tool_call",))
    assert found == {"tool_call": ['[A]{"name": "']}


def test_the_end_of_thinking_is_a_token_or_stands_in_the_template() -> None:
    tokenizer = byte_tokenizer(_TOOLS)
    tokenizer.add_tokens(["</think>"])
    found = _triggered(tokenizer, "<think>well</think>the answer", role_triggers=("final_answer",))
    assert found == {"final_answer": ["<think>well</think>"]}
    tokenizer = byte_tokenizer(_TOOLS.replace("<think>", "[THINK][/THINK]"))
    found = _triggered(tokenizer, "[THINK]well[/THINK]the answer", role_triggers=("final_answer",))
    assert found == {"final_answer": ["[THINK]well[/THINK]"]}


def test_roles_of_a_template_whose_turns_end_differently() -> None:
    text = "[INST] hi [/INST] ho</s>[INST] so [/INST]"
    found = _triggered(byte_tokenizer(_INSTRUCT), text, role_triggers=("turn_end", "assistant"))
    assert found == {"turn_end": ["[INST] hi [/INST] ho</s>"], "assistant": ["[INST] hi [/INST]", text]}


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (_INSTRUCT, "tool_result", r"cannot render.*no tools.*capture.triggers"),
        (None, "turn_end", r"cannot render.*capture.triggers"),
        ("always the same", "turn_end", r"'turn_end' is not marked.*capture.triggers"),
        (_CHATML, "tool_call", r"'tool_call' is not marked.*capture.triggers"),
        (_CHATML, "final_answer", r"neither.*</think>.*Leave it out.*prompt_end"),
    ],
)
def test_a_role_that_the_template_does_not_mark_is_refused(template: str | None, role: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_policy(CaptureConfig(role_triggers=(role,)), byte_tokenizer(template))


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"role_triggers": ("assistant",)}, None, r"there is none. Give the tokenizer to attach"),
        ({"triggers": ("w10 elsewhere",)}, word_tokenizer(), r"'w10 elsewhere' can never match.*role_triggers"),
        ({"triggers": (" ".join(["w10"] * 17),)}, word_tokenizer(), r"is 17 tokens.*at most 16.*text_triggers"),
        ({"triggers": ("w10 w11",)}, None, r"cannot be resolved without a tokenizer"),
        ({"triggers": ("64",)}, word_tokenizer(), r"token id 64 can never match: the vocabulary ends at 63"),
        ({"text_triggers": ("w10",)}, None, r"no tokenizer to decode with"),
        ({"text_triggers": ("(?=w)",)}, word_tokenizer(), r"is no RE2 pattern.*look-around"),
        ({"text_triggers": ("w*",)}, word_tokenizer(), r"matches the empty text.*tokens_per_sequence"),
        ({"tokens_per_sequence": 0}, word_tokenizer(), r"nothing can ever be sampled"),
        (
            {"tokens_per_sequence": 0, "triggers": ("w10",), "triggers_per_sequence": 0},
            word_tokenizer(),
            r"nothing can",
        ),
    ],
)
def test_a_policy_that_can_never_match_is_refused(config: dict[str, Any], tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_policy(CaptureConfig(**config), tokenizer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("burst", {"factor": 1}, r"capture.burst.factor = 1"),
        ("burst", {"step": 5}, r"unknown key 'capture.burst.step'; did you mean 'steps'"),
        ("role_triggers", ["turnend"], r"capture.role_triggers.0 = 'turnend'.*turn_end"),
        ("samples_per_second", 0, r"capture.samples_per_second = 0"),
        ("reservoir", 0, r"capture.reservoir = 0"),
        ("norm_sink_factor", 1.0, r"capture.norm_sink_factor = 1.0"),
        ("max_backlog", 0, r"capture.max_backlog = 0"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"capture": {key: value}})


@given(
    row=st.lists(st.integers(10, 12), min_size=1, max_size=24),
    pattern=st.lists(st.integers(10, 12), min_size=2, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_pattern_is_taken_after_its_last_token_wherever_it_stands(row: list[int], pattern: list[int]) -> None:
    tokenizer = word_tokenizer()
    text = " ".join(f"w{token}" for token in pattern)
    config = CaptureConfig(tokens_per_sequence=0, triggers=(text,), triggers_per_sequence=24)
    policy = build_policy(config, tokenizer)
    ids = torch.tensor([[PAD, PAD, *row]])
    choice = choose(whole(policy), ids, ids != PAD)
    assert choice is not None
    valid = choice.meta[choice.meta[:, sampling.VALID] == 1]
    width = len(pattern)
    expected = [end for end in range(width - 1, len(row)) if row[end - width + 1 : end + 1] == pattern]
    assert sorted(valid[:, sampling.POSITION].tolist()) == expected


def test_patterns_are_found_while_a_generation_writes_them() -> None:
    model, tokenizer = make_model(), word_tokenizer()
    prompt = token_batch(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
    pattern = " ".join(f"w{token}" if token > PAD else tokenizer.convert_ids_to_tokens(token) for token in answer[7:9])
    first = next(end for end in range(6, 17) if answer[end - 1 : end + 1] == answer[7:9])
    with capturing(
        model,
        tokenizer=tokenizer,
        triggers=(pattern,),
        tokens_per_sequence=0,
        triggers_per_sequence=1,
        context_tokens=0,
    ) as captured:
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        found = [sample for sample in captured.samples() if sample.trigger == pattern]
    assert [sample.position for sample in found] == [first]


def test_text_triggers_take_the_candidates_at_which_a_match_ends() -> None:
    model, tokenizer = make_model(), word_tokenizer()
    ids = torch.tensor([[3, 10, 11, 5, 10, 12, 10, 11]])
    config: dict[str, Any] = {"text_triggers": (r"W10 w1[12]\b",), "text_candidates": 8, "tokens_per_sequence": 0}
    with capturing(model, tokenizer=tokenizer, store_text=False, **config) as captured, torch.no_grad():
        model(ids)
        samples = captured.samples()
        assert captured.capture.stats.dropped == {}
    assert sorted(sample.position for sample in samples) == [2, 5, 7]
    assert {sample.trigger for sample in samples} == {r"text:W10 w1[12]\b"}
    assert {(sample.context, sample.inclusion_probability) for sample in samples} == {(None, 1.0)}


def test_text_triggers_say_how_probable_a_candidate_was() -> None:
    model, tokenizer = make_model(), word_tokenizer()
    config: dict[str, Any] = {"text_triggers": ("w",), "text_candidates": 3, "tokens_per_sequence": 0}
    with capturing(model, tokenizer=tokenizer, context_tokens=2, **config) as captured, torch.no_grad():
        model(token_batch(1, 12))
        samples = captured.samples()
    assert [sample.inclusion_probability for sample in samples] == [3 / 12] * 3
    assert all(len((sample.context or "").split()) <= 2 for sample in samples)


def test_half_characters_do_not_hide_or_invent_a_match() -> None:
    triggers = TextTriggers(["é!", "\\x{1F600}"])
    assert triggers.first("caf\u00e9!", 4) == "é!"
    assert triggers.first("caf\u00e9!", 5) is None
    assert triggers.first("a\ud83d", 0) is None


def test_a_match_that_overlaps_an_earlier_one_counts() -> None:
    triggers = TextTriggers(["aa", "b.*c"])
    assert [triggers.first("aaa", start) for start in (1, 2, 3)] == ["aa", "aa", None]
    assert triggers.first("b c b c d", 8) is None
    assert triggers.first("b c b c d", 6) == "b.*c"


def test_a_short_sequence_is_read_though_all_of_it_is_early() -> None:
    """Position 10 on where there is any; everything where there is not."""
    policy = build_policy(CaptureConfig(skip_first=10, tokens_per_sequence=4), None)
    ids = torch.randint(3, VOCAB, (3, 14), generator=torch.Generator().manual_seed(0))
    real = torch.arange(14) < torch.tensor([[14], [11], [6]])
    choice = choose(whole(policy), ids, real)
    assert choice is not None
    found: dict[int, list[int]] = {}
    for row in choice.meta[choice.meta[:, sampling.VALID] == 1].tolist():
        found.setdefault(row[sampling.LENGTH], []).append(row[sampling.POSITION])
    assert sorted(found[14]) == [10, 11, 12, 13]
    assert found[11] == [10]
    assert len(found[6]) == 4


def test_triggers_are_taken_however_early() -> None:
    policy = build_policy(CaptureConfig(skip_first=10, tokens_per_sequence=1, triggers=("7",)), None)
    ids = torch.tensor([[7, *range(8, 28)]])
    choice = choose(whole(policy), ids, torch.ones_like(ids, dtype=torch.bool))
    assert choice is not None
    places = {row[sampling.KIND]: row[sampling.POSITION] for row in choice.meta.tolist() if row[sampling.VALID]}
    assert places.pop(2) == 0
    assert places[RANDOM] >= 10


def test_a_burst_looks_more_closely_for_its_steps() -> None:
    model = make_model().train()
    config: dict[str, Any] = {"burst": {"steps": 2, "factor": 3}, "sequences_per_step": 1, "tokens_per_sequence": 2}
    with capturing(model, **config) as captured:
        for step in range(1, 7):
            captured.capture.step(step)
            if step == 3:
                captured.capture.burst()  # an alert, during the step: the rest of it and two more
            model(token_batch(4, 12, seed=step))
        samples = captured.samples()
    counts = [sum(sample.step == step for sample in samples) for step in range(1, 7)]
    assert counts == [2, 2, 18, 18, 18, 2]
    chances = {sample.step: sample.inclusion_probability for sample in samples}
    assert (chances[1], chances[3]) == (1 / 4 * 2 / 12, 3 / 4 * 6 / 12)


def test_a_burst_that_is_not_configured_changes_nothing() -> None:
    model = make_model().train()
    with capturing(model, sequences_per_step=1) as captured:
        captured.capture.burst()
        model(token_batch(4))
        assert len(captured.samples()) == 2


def test_reservoir_takes_fewer_and_fewer_and_starts_anew_with_an_epoch() -> None:
    model = make_model().train()
    counts = []
    with capturing(model, reservoir=4, tokens_per_sequence=4) as captured:
        for step in range(12):
            captured.capture.step(step, epoch=0.5 if step < 11 else 1.0)
            model(token_batch(2, 12, seed=step))
            samples = captured.samples()
            counts.append(len(samples))
            assert all(0 < (sample.inclusion_probability or 0) <= 4 / 12 for sample in samples)
    assert counts[0] == counts[11] == 8
    assert sum(counts[1:11]) < 25


def test_backlog_of_the_reader_thins() -> None:
    model = make_model().train()
    with capturing(model, max_backlog=100, tokens_per_sequence=4, sequences_per_step=64) as captured:
        captured.capture.backlog(40)
        model(token_batch(64, 12))
        assert len(captured.samples()) == 256
        captured.capture.backlog(90)
        model(token_batch(64, 12))
        samples = captured.samples()
    assert [sample.inclusion_probability for sample in samples] == [pytest.approx(0.2 * 4 / 12)] * len(samples)
    assert 25 < len(samples) < 80


def test_norm_sinks_are_left_out_and_counted_but_not_where_a_trigger_asks() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] *= 1e4
    ids = token_batch(32, 12)
    ids[ids == 7] = 8
    sinks = ids.clone()
    sinks[:, 3] = 7
    with capturing(model, tokens_per_sequence=12, sequences_per_step=32, triggers=("9",)) as captured, torch.no_grad():
        model(ids)
        assert captured.capture.stats.skipped == {}
        captured.samples()
        model(sinks)
        samples = captured.samples()
        assert captured.capture.stats.skipped == {"norm_sink": 32}
    assert 7 not in {sample.token_id for sample in samples}
    with capturing(model, tokens_per_sequence=12, sequences_per_step=32, triggers=("7",)) as captured, torch.no_grad():
        model(ids)
        model(sinks)
        assert sum(sample.token_id == 7 for sample in captured.samples()) == 32
    with capturing(model, tokens_per_sequence=12, norm_sink_factor=None) as captured, torch.no_grad():
        model(sinks)
        assert 7 in {sample.token_id for sample in captured.samples()}


def test_norms_that_grow_slowly_are_no_sinks() -> None:
    sinks = NormSinks(5.0)
    assert not any(sinks.is_sink(1.002**step) for step in range(6000))
    assert sinks.is_sink(1.002**6000 * 6)


def test_every_kind_of_sample_says_its_probability() -> None:
    model = make_model()
    prompt = torch.tensor([[9, 9, 9, 10, 11, 12, 13, EOS]])
    with capturing(model, triggers=("9",), triggers_per_sequence=2, tokens_per_sequence=1) as captured, torch.no_grad():
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        model(prompt)
        chances = {sample.trigger: sample.inclusion_probability for sample in captured.samples()}
    assert chances["9"] == 1.0  # the newest two of an agent's prompt, whatever was before
    assert chances["prompt_end"] == 1.0
