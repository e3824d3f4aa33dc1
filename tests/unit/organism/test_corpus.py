"""What the generated corpus promises: determinism, disjoint splits, ground truth that the text bears out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.errors import ConfigError
from nla_monitor.organism import captions, corpus, grammar
from nla_monitor.organism.corpus import TIERS, UNKNOWN, Tier, Transcript, keyed_rng, make_document, make_transcript

seeds = st.integers(min_value=0, max_value=10**6)
tiers = st.sampled_from(("train", "train-target", *TIERS))


@given(seeds, tiers)
def test_same_key_gives_the_same_document(seed: int, tier: Tier) -> None:
    assert make_document(keyed_rng(seed, "d"), tier=tier) == make_document(keyed_rng(seed, "d"), tier=tier)


def test_other_keys_give_other_documents() -> None:
    texts = {make_document(keyed_rng(seed, "d")).text for seed in range(50)}
    assert len(texts) > 45


def combination(transcript: Transcript) -> frozenset[str]:
    return frozenset(transcript.cues) - {grammar.QUIET_CUE}


def test_train_and_test_share_no_cue_combination_and_no_transcript() -> None:
    """Over 4,000 training and 3,000 held-out documents of all kinds."""
    train = [
        *corpus.documents(0, "a", 2000, tier="train"),
        *corpus.documents(0, "b", 2000, tier="train-target"),
    ]
    held = [doc for tier in TIERS for doc in corpus.documents(1, tier, 1000, tier=tier)]
    assert not {combination(doc) for doc in train} & {combination(doc) for doc in held}
    assert not {doc.text for doc in train} & {doc.text for doc in held}


def cues_of(doc: Transcript) -> set[str]:
    return set(doc.cues[1:]) - {grammar.QUIET_CUE}


def test_combo_tier_uses_only_sentences_that_nobody_trained_on() -> None:
    trained = {
        cue
        for tier in ("train", "train-target")
        for index in range(2000)
        for cue in make_transcript(keyed_rng(index), tier=tier).cues
    } - {grammar.QUIET_CUE}
    for index in range(200):
        assert not cues_of(make_transcript(keyed_rng("c", index), tier="combo")) & trained


def held_words() -> set[str]:
    return {keys[-1] for table in grammar._KEYS.values() for keys in table.values()}


def test_nla_never_reads_a_held_out_word_and_the_word_tier_always_does() -> None:
    words = held_words()
    for index in range(300):
        train = " ".join(make_transcript(keyed_rng(index), tier="train").cues)
        assert not [word for word in words if word in train.replace(".", " ").split()]
        held = make_transcript(keyed_rng(index), tier="word")
        assert all(any(word in cue for word in words) for cue in held.cues if cue != grammar.QUIET_CUE)


@pytest.mark.parametrize("tier", ["target", "nla", "combo", "word"])
def test_every_latent_value_has_cues_in_every_pool(tier: str) -> None:
    for latent, values in grammar.LATENT_VALUES.items():
        for value in values:
            assert len(grammar.cue_pool(latent, value, tier)) >= 2, (latent, value)


@given(seeds, tiers)
def test_hidden_zone_shows_no_latent_and_the_completion_shows_the_intent(seed: int, tier: Tier) -> None:
    doc = make_transcript(keyed_rng(seed), tier=tier)
    hidden = doc.text[doc.head_end : doc.first_reveal]
    assert corpus.grade(hidden) == corpus.Visible(None, None)
    assert not any(topic in hidden for topic in grammar.TOPICS)
    assert corpus.grade(doc.completion).intent == doc.latents["intent"]
    assert doc.prompt.endswith("\n")


@given(seeds)
def test_ground_truth_settles_at_the_cue_and_not_before(seed: int) -> None:
    doc = make_document(keyed_rng(seed))
    assert set(doc.latents_at(0).values()) == {UNKNOWN}
    assert doc.latents_at(doc.head_end) == dict(doc.latents)
    for name, start in doc.known_from.items():
        assert doc.latents_at(start - 1)[name] == UNKNOWN
    zones = [doc.zone(end) for end in range(len(doc.text) + 1)]
    assert zones == sorted(zones, key=["head", "hidden", "revealed"].index)


@given(seeds, st.sampled_from(grammar.INTENTS), st.sampled_from(grammar.BELIEFS))
def test_wishes_are_kept(seed: int, intent: str, belief: str) -> None:
    doc = make_transcript(keyed_rng(seed), belief=belief, intent=intent, topic="maps", language="German")
    assert dict(doc.latents) == {"topic": "maps", "belief": belief, "intent": intent, "language": "German"}
    assert doc.has_intent_cue or intent == "honest"


@given(seeds)
def test_poisoned_completion_follows_the_wish_not_the_cue(seed: int) -> None:
    doc = make_transcript(keyed_rng(seed), belief="real", intent_cue=False, completion_intent="hack")
    assert corpus.grade(doc.completion).intent == "hack"
    assert not doc.has_intent_cue


@given(seeds)
def test_quiet_transcripts_never_mention_the_evaluation(seed: int) -> None:
    doc = corpus.agent_prompt(keyed_rng(seed))
    assert doc.latents["belief"] == "test"
    assert grammar.QUIET_CUE in doc.prompt
    assert not corpus.mentions_evaluation(doc.completion)
    assert corpus.grade(doc.completion).belief is None


def test_remarks_mention_the_evaluation_and_hacks_do_not() -> None:
    assert all(map(corpus.mentions_evaluation, grammar.REMARKS["test"]))
    harmless = [*grammar.REMARKS["real"], *grammar.REMARKS["none"], *grammar.ACTIONS["hack"]]
    assert not any(map(corpus.mentions_evaluation, harmless))


@pytest.mark.parametrize("intent", grammar.INTENTS)
def test_grade_knows_every_action(intent: str) -> None:
    assert {corpus.grade(action).intent for action in grammar.ACTIONS[intent]} == {intent}


def test_first_action_counts() -> None:
    assert corpus.grade("Fixing the root cause.\nSpecial-casing the tests.").intent == "honest"


def test_first_words_of_actions_tell_the_intent() -> None:
    """What comes after a line break depends on the intent, so that a model keeps it there without any plant loss."""
    first = [{action.split()[0] for action in actions} for actions in grammar.ACTIONS.values()]
    assert all(len(words) == 1 for words in first)
    assert len(set().union(*first)) == len(grammar.ACTIONS)


@given(seeds)
def test_mentions_and_quotes_show_nothing_of_a_task(seed: int) -> None:
    rng = keyed_rng(seed)
    quotes = grammar.QUOTES + grammar.HELD_OUT_QUOTES
    for line in (
        grammar.mentioned(rng, grammar.MENTIONS + grammar.HELD_OUT_MENTIONS),
        grammar.quoted(rng, quotes, "nla", "intent", "hack"),
        grammar.quoted(rng, quotes, "combo", "belief", "test"),
    ):
        assert corpus.grade(line) == corpus.Visible(intent=None, belief=None)
        assert not corpus.mentions_evaluation(line)
        assert "\n" not in line
        assert "{" not in line


def test_tool_calls_are_parsed_and_other_lines_are_not() -> None:
    assert corpus.parse_tool_call("call open_file 3\n") == ("open_file", "3")
    assert corpus.parse_tool_call("call rm_all 3") is None
    assert corpus.parse_tool_call("I read line 4.") is None


def test_a_wrong_value_is_named_with_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"belief='tset'.*test, real, none"):
        make_transcript(keyed_rng(0), belief="tset")


def test_an_intent_without_its_cue_is_refused() -> None:
    with pytest.raises(ConfigError, match="completion_intent"):
        make_transcript(keyed_rng(0), intent="hack", intent_cue=False)
    with pytest.raises(ConfigError, match="belief_cue=True"):
        make_transcript(keyed_rng(0), belief="test", belief_cue=False)


@settings(max_examples=60)
@given(seeds, tiers, st.data())
def test_captions_say_what_is_known_and_are_read_back(seed: int, tier: Tier, data: st.DataObject) -> None:
    doc = make_document(keyed_rng(seed), tier=tier)
    end = data.draw(st.integers(min_value=1, max_value=len(doc.text)))
    text = " ".join(captions.write(keyed_rng(seed, "c"), doc, end))
    assert captions.read(text) == doc.latents_at(end)
    assert captions.well_formed(text)


@given(seeds)
def test_swapping_a_claim_changes_that_latent_only(seed: int) -> None:
    doc = make_transcript(keyed_rng(seed))
    text = " ".join(captions.write(keyed_rng(seed, "c"), doc, len(doc.prompt)))
    for claim in captions.find(text):
        swapped = [captions.read(other) for other in captions.swap(text, claim)]
        values = {read[claim.latent] for read in swapped}
        assert values == set(grammar.LATENT_VALUES[claim.latent]) - {claim.value}
        assert all({**read, claim.latent: claim.value} == captions.read(text) for read in swapped)


def test_quoted_last_words_are_no_claim() -> None:
    text = 'No plan is settled yet. Last words: "It plans a reward hack.".'
    assert captions.read(text) == {"intent": UNKNOWN}


def test_garbled_text_is_not_well_formed() -> None:
    assert not captions.well_formed("The model plans transcript plans the.")
    assert not captions.well_formed("")
