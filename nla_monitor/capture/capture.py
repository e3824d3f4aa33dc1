"""``Capture``: takes activations of a model that somebody else runs, without that run noticing.

A forward is planned in a pre-hook, gathered behind block K and handed over after the model's own forward; all three run
in the host's thread, inside the guard, and wait for nothing. Everything that takes time (waiting for the copy,
matching sessions, decoding text, writing) happens on one background thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nla_monitor.capture import generation as generations
from nla_monitor.capture.adapters import AdapterState
from nla_monitor.capture.assembly import Assembler, Job, Origin, Owners, TextMatcher, TokenText
from nla_monitor.capture.attachable import (
    MISMATCH,
    SHARDED,
    check_attachable,
    check_original,
    is_copy,
    is_shard,
    why_nothing,
    why_replaced,
    width_of,
)
from nla_monitor.capture.budget import Pace
from nla_monitor.capture.generation import Generation
from nla_monitor.capture.held import HeldJob, HeldPool
from nla_monitor.capture.hostwork import HostWork
from nla_monitor.capture.layers import find_blocks
from nla_monitor.capture.planning import (
    HeldPlan,
    HostThread,
    Plan,
    choose_rows,
    draw_of,
    hold,
    is_continuation,
    is_recompute,
    settle,
)
from nla_monitor.capture.policy import Draw, build_policy
from nla_monitor.capture.sampling import Choice
from nla_monitor.capture.screens import Screens
from nla_monitor.capture.session import SessionRegistry, SessionView
from nla_monitor.capture.staging import StagedJob, Stager
from nla_monitor.capture.stats import CaptureStats
from nla_monitor.capture.tap import OUTER, ResidualTap, Signals, SlotPool
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.errors import AttachError
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, Phase, Scalar

_LATE_ADAPTERS = 3
"""Steps for which adapters are looked for that were put into the model after it was attached."""
BUSY = "busy"

Labeler = Callable[[Signals], Mapping[str, Scalar] | None]
"""Attributes of a forward that no agent and no ``phase`` block claims; None: it is not read. In the host's thread."""


class Capture:
    """Samples the residual stream of one model behind one block, or the same positions behind several.

    Args:
        config: what is sampled.
        run_id: run of every sample.
        layer: K, or several: the output of decoder block K, ``hidden_states[K + 1]``, is read.
        sink: gets batches of samples on the background thread; may raise ``StoreUnavailableError`` to be tried again.
        guard: takes our faults.
        queue: bounds of the hand-over.
        tokenizer: resolves triggers and special tokens, decodes text; copied, never used itself.
        rank: of this process among those that train together.
        name: of the model, for its samples, where several are watched.
        sessions: shared with the captures of other models; its own otherwise.
        screens: what is measured of each raw vector.
        on_sampled: called with the number of samples built, on the background thread.
        on_dropped: called with ``(reason, number)``.

    Raises:
        ConfigError: a trigger is no single token, or nothing could ever be sampled (at ``attach`` where special tokens
            depend on the model).
    """

    def __init__(
        self,
        config: CaptureConfig,
        *,
        run_id: str,
        layer: int | Sequence[int],
        sink: Callable[[Sequence[ActivationSample]], None],
        guard: Guard,
        queue: QueueConfig,
        tokenizer: Any = None,
        rank: int = 0,
        name: str | None = None,
        sessions: SessionRegistry | None = None,
        screens: Screens | None = None,
        on_sampled: Callable[[int], None] | None = None,
        on_dropped: Callable[[str, int], None] | None = None,
    ) -> None:
        self.guard = guard
        self.layers = (layer,) if isinstance(layer, int) else tuple(dict.fromkeys(layer))
        self.sessions = SessionRegistry() if sessions is None else sessions
        self.labeler: Labeler | None = None
        """Set by the integration of a trainer, after ``attach``."""
        self._config = config
        self._tokenizer = tokenizer
        self._run_id = run_id
        self._rank = rank
        self._text = TokenText(tokenizer) if config.store_text or config.text_triggers else None
        self._screens = Screens(()) if screens is None else screens
        self._policy = build_policy(config, tokenizer)
        self._assembler = self._make_assembler()
        self._stager = Stager(self._build, sink, guard, queue, on_sampled=on_sampled, on_dropped=on_dropped)
        self._pace = Pace(config, load=lambda: self._stager.depth / queue.max_samples, layers=len(self.layers))
        self._local = HostThread()
        self._held = HeldPool(len(self.layers))
        self._slots: SlotPool | None = None
        self._width: int | None = None
        """``d_model``, where the model says it."""
        self._name = name
        self._tap: ResidualTap | None = None
        self._model: nn.Module | None = None
        self._adapters: AdapterState | None = None
        self._copy = False
        """Whether another rank computes the same stream (tensor parallelism) and reads it."""
        self._step: int | None = None
        self._attributes: Mapping[str, Scalar] = {}
        self._steps_done = 0
        """Steps that began and ended while attached: at least one forward each."""
        self._train_forwards = 0
        self._wanted: dict[torch.device, tuple[int, Tensor | None]] = {}
        self._count_lock = threading.Lock()
        self._forwards = self._planned = 0
        self._tapped: Counter[int] = Counter()
        """Forwards that were gathered, by layer."""
        self._skipped: Counter[str] = Counter()
        self._ours = HostWork()

    # What the host calls.

    def attach(self, model: nn.Module) -> None:
        """Put the tap on ``model``, the module whose forward the host calls, before or after it is compiled.

        Attaching to the same model again does nothing. Weights, outputs and gradients stay as they are. Where ranks
        compute the same residual stream together (tensor parallelism), only the first of them reads it.

        Raises:
            AttachError: no decoder blocks, layer out of range, or this capture is on another model.
            ConfigError: see the class.
        """
        if self._tap is not None:
            if model is self._model:
                return
            raise AttachError(
                f"this capture is already attached to a {type(self._model).__name__}; detach() it first, or use one "
                "capture for each model"
            )
        check_original(model)
        found = find_blocks(model)
        check_attachable(found, self.layers, self._config)
        self._screens.check(self.layers, width_of(found.base))
        self._policy = build_policy(self._config, self._tokenizer, getattr(found.base, "config", None))
        self._assembler = self._make_assembler()
        self._copy = any(is_copy(found.block(layer)) for layer in self.layers)
        self._tap = ResidualTap(self, model, found, self.layers)
        self._slots = SlotPool(max(self._policy.slots, 1), self._tap.device, len(self.layers))
        self._width = width_of(found.base)
        self._model = model
        self._adapters = AdapterState(model)

    def detach(self) -> None:
        """Take the tap off; samples under way are still written."""
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._model = self._adapters = self._slots = None
        self._held = HeldPool(len(self.layers))  # its buffers are the old model's

    def step(self, step: int, **attributes: Scalar) -> None:
        """The following forwards belong to optimizer step ``step``; its micro-batches share the budget of sequences."""
        if step != self._step:
            self._pace.step(step)
            self._steps_done += self._tap is not None and self._step is not None
            if self._adapters is not None and self._steps_done < _LATE_ADAPTERS:
                self._adapters.refresh()
        self._step = step
        self._attributes = attributes

    def burst(self) -> None:
        """An alert fired: the next steps are sampled more closely, if ``capture.burst`` is set."""
        self._pace.burst()

    def backlog(self, waiting: int) -> None:
        """So many samples wait to be read: next to none is taken at ``capture.max_backlog``."""
        self._pace.backlog(waiting)

    @contextmanager
    def phase(self, phase: Phase, **attributes: Scalar) -> Iterator[None]:
        """Forwards of this thread are of this phase, whatever they look like, and carry these attributes."""
        local = self._local
        before = local.phase, local.attributes
        local.phase, local.attributes = Phase(phase), {**local.attributes, **attributes}
        try:
            yield
        finally:
            local.phase, local.attributes = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forwards of this thread are not captured."""
        self._local.paused += 1
        try:
            yield
        finally:
            self._local.paused -= 1

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until everything captured is written; False if it is not."""
        return self._stager.flush(timeout)

    def close(self, timeout: float) -> bool:
        """Detach, write what is there within ``timeout`` seconds, stop; False if something was dropped."""
        self.detach()
        return self._stager.close(timeout)

    @property
    def stats(self) -> CaptureStats:
        """Counters since construction."""
        return CaptureStats(
            forwards=self._forwards,
            sampled=self._stager.sampled,
            written=self._stager.written,
            dropped=self._stager.dropped,
            skipped=dict(self._skipped),
            unmatched_sessions=self.sessions.unmatched,
            host_seconds=self._ours.seconds,
            retries=self._stager.retries,
        )

    @property
    def depth(self) -> int:
        """Samples in memory, not yet written."""
        return self._stager.depth

    def check_fired(self, expected: int | None = None) -> str | None:
        """After the first steps: what is wrong if nothing could be captured; None if all is well (or nothing ran yet).

        Args:
            expected: forwards that the host has run since ``attach``; default: as many as steps were completed.
        """
        replaced = self.replaced()
        if replaced is not None or self._copy:
            return replaced
        silent = [layer for layer in self.layers if not self._tapped[layer]]
        if not silent or (self._forwards and not self._planned and not self._skipped):
            return None
        number = max(self._steps_done if expected is None else expected, self._forwards)
        if not number:
            return None
        paths = self._tap.blocks if self._tap is not None else ()
        skipped = dict(self._skipped)
        return why_nothing(
            paths, number, forwards=self._forwards, planned=self._planned, skipped=skipped, silent=silent
        )

    def replaced(self) -> str | None:
        """What is wrong if a hooked block stands no more in the model; None if all do. Cheap: for every step."""
        paths = self._tap.replaced() if self._tap is not None else []
        return why_replaced(paths) if paths else None

    # What the hooks call, inside the guard.

    def planned(self, level: int | None = None) -> bool:
        """Whether a forward is under way in this thread, opened at ``level`` if given (``tap.Receiver``)."""
        opened = self._local.level
        return opened is not None if level is None else opened == level

    def passes(self, kwargs: Mapping[str, Any], level: int) -> bool:
        """Whether nothing is read of the forward that starts with ``kwargs``, told at once (``tap.Receiver``)."""
        local = self._local
        if local.generation is None or local.level is not None or local.paused:
            return False
        started = time.thread_time()
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not local.generation.passes(ids, kwargs.get("past_key_values"), mask):
            return False
        local.level = level
        with self._count_lock:
            self._forwards += 1
        self._ours.add(time.thread_time() - started)
        return True

    def wants(self, number: int) -> bool:
        """Whether rows of ``layers[number]`` are to be gathered (``tap.Receiver``)."""
        plan = self._local.plan
        return plan is not None and number not in plan.tapped

    def begin(self, signals: Signals, level: int) -> None:
        """Plan the forward that starts in this thread (``tap.Receiver``)."""
        local = self._local
        if level != OUTER and local.level is not None:
            return  # the model's own hook has planned it, with labels
        self._release(local)
        if local.paused or self._copy or not self._stager.alive or is_recompute():
            return
        local.level = level
        with self._count_lock:
            self._forwards += 1
        with self._ours():
            local.plan = self._plan(signals, local)
        if local.plan is not None:
            with self._count_lock:
                self._planned += 1

    def tap(self, hidden: Tensor, number: int, *, partial: bool) -> None:
        """Gather the planned rows of a block's output ``[batch, seq, d_model]`` (``tap.Receiver``)."""
        plan = self._local.plan
        if plan is None or not self.wants(number):
            return
        if partial or not plan.fits(hidden):  # rows are not what input_ids say; indexing them could read out of range
            self._skip(SHARDED if partial or is_shard(hidden, plan.shape) else MISMATCH)
            self._release(self._local, keep_level=True)
            return
        with self._ours():
            plan.slots.gather(hidden, number)
        plan.tapped.add(number)
        with self._count_lock:
            self._tapped[self.layers[number]] += 1

    def end(self, level: int) -> None:
        """Hand over what was gathered (``tap.Receiver``)."""
        local = self._local
        if local.level != level:
            return
        plan = local.plan
        try:
            if plan is not None and plan.tapped:
                with self._ours():
                    for job in plan.jobs(self.layers, self._screens, self.guard):
                        self._stager.put_nowait(job)
        finally:
            self._release(local)

    # Planning.

    def _plan(self, signals: Signals, local: HostThread) -> Plan | HeldPlan | None:
        ids = signals.ids
        if ids is None or ids.dim() != 2 or ids.device.type == "meta":
            self._skip("no_input_ids")
            return None
        if local.generation is not None and is_continuation(signals, ids, local.generation):
            # Most passes of an agent are these, and of most of them nothing is read.
            return self._plan_decode(local.generation, signals, ids, local)
        origin, agent = self._origin(signals, local)
        if self.labeler is not None and not agent and local.phase is None:
            labels = self.labeler(signals)
            if labels is None:
                return None
            origin = replace(origin, attributes={**origin.attributes, **labels})
        if local.generation is None and is_continuation(signals, ids, None):
            return None  # no agent's: its prompt pass was read as what it was
        local.generation = None
        if not self._in_scope(origin.phase, agent=agent):
            return None
        return self._plan_sequences(signals, ids, origin, local, agent=agent)

    def _plan_sequences(
        self, signals: Signals, ids: Tensor, origin: Origin, local: HostThread, *, agent: bool
    ) -> Plan | HeldPlan | None:
        draw, borders = draw_of(self._pace, self._policy, signals, origin, ids=ids, agent=agent)
        if not agent and self._tap is not None and self._tap.device.type == "cpu":
            held = hold(self._held, draw, signals, borders, origin, ids=ids, width=self._width)
            if held is not None:
                return held
        wanted = self._wanted_on(ids.device, origin.sessions) if agent else None
        real, choice = choose_rows(draw, signals, borders, ids=ids, wanted=wanted, agent=agent)
        if choice is None:
            return None
        owners = Owners()
        if agent:
            local.generation = generations.start(draw, choice, ids, real, signals.cache)
            owners = local.generation.owners
        return self._open(choice, draw, origin, owners, ids)

    def _plan_decode(self, generation: Generation, signals: Signals, ids: Tensor, local: HostThread) -> Plan | None:
        if not generation.continues(ids, signals.cache):
            self._skip("cached_continuation")
            local.generation = None
            return None
        if self._policy.positions == "prompt":
            return None
        choice, index = generations.advance(generation, ids)
        if choice is None:
            return None
        origin, _ = self._origin(signals, local)
        return self._open(choice, generation.draw, origin, generation.owners, ids, generated=index)

    def _open(
        self, choice: Choice, draw: Draw, origin: Origin, owners: Owners, ids: Tensor, *, generated: int | None = None
    ) -> Plan | None:
        slots = None if self._slots is None else self._slots.take()
        if slots is None:
            self._stager.drop(BUSY, choice.meta.shape[0])
            return None
        try:
            slots.plan(choice.index)
        except BaseException:
            slots.give_back()  # a plan that fails must not take its slots along: there are only so many
            raise
        return Plan(draw, origin, ids.shape, choice, slots, owners, generated)

    def _origin(self, signals: Signals, local: HostThread) -> tuple[Origin, bool]:
        """Where a forward comes from, and whether an agent's rows may be in it."""
        step, explicit = self._step, local.phase
        trains = signals.grad and (signals.training or step is not None)
        phase = explicit or (Phase.TRAIN if trains else Phase.EVAL)
        view = self.sessions.view
        agent = phase is Phase.AGENT or (explicit is None and not trains and bool(view))
        origin = Origin(
            phase=phase,
            step=step,
            attributes={**self._attributes, **local.attributes},
            captured_at=time.time(),
            model=self._name,
            adapter=None if self._adapters is None else self._adapters.active,
            sessions=view if agent else SessionView(),
            thread_session=view.of_thread(threading.get_ident()) if agent else None,
        )
        return origin, agent

    def _in_scope(self, phase: Phase, *, agent: bool) -> bool:
        if phase not in self._config.phases and not (agent and Phase.AGENT in self._config.phases):
            return False
        if phase is not Phase.TRAIN:
            return True
        number = self._train_forwards if self._step is None else self._step
        self._train_forwards += 1
        return number % self._config.every_n_steps == 0

    def _wanted_on(self, device: torch.device, view: SessionView) -> Tensor | None:
        version, tensor = self._wanted.get(device, (-1, None))
        if version != view.version:
            hashes = list(view.by_sequence)
            tensor = torch.tensor(hashes, dtype=torch.int64, device=device) if hashes else None
            self._wanted[device] = (view.version, tensor)
        return tensor

    # Helpers.

    def _release(self, local: HostThread, *, keep_level: bool = False) -> None:
        plan, local.plan = local.plan, None
        if not keep_level:
            local.level = None
        if plan is not None:
            plan.release()

    def _skip(self, reason: str, number: int = 1) -> None:
        with self._count_lock:
            self._skipped[reason] += number

    def _make_assembler(self) -> Assembler:
        config, policy, matcher = self._config, self._policy, None
        if config.text_triggers and self._text is not None:
            matcher = TextMatcher(config.text_triggers, self._text, policy.window)
        return Assembler(
            policy,
            run_id=self._run_id,
            screens=self._screens,
            rank=self._rank,
            phases=config.phases,
            text=self._text if config.store_text else None,
            matcher=matcher,
            norm_sink_factor=config.norm_sink_factor,
            on_sinks=partial(self._skip, "norm_sink"),
        )

    def _build(self, job: StagedJob) -> tuple[list[ActivationSample], int]:
        if isinstance(job, HeldJob):
            try:
                with torch.no_grad():
                    built = [self._build(one) for one in job.jobs(self.layers, self._screens, self.guard)]
            finally:
                job.discard()
            return [sample for samples, _ in built for sample in samples], sum(lost for _, lost in built)
        if not isinstance(job, Job):
            raise TypeError(f"the stager gave a {type(job).__name__}, not a Job")
        samples, lost = self._assembler.build(job)
        settle(self._pace, job, len(samples))
        return samples, lost
