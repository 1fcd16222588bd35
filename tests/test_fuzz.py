"""AutoLR in trainings drawn at random, with all that befalls one: skips, exceptions, new groups, saves and loads.

As a test it draws the same trainings each time. ``AUTOLR_FUZZ_MINUTES=60 python -m pytest -s tests/test_fuzz.py``
goes on with new seeds until the time is over, tells of each failure as it comes, and raises them all at the end.
``AUTOLR_FUZZ_SEED`` is the first seed, by default the time: with it, and few minutes, a failure comes again.
"""

import math
import os
import time
import traceback

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from autolr_fast._steps import Pace

from .machine import LATER, RATES, Iteration, Training, check_alike, check_plain, check_rates, specs

MINUTES = float(os.environ.get("AUTOLR_FUZZ_MINUTES", "0"))
FIRST_SEED = int(os.environ.get("AUTOLR_FUZZ_SEED", str(int(time.time()))))

SEEDS = st.integers(0, 1000).map(lambda number: 10 * number)
MICRO_BATCHES = st.sampled_from([1, 1, 2, 3])


class Fuzz(RuleBasedStateMachine):
    """A training and, once it was saved and loaded, a second one that has to stay the same."""

    @initialize(spec=specs())
    def begin(self, spec):
        self.spec = spec
        self.all = [Training(spec)]
        self.saved = None

    def each(self, act):
        for training in self.all:
            act(training)
            check_rates(training)
        if any(training.erred for training in self.all):
            self.all = self.all[-1:]  # a fresh one, whose evaluator is checked anew, goes other ways
        for one, other in zip(self.all, self.all[1:], strict=False):
            check_alike(one, other)

    @property
    def first(self):
        return self.all[0]

    def iterate(self, **what):
        is_batched_norm = self.spec.kind == "norm" and self.spec.arguments["evaluator"] == "stacked"
        if self.spec.is_double or is_batched_norm:  # whose vmap takes one dtype only
            what["autocast"] = False
        iteration = Iteration(**what)
        self.each(lambda training: training.iterate(iteration))

    @rule(
        seed=SEEDS,
        how=st.sampled_from(["loss", "loss", "loss", "remember", "step"]),
        micro_batches=MICRO_BATCHES,
        autocast=st.sampled_from([False, False, True]),
        evaluates_between=st.booleans(),
        kind_of_closure=st.sampled_from(["lambda", "function", "partial", "method"]),
        keeps_zeros=st.booleans(),
        times=st.sampled_from([1, 1, 2, 5]),
    )
    def train(self, seed, times, **what):
        for number in range(times):
            self.iterate(seed=seed + 17 * number, **what)

    @rule(seed=SEEDS, how=st.sampled_from(["loss", "step"]))
    def train_on_one_batch(self, seed, how):
        for _ in range(3):
            self.iterate(seed=seed, how=how)

    @rule(
        seed=SEEDS,
        how=st.sampled_from(["loss", "step"]),
        scaler=st.sampled_from(["used", "skips", "skips", "skips one"]),
        micro_batches=MICRO_BATCHES,
    )
    def train_with_a_scaler(self, **what):
        self.iterate(**what)

    @rule(seed=SEEDS, how=st.sampled_from(["loss", "step"]), added=st.sampled_from([math.nan, math.inf, -math.inf]))
    def train_on_a_batch_without_a_finite_loss(self, **what):
        self.iterate(**what)

    @rule(
        seed=SEEDS, how=st.sampled_from(["loss", "step"]), raises_at=st.integers(0, 30), micro_batches=MICRO_BATCHES
    )
    def a_closure_raises(self, **what):
        if what["raises_at"]:
            self.all = self.all[-1:]  # a fresh one checks closures by more calls
        self.iterate(**what)

    @precondition(lambda self: self.first.scheduler.history)  # else calibration complains at its end
    @rule(seed=SEEDS)
    def train_past_the_scheduler(self, seed):
        self.iterate(seed=seed, how="none")

    @rule()
    def step_the_scheduler_alone(self):
        self.each(Training.step_scheduler)

    @rule(training=st.booleans(), only_body=st.booleans())
    def change_modes(self, training, only_body):
        self.each(lambda each: (each.model.body if only_body else each.model).train(training))

    @precondition(lambda self: len(self.first.added) < LATER)
    @rule(optimizer=st.integers(0, 1), lr=RATES | st.just(0.0), as_others=st.booleans())
    def add_a_group(self, optimizer, lr, as_others):
        optimizers = [
            index
            for index, each in enumerate(self.first.optimizers)
            if type(each).__name__ != "SparseAdam"  # it takes no dense gradients
        ]
        if not optimizers:
            return
        lowest, highest = self.spec.arguments.get("lr_limits", (1e-12, 1e4))
        lr = max(self.first.rates()) if as_others else lr
        where = optimizers[optimizer % len(optimizers)]
        if type(self.first.optimizers[where]).__name__ == "Adafactor":
            highest = min(highest, 1.0)  # it does not follow higher ones
        lr = min(max(lr, lowest), highest) if lr else 0.0
        self.each(lambda each: each.add_group(where, len(each.added), lr))

    @rule()
    def freeze_the_head(self):
        def freeze(training):
            for parameter in (training.model.head or training.model.body).parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

        if not self.first.model.reads_words:  # it could be all there is
            self.each(freeze)

    @rule(times=st.sampled_from([0.1, 0.0, 3.0]))
    def something_else_writes_a_rate(self, times):
        self.each(lambda each: each.step_scheduler(times))

    @rule()
    def save_and_load_into_fresh_objects(self):
        old = self.all[-1]
        self.saved = old.saved(), old.remembered()
        fresh = Training(self.spec, old.added)
        fresh.load(*self.saved)
        self.all = [old, fresh]
        self.each(lambda each: check_plain(each.scheduler.state_dict()))

    @precondition(
        lambda self: self.saved and self.first.steps and len(self.saved[0][-1]["groups"]) == len(self.first.rates())
    )
    @rule()
    def go_back_to_what_was_saved(self):
        self.each(lambda each: each.load(*self.saved))


def run(**others):
    """Run the machine, which foretells every probe that is due: none is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "leaves_out", lambda self, most=0: False)
        run_state_machine_as_test(
            others.pop("machine", Fuzz),
            settings=settings(
                stateful_step_count=25,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
                **others,
            ),
        )


@pytest.mark.cpu  # the trainings are so small that a GPU would add launches, and nothing else
def test_whatever_befalls_a_training():
    run(max_examples=25, derandomize=True)


@pytest.mark.cpu
@pytest.mark.skipif(not MINUTES, reason="set AUTOLR_FUZZ_MINUTES")
def test_for_a_while():
    """Each seed is a run of its own, so that one failure does not hide the others."""
    until, number, failures = time.monotonic() + 60 * MINUTES, FIRST_SEED, []
    while time.monotonic() < until:
        machine = seed(number)(type("Fuzz", (Fuzz,), {}))
        try:
            # Without shrinking, which takes minutes.
            run(machine=machine, max_examples=25, derandomize=False, phases=[Phase.generate])
        except Exception as failure:
            failures.append(f"seed {number}: " + "".join(traceback.format_exception(failure)))
            print(failures[-1], flush=True)
        print(f"seed {number} done, {len(failures)} failures", flush=True)
        number += 1
    assert not failures, "\n\n".join(failures)
