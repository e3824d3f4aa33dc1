"""The controls of candidates: rules, AV, AR and store put together; what each control means is in ``evidence``.

The cascade: on every match the echo, the swap margin (one batched AR call) and what its rule requires; the dear ones
(resamples, claim probability, nulls) last, and not for a match that a cheaper one has refuted. For the reading that an
alert shows, ``complete`` measures all the others too. Nothing is done where nothing matches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Protocol

import numpy as np

from nla_monitor.candidates import DEAR, Candidate, Job, Measured, Plan, plan_of, prepare, run_together
from nla_monitor.evidence.bounds import Bound
from nla_monitor.evidence.echo import continuation, echo
from nla_monitor.evidence.negation import PROBES, negated, reads_negation
from nla_monitor.evidence.norms import FEWEST_NORMS, norm_ratio
from nla_monitor.evidence.nulls import Vectors, coordinate_shuffled, gaussian, percentile, seed_of
from nla_monitor.evidence.probability import claim_probability
from nla_monitor.evidence.swap import ablated, ablation_rank, claim_of, swap_margin, swapped
from nla_monitor.nla.base import Choice, ClaimScorer, Reconstructor, Resampler, Score, Verbalization, Verbalizer
from nla_monitor.nla.fidelity import record_of
from nla_monitor.records import ActivationSample, Explanation, Match, Reading, Support, Vector
from nla_monitor.rules import RuleSet
from nla_monitor.rules.evaluate import evaluate_rule
from nla_monitor.rules.evidence_schema import CONTROLS
from nla_monitor.rules.rule import Rule

NULLS: Final = 32
"""Random directions that stand for "any vector"; read once for a pair of AV and AR."""
_SHUFFLES: Final = 4
_RECENT: Final = 16
_LAYERS: Final = 4
_NO_AR: Final = "no AR is configured"
_NO_AV: Final = "no AV is at hand"
_NO_QUOTE: Final = "the match quotes no words"
_NO_STORE: Final = "no store is at hand"


class Neighbourhood(Protocol):
    """What the store knows around a sample; ``store.surroundings.Surroundings`` does."""

    def near(self, sample: ActivationSample, within: int) -> list[Reading]:
        """Readings of the same pass over the same sequence, at most ``within`` tokens away, its own left out."""
        ...

    def unread_near(self, sample: ActivationSample, within: int) -> list[ActivationSample]:
        """Samples at those places that have no reading yet."""
        ...

    def later_contexts(self, sample: ActivationSample) -> list[str]:
        """Contexts of later tokens of the same sequence."""
        ...

    def usual_norms(self, sample: ActivationSample) -> list[float]:
        """Raw norms of the run's newest samples of the same layer, up to this one."""
        ...

    def recent(self, sample: ActivationSample, limit: int) -> list[Reading]:
        """The newest readings of other sequences of the run and layer, before this sample."""
        ...

    def other_layers(self, sample: ActivationSample, limit: int) -> list[Vector]:
        """Vectors ``[d_model]`` of the run's samples of other layers, the newest before this one."""
        ...


@dataclass(frozen=True, slots=True)
class _Nulls:
    """What the NLA makes of vectors that mean nothing."""

    vectors: Vectors
    texts: Sequence[Verbalization]
    scores: Sequence[Score]


class Controls:
    """Measures the controls of matches. Not for use from several threads at once, as AV and AR are not.

    The same samples give the same results however they are batched: draws are keyed by the sample, and neighbours that
    wait in the queue are read ahead. Only text that the model had not written yet (prediction echo) is not waited for.

    Args:
        rules: the rules whose matches are checked.
        verbalizer: the AV; what needs one (that can resample, that can score) is left out without it.
        reconstructor: the AR; what needs it is left out without it.
        neighbourhood: the store; without it only readings of the same batch are seen.
    """

    def __init__(
        self,
        rules: RuleSet,
        verbalizer: Verbalizer | None,
        reconstructor: Reconstructor | None,
        *,
        neighbourhood: Neighbourhood | None = None,
    ) -> None:
        self._plans: dict[str, Plan] = {rule.id: plan_of(rule) for rule in rules.rules}
        self._verbalizer = verbalizer
        self._reconstructor = reconstructor
        self._neighbourhood = neighbourhood
        self._nulls: _Nulls | None = None
        self._read_ahead: dict[str, Reading] = {}

    def check(self, matches: Sequence[Match], readings: Mapping[str, Reading]) -> dict[str, Support]:
        """The verdict on each match, by ``match_id``: what its rule requires; echo and swap margin in any case.

        Never raises for one bad match: what could not be measured stands in ``not_run`` with the reason.

        Args:
            matches: candidates; those of rules that are not among ours are left out.
            readings: theirs, and others of the batch, by ``sample_id``.
        """
        found = [
            Candidate(match, readings[match.sample_id], plan, plan.wanted)
            for match in matches
            if (plan := self._plans.get(match.rule_id)) is not None
        ]
        self._measure(found, readings, cascade=True)
        return {candidate.match.match_id: candidate.verdict() for candidate in found}

    def complete(self, match: Match, reading: Reading, support: Support | None) -> Support:
        """The verdict with every control that can be measured, for the reading that an alert shows.

        What is known stays as it is: the verdict and its score do not change.
        """
        plan = self._plans.get(match.rule_id)
        known = support or Support(match.match_id, supported=True)
        if plan is None:
            return known
        every = frozenset(CONTROLS)
        # A control that the rule requires is not tried again: the match was judged without it.
        not_run = {name: why for name, why in known.not_run.items() if name in plan.bounds or name not in every}
        candidate = Candidate(match, reading, plan, every, dict(known.controls), not_run)
        self._measure([candidate], {reading.sample_id: reading}, cascade=False)
        return dataclasses.replace(known, controls=candidate.results, not_run=candidate.not_run)

    def bounds(self, rule_id: str) -> Mapping[str, Bound]:
        """What a rule requires, by name of the control; empty for a rule that is not among ours."""
        plan = self._plans.get(rule_id)
        return plan.bounds if plan is not None else {}

    # -- the cascade ---------------------------------------------------------------------------------------------

    def _measure(self, candidates: Sequence[Candidate], readings: Mapping[str, Reading], *, cascade: bool) -> None:
        self._read_ahead.clear()
        for candidate in candidates:
            sample = candidate.reading.sample
            candidate.attempt("echo", partial(_echo, candidate, sample.context))
            candidate.attempt("norm", partial(self._norm, sample))
            candidate.attempt("neighbours", partial(self._neighbours, candidate, readings))
            candidate.attempt("prediction_echo", partial(self._prediction_echo, candidate, readings))
        self._reconstruct(candidates)
        left = [one for one in candidates if one.wanted & DEAR and (not cascade or one.verdict().supported)]
        self._score_claims(left)
        self._resample(left)
        for candidate in left:
            candidate.attempt("null_percentile", partial(self._null_percentile, candidate))
            candidate.attempt("null_match_rate", partial(self._null_match_rate, candidate))

    # -- what needs no model -------------------------------------------------------------------------------------

    def _norm(self, sample: ActivationSample) -> Measured:
        if self._neighbourhood is None:
            return _NO_STORE
        ratio = norm_ratio(sample.norm, self._neighbourhood.usual_norms(sample))
        return ratio if ratio is not None else f"fewer than {FEWEST_NORMS} samples of the run to compare with"

    def _neighbours(self, candidate: Candidate, readings: Mapping[str, Reading]) -> Measured:
        sample, within = candidate.reading.sample, candidate.plan.section("neighbours").within
        near = {reading.sample_id: reading for reading in readings.values() if _near(sample, reading.sample, within)}
        if self._neighbourhood is not None:
            near |= {reading.sample_id: reading for reading in self._neighbourhood.near(sample, within)}
            unread = self._neighbourhood.unread_near(sample, within)
            near |= {one.sample_id: self._ahead(one) for one in unread if one.sample_id not in near and _usable(one)}
        if not near:
            return f"no neighbouring reading within {within} tokens"
        return _share(candidate.plan.rule, near.values())

    def _ahead(self, sample: ActivationSample) -> Reading:
        """The reading that a queued sample will get, so that the size of batches changes no result."""
        if sample.sample_id not in self._read_ahead:
            (text,) = self._av.verbalize(sample.vector[None])
            explanation = Explanation(sample.sample_id, text.text, text.truncated, text.tokens, self._av.content_hash)
            fidelity = None
            if self._reconstructor is not None:
                (score,) = self._scores(sample.vector[None], [text])
                fidelity = record_of(sample.sample_id, score, self._ar.content_hash)
            self._read_ahead[sample.sample_id] = Reading(sample, explanation, fidelity)
        return self._read_ahead[sample.sample_id]

    def _prediction_echo(self, candidate: Candidate, readings: Mapping[str, Reading]) -> Measured:
        sample = candidate.reading.sample
        later = [one.sample.context or "" for one in readings.values() if _later(sample, one.sample)]
        if self._neighbourhood is not None:
            later += self._neighbourhood.later_contexts(sample)
        after = continuation(sample.context, later) if sample.context else None
        if after is None:
            return "no text after this token is stored yet"
        return _echo(candidate, after)

    # -- what needs the AR ---------------------------------------------------------------------------------------

    def _reconstruct(self, candidates: Iterable[Candidate]) -> None:
        """Swap margins and ablations of all candidates, in one call."""
        jobs: list[Job] = []
        for candidate in candidates:
            jobs += prepare(candidate, "swap_margin", self._swap_job)
            jobs += prepare(candidate, "ablation", self._ablation_job)
        run_together(jobs, self._cosines)

    def _swap_job(self, candidate: Candidate) -> Job | str:
        if self._reconstructor is None:
            return _NO_AR
        text = candidate.reading.explanation.text
        alternatives = candidate.plan.alternatives
        negation = not alternatives and self._reads_negation
        others = swapped(text, candidate.match, alternatives, negation=negation)
        if not others:
            return _NO_QUOTE
        stated = self._stated(candidate.reading)
        if stated is not None:
            return Job(candidate, "swap_margin", others, partial(swap_margin, stated))
        return Job(candidate, "swap_margin", [text, *others], lambda found: swap_margin(found[0], found[1:]))

    def _ablation_job(self, candidate: Candidate) -> Job | str:
        if self._reconstructor is None:
            return _NO_AR
        text = candidate.reading.explanation.text
        if claim_of(text, candidate.match) is None:
            return _NO_QUOTE
        made = ablated(text, candidate.match)
        if made is None:
            return "the explanation has one sentence, or too many"
        return Job(candidate, "ablation", made[0], lambda found: ablation_rank(found, made[1]))

    @cached_property
    def _reads_negation(self) -> bool:
        found = self._ar.reconstruct([*PROBES, *map(negated, PROBES)])
        return reads_negation(found[: len(PROBES)], found[len(PROBES) :])

    def _stated(self, reading: Reading) -> float | None:
        """Cosine of the explanation as it is, when this AR measured it."""
        fidelity, ar = reading.fidelity, self._reconstructor
        return fidelity.cosine if fidelity is not None and ar and fidelity.ar_hash == ar.content_hash else None

    def _cosines(self, jobs: Sequence[Job]) -> list[Measured]:
        """One AR call for all jobs; a text that recurs for a vector is scored once."""
        vectors: dict[tuple[str, str], Vector] = {}
        for job in jobs:
            reading = job.candidate.reading
            vectors |= {(reading.sample_id, text): reading.sample.vector for text in job.inputs}
        scores = self._ar.score(np.stack([*vectors.values()]), [text for _, text in vectors])
        known = {key: score.cosine for key, score in zip(vectors, scores, strict=True)}
        return [job.finish([known[job.candidate.reading.sample_id, text] for text in job.inputs]) for job in jobs]

    # -- what needs the AV ---------------------------------------------------------------------------------------

    def _score_claims(self, candidates: Iterable[Candidate]) -> None:
        jobs = [job for one in candidates for job in prepare(one, "claim_probability", self._choice_job)]
        run_together(jobs, self._likelihoods)

    def _choice_job(self, candidate: Candidate) -> Job | str:
        if not _can(self._verbalizer, ClaimScorer):
            return _NO_AV if self._verbalizer is None else "the AV cannot score words that it did not write"
        text = candidate.reading.explanation.text
        span = claim_of(text, candidate.match)
        if span is None:
            return _NO_QUOTE
        options = (text[span[0] : span[1]], *(other for other in candidate.plan.options if other))
        if len(options) == 1:
            # Made-up sentences are improbable for their wording alone: measured, the claim always wins.
            return "the rule names no alternatives"
        choice = Choice(text[: span[0]], options)
        return Job(candidate, "claim_probability", [choice], lambda found: claim_probability(found[0]))

    def _likelihoods(self, jobs: Sequence[Job]) -> list[Measured]:
        scorer: Any = self._verbalizer
        vectors = np.stack([job.candidate.reading.sample.vector for job in jobs])
        found = scorer.score_continuations(vectors, [choice for job in jobs for choice in job.inputs])
        return [job.finish([likelihoods]) for job, likelihoods in zip(jobs, found, strict=True)]

    def _resample(self, candidates: Iterable[Candidate]) -> None:
        """Draws of all candidates; rules that matched the same sample at one temperature share its draws."""
        by_temperature: dict[float, list[Job]] = {}
        for candidate in candidates:
            for job in prepare(candidate, "agreement", self._agreement_job):
                by_temperature.setdefault(candidate.plan.section("agreement").temperature, []).append(job)
        for temperature, jobs in by_temperature.items():
            run_together(jobs, partial(self._draws, temperature=temperature))

    def _agreement_job(self, candidate: Candidate) -> Job | str:
        if not _can(self._verbalizer, Resampler):
            return _NO_AV if self._verbalizer is None else "the AV cannot resample"
        reading, rule = candidate.reading, candidate.plan.rule

        def finish(drawn: Sequence[Any]) -> Measured:
            return _share(rule, [_rewritten(reading, text) for text in drawn])

        seeds = [
            seed_of("agreement", reading.sample_id, number)
            for number in range(candidate.plan.section("agreement").resamples)
        ]
        return Job(candidate, "agreement", seeds, finish)

    def _draws(self, jobs: Sequence[Job], *, temperature: float) -> list[Measured]:
        resampler: Any = self._verbalizer
        vectors = {seed: job.candidate.reading.sample.vector for job in jobs for seed in job.inputs}
        drawn = resampler.resample(np.stack([*vectors.values()]), [*vectors], temperature=temperature)
        texts = dict(zip(vectors, drawn, strict=True))
        return [job.finish([texts[seed] for seed in job.inputs]) for job in jobs]

    # -- nulls ---------------------------------------------------------------------------------------------------

    def _null_percentile(self, candidate: Candidate) -> Measured:
        if self._verbalizer is None or self._reconstructor is None:
            return _NO_AR if self._reconstructor is None else _NO_AV
        reading = candidate.reading
        (own,) = self._ar.score(reading.sample.vector[None], [reading.explanation.text])
        scores = [*self._random().scores, *self._own_nulls(reading.sample), *self._shuffled(reading)]
        return percentile(own.cosine, [score.cosine for score in scores])

    def _null_match_rate(self, candidate: Candidate) -> Measured:
        if self._verbalizer is None:
            return _NO_AV
        found, reading = self._random(), candidate.reading
        scores: Sequence[Score | None] = found.scores or [None] * len(found.texts)
        rows = zip(found.vectors, found.texts, scores, strict=True)
        return _share(candidate.plan.rule, [self._null_reading(reading, *row) for row in rows])

    def _random(self) -> _Nulls:
        """Random directions as this NLA reads them; the same for every match."""
        if self._nulls is None:
            vectors = gaussian(NULLS, self._av.d_model, seed_of("nulls"))
            texts = self._av.verbalize(vectors)
            scores = self._scores(vectors, texts) if self._reconstructor is not None else []
            self._nulls = _Nulls(vectors, texts, scores)
        return self._nulls

    def _own_nulls(self, sample: ActivationSample) -> list[Score]:
        """Fidelity of nulls made from this sample and its run: shuffled coordinates, mean vector, other layers."""
        rows = [*coordinate_shuffled(sample.vector, _SHUFFLES, seed_of("coordinates", sample.sample_id))]
        if self._neighbourhood is not None:
            recent = [reading.sample.vector for reading in self._neighbourhood.recent(sample, _RECENT)]
            rows += [np.mean(recent, axis=0, dtype=np.float32)] if len(recent) > 1 else []
            rows += self._neighbourhood.other_layers(sample, _LAYERS)
        vectors = np.stack([row for row in rows if row.shape == sample.vector.shape and np.any(row)])
        return self._scores(vectors, self._av.verbalize(vectors))

    def _shuffled(self, reading: Reading) -> list[Score]:
        """Fidelity of other readings' words to this vector."""
        if self._neighbourhood is None:
            return []
        recent = self._neighbourhood.recent(reading.sample, _RECENT)
        texts = [one.explanation.text for one in recent if one.explanation.text != reading.explanation.text]
        return self._ar.score(np.stack([reading.sample.vector] * len(texts)), texts) if texts else []

    def _scores(self, vectors: Vectors, texts: Sequence[Verbalization]) -> list[Score]:
        return self._ar.score(vectors, [text.text for text in texts])

    def _null_reading(self, like: Reading, vector: Vector, text: Verbalization, score: Score | None) -> Reading:
        """A null in the place of a sample: everything else that a rule may ask for stays."""
        sample = dataclasses.replace(like.sample, vector=vector, norm=float(np.linalg.norm(vector)))
        fidelity = None
        if score is not None:
            fidelity = record_of(sample.sample_id, score, self._ar.content_hash)
        return Reading(sample, _explanation(like.explanation, text), fidelity)

    @property
    def _ar(self) -> Reconstructor:
        if self._reconstructor is None:
            raise ValueError(_NO_AR)
        return self._reconstructor

    @property
    def _av(self) -> Verbalizer:
        if self._verbalizer is None:
            raise ValueError(_NO_AV)
        return self._verbalizer


def _usable(sample: ActivationSample) -> bool:
    return bool(np.isfinite(sample.vector).all() and np.any(sample.vector))


def _can(verbalizer: Verbalizer | None, skill: type) -> bool:
    return isinstance(verbalizer, skill)


def _echo(candidate: Candidate, text: str | None) -> Measured:
    if not candidate.match.quote:
        return _NO_QUOTE
    if text is None:
        return "no text is stored with the sample"
    share = echo(candidate.match.quote, text)
    return share if share is not None else "the quote has no word that carries meaning"


def _share(rule: Rule, readings: Iterable[Reading]) -> float:
    """Share of the readings that meet a rule; there must be one at least."""
    met = [evaluate_rule(rule, reading) is not None for reading in readings]
    return sum(met) / len(met)


def _rewritten(reading: Reading, text: Verbalization) -> Reading:
    return dataclasses.replace(reading, explanation=_explanation(reading.explanation, text))


def _explanation(like: Explanation, text: Verbalization) -> Explanation:
    return dataclasses.replace(like, text=text.text, truncated=text.truncated, tokens=text.tokens)


def _same_pass(one: ActivationSample, other: ActivationSample) -> bool:
    place = (one.run_id, one.sequence_id, one.step, one.layer)
    return place == (other.run_id, other.sequence_id, other.step, other.layer) and one.sample_id != other.sample_id


def _near(one: ActivationSample, other: ActivationSample, within: int) -> bool:
    return abs(one.position - other.position) <= within and _same_pass(one, other)


def _later(one: ActivationSample, other: ActivationSample) -> bool:
    return other.position > one.position and _same_pass(one, other)
