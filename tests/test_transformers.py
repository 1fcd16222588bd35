"""The Trainer of transformers with AutoLR: real ones, of tiny random models."""

import itertools
import math
import re
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.utils.data import IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_constant_schedule,
)

from autolr_fast import AutoLR, ClosureError, Rule
from autolr_fast.integrations.transformers import AutoLRMixin, attach
from examples import trainer as trainer_example

RATE = 1e-2
PINNED = {
    "lr_limits": (RATE, RATE),
    "calibration_steps": 0,
    "probe_every_steps": 1,
    "probe_until_fraction": 1.0,
    "rule": Rule(),
}
SEARCHING = {"calibration_steps": 4, "probe_every_steps": 3, "rule": Rule()}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"}
VOCABULARY, LENGTH, STEPS = 16, 10, 6


def gpt2(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, **rates, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # which the Trainer asks, to know that the first token is not predicted
    return model


def t5():
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0))


def examples(count=42):
    """Texts of many lengths, of which every token says much of the next."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(VOCABULARY, (count, 1), generator=generator)
    noise = torch.randint(2, (count, LENGTH), generator=generator).cumsum(1)
    tokens = (first + 3 * torch.arange(LENGTH) + noise) % VOCABULARY
    ends = torch.randint(3, LENGTH + 1, (count,), generator=generator).tolist()
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(LENGTH) < end, row, -100)}
        for row, end in zip(tokens, ends, strict=True)
    ]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


def arguments(folder, kind=TrainingArguments, **changes):
    usual = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": STEPS,
        "learning_rate": RATE,
        "include_num_input_tokens_seen": "all",
    }
    return kind(str(folder), **{**usual, **changes})


def trained(trainer, options=None, **how):
    """Train, with AutoLR if there are options, and return the trainer."""
    if options is not None:
        attach(trainer, **options)
    trainer.train(**how)
    return trainer


def logged(trainer, after=0):
    """All that was logged, less times and the level."""
    rows = [row for row in trainer.state.log_history if row["step"] > after]
    return [{name: value for name, value in row.items() if name not in {*TIMES, "autolr/level"}} for row in rows]


def levels(trainer, after=0):
    rows = [row for row in trainer.state.log_history if row["step"] > after]
    return [row["autolr/level"] for row in rows if "autolr/level" in row]


def assert_same_weights(ours, theirs):
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


class Telling(Trainer):
    """Keeps accounts of its own where the loss is computed."""

    seen = 0
    parts = types.MappingProxyType({})

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        penalty = 50.0 + model.transformer.wte.weight.square().sum()
        self.seen += 1
        self.parts = {**self.parts}
        self.parts.setdefault("penalty", []).append(penalty.item())
        self.state.stateful_callbacks["calls"] = self.seen
        if self.is_in_train:
            self.log({"seen": self.seen})
        return (loss + penalty, outputs) if return_outputs else loss + penalty


CASES = {
    "plain": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.0},
    "accumulation": {"gradient_accumulation_steps": 4},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "clipping": {"max_grad_norm": 0.1},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "iterable": {"train_dataset": Stream()},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3},
    "own accounts": {"trainer": Telling},
    "sequence to sequence": {"trainer": Seq2SeqTrainer, "model": t5, "kind": Seq2SeqTrainingArguments},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
@pytest.mark.parametrize("case", CASES)
def test_probes_leave_the_training_as_it_is_without_them(case, tmp_path):
    """AutoLR probes each step and may not move the rate: all must be that of the Trainer's own constant rate."""
    changes = {"trainer": Trainer, "model": gpt2, "train_dataset": examples(), **CASES[case]}
    trainer, model, data = (changes.pop(name) for name in ("trainer", "model", "train_dataset"))
    runs = []
    for options, schedule in ((None, {"lr_scheduler_type": "constant"}), (PINNED, {})):
        args = arguments(tmp_path, **changes, **schedule)
        runs.append(trained(trainer(model(), args, train_dataset=data), options))
        torch.compiler.reset()
    plain, ours = runs
    assert logged(ours) == logged(plain)
    assert_same_weights(ours.model, plain.model)
    assert ours.lr_scheduler.last_epoch == len(ours.lr_scheduler.history) == plain.state.global_step
    assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0
    assert all(probe.losses.isfinite().all() for probe in ours.lr_scheduler.history)
    assert ours.lr_scheduler.evaluator.name == "inplace"
    if trainer is Telling:
        assert (ours.seen, ours.parts) == (plain.seen, plain.parts)
        assert ours.state.stateful_callbacks["calls"] == ours.seen == plain.state.global_step
        assert min(float(probe.losses.min()) for probe in ours.lr_scheduler.history) > 50


def test_streamed_candidates_are_those_in_place(tmp_path):
    args = arguments(tmp_path, bf16=True, activation_checkpointing=True)
    seen = {}
    for evaluator in ("inplace", "streamed"):
        trainer = Trainer(gpt2(), args, train_dataset=examples())
        scheduler = trained(trainer, {**PINNED, "evaluator": evaluator}).lr_scheduler
        assert {probe.evaluator for probe in scheduler.history} == {evaluator}
        seen[evaluator] = torch.stack([probe.losses for probe in scheduler.history])
    assert torch.equal(seen["streamed"], seen["inplace"])


def accumulating_loop(model, optimizer, steps, micro_batches, options):
    """The same training by hand: the loss of a step is the mean over its tokens."""
    scheduler = AutoLR(optimizer, model, total_steps=len(steps), micro_batches=micro_batches, **options)
    found = []
    for batches in steps:
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        total = sum(counts)
        for batch, count in zip(batches, counts, strict=True):
            share = count / total if micro_batches == "last" else 1 / len(counts)

            def loss_of(batch=batch, share=share, total=total):
                logits, targets = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / total / share

            (scheduler.loss(loss_of) * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(scheduler.level[0])
    return found, scheduler.history


@pytest.mark.parametrize(("parts", "micro_batches"), [(1, "last"), (4, "last"), (4, "all")])
def test_what_autolr_sees_is_that_of_a_loop(parts, micro_batches, tmp_path):
    batches, options = [], SEARCHING

    def collate(rows):
        batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return batches[-1]

    args = arguments(
        tmp_path, gradient_accumulation_steps=parts, max_steps=-1, num_train_epochs=8 if parts > 1 else 2
    )
    trainer = Trainer(gpt2(dropout=0.0), args, train_dataset=examples(), data_collator=collate)
    trained(trainer, {**options, "micro_batches": micro_batches})
    an_epoch = math.ceil(len(examples()) / 4)  # batches, the last of them short, and so is the last step
    steps = [
        batches[start:][:an_epoch][first:][:parts]
        for start in range(0, len(batches), an_epoch)
        for first in range(0, an_epoch, parts)
    ]
    assert {len(step) for step in steps} == ({1} if parts == 1 else {4, 3})
    model = gpt2(dropout=0.0)
    optimizer = Trainer(model, args, train_dataset=examples()).create_optimizer()
    found, history = accumulating_loop(model, optimizer, steps, micro_batches, options)
    assert levels(trainer) == pytest.approx(found, rel=1e-3)
    assert len({*levels(trainer)}) > 2
    for ours, theirs in zip(trainer.lr_scheduler.history, history, strict=True):
        assert ours.step == theirs.step
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-4)


def test_a_rate_far_too_low_is_found(tmp_path):
    def last_loss(options, rate):
        args = arguments(tmp_path, max_steps=40, learning_rate=rate, logging_steps=10)
        trainer = trained(Trainer(gpt2(), args, train_dataset=examples()), options)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]

    from_low = last_loss({}, 1e-7)
    assert from_low < last_loss(None, 1e-7) - 0.3
    assert from_low == pytest.approx(last_loss({}, 1.0), rel=0.15)


SAVED = {"gradient_accumulation_steps": 2, "max_steps": 24, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    args = arguments(tmp_path_factory.mktemp("whole"), **SAVED)
    return trained(Trainer(gpt2(), args, train_dataset=examples()), SEARCHING)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 12, 17])
def test_a_run_goes_on_bit_for_bit_from_any_step(step, uninterrupted, tmp_path):
    args = arguments(tmp_path, **{**SAVED, "save_strategy": "no"})
    trainer = Trainer(gpt2(seed=7), args, train_dataset=examples())
    folder = f"{uninterrupted.args.output_dir}/checkpoint-{step}"
    trained(trainer, SEARCHING, resume_from_checkpoint=folder)
    assert logged(trainer, after=step)[:-1] == logged(uninterrupted, after=step)[:-1]  # last is of the whole run
    assert levels(trainer, after=step) == levels(uninterrupted, after=step)
    assert_same_weights(trainer.model, uninterrupted.model)


def test_a_checkpoint_has_the_state(uninterrupted):
    assert [probe.step for probe in uninterrupted.lr_scheduler.history] == [1, 2, 4, 6, 9, 12]
    assert len({*levels(uninterrupted)}) > 3
    folder = f"{uninterrupted.args.output_dir}/checkpoint-8"
    assert torch.load(f"{folder}/scheduler.pt", weights_only=True)["last_epoch"] == 8


def test_the_level_is_logged_with_the_rate(uninterrupted):
    rows = [row for row in uninterrupted.state.log_history if "loss" in row]
    assert rows[-1]["autolr/level"] == uninterrupted.lr_scheduler.level[0]
    for before, row in itertools.pairwise(rows):  # the rate of the step, and the level after it
        annealing = 0.5 * (1 + math.cos(math.pi * before["step"] / len(rows)))
        assert row["learning_rate"] == pytest.approx(before["autolr/level"] * annealing)


def test_training_twice_starts_from_the_level_found(tmp_path):
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=examples())
    first = trained(trainer, {"calibration_steps": None}).lr_scheduler
    with pytest.warns(UserWarning, match="the optimizer has trained before, so AutoLR starts from its lr"):
        trainer.train()
    second = trainer.lr_scheduler
    assert second is not first
    assert second.last_epoch == STEPS
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(first.level[0])
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-9  # annealed again


def test_the_best_model_is_there_at_the_end(tmp_path):
    def run(folder, **changes):
        args = arguments(tmp_path / folder, **changes)
        return trained(Trainer(gpt2(), args, train_dataset=examples(), eval_dataset=examples(8)), {})

    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = run("best", **often, load_best_model_at_end=True)
    best = min((row["eval_loss"], row["step"]) for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.state.best_metric == best[0]
    saved = GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model, saved)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best[0])
    assert levels(trainer) == levels(run("plain"))  # no evaluation is seen


class Held(TrainerCallback):
    """What docs/transformers.md has of held-back examples."""

    def on_evaluate(self, args, state, control, metrics, lr_scheduler, **kwargs):
        if lr_scheduler and state.global_step:  # there is none in trainer.evaluate() before trainer.train()
            lr_scheduler.watch(metrics["eval_loss"])
            if lr_scheduler.has_ended:
                control.should_training_stop = True


def test_a_callback_watches_examples_held_back(tmp_path):
    args = arguments(tmp_path, max_steps=400, eval_strategy="steps", eval_steps=2, logging_steps=50)
    random = [{"input_ids": row["input_ids"], "labels": row["input_ids"].flip(0)} for row in examples(8)]
    trainer = Trainer(gpt2(), args, train_dataset=examples(), eval_dataset=random, callbacks=[Held()])
    trainer.evaluate()
    trained(trainer, {})
    assert trainer.lr_scheduler.has_ended
    assert trainer.state.global_step < 400


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    trained(Trainer(gpt2(), args, train_dataset=examples()), {})
    again = Trainer(gpt2(), args, train_dataset=examples())
    attach(again)
    with pytest.raises(ValueError, match="goes on at step 2, and the checkpoint has no state of AutoLR"):
        again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


def test_a_mixin_that_comes_last_is_refused():
    with pytest.raises(TypeError, match=r"write class Late\(AutoLRMixin, Trainer\)"):

        class Late(Trainer, AutoLRMixin):
            pass


class Mixed(AutoLRMixin, Telling):
    autolr_options = PINNED


def test_a_class_of_ones_own(tmp_path):
    args = arguments(tmp_path)
    attached = trained(Telling(gpt2(), args, train_dataset=examples()), PINNED)
    mixed = trained(Mixed(gpt2(), args, train_dataset=examples()))
    assert logged(mixed) == logged(attached)
    assert_same_weights(mixed.model, attached.model)
    assert type(attached).__name__ == "Telling"
    assert isinstance(attached, Telling)


def test_a_loss_that_the_mixed_class_itself_computes(tmp_path):
    class Own(AutoLRMixin, Trainer):
        autolr_options = PINNED

        def compute_loss(self, *args, **kwargs):
            return 100.0 + super().compute_loss(*args, **kwargs)

    trainer = trained(Own(gpt2(), arguments(tmp_path), train_dataset=examples()))
    assert min(float(probe.losses.min()) for probe in trainer.lr_scheduler.history) > 100


def test_a_loss_that_was_put_on_the_trainer_stays_there(tmp_path):
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=examples())
    plain = trainer.compute_loss

    def doubled(*args, **kwargs):
        return 100.0 + plain(*args, **kwargs)

    trainer.compute_loss = doubled
    trained(trainer, PINNED)
    assert trainer.compute_loss is doubled
    assert min(float(probe.losses.min()) for probe in trainer.lr_scheduler.history) > 100


def test_a_batch_that_is_changed_in_place_is_refused(tmp_path):
    class Careless(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["input_ids"].add_(1).remainder_(VOCABULARY)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Careless(gpt2(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(ClosureError, match=re.escape("changes inputs['input_ids'] in place")):
        trained(trainer, {})


def test_a_loss_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    class Failing(Telling):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.seen == 4 and self._is_probing:
                raise MemoryError
            return loss

    trainer = Failing(gpt2(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(MemoryError):
        trained(trainer, PINNED)
    assert trainer.seen == len(trainer.parts["penalty"]) == 3
    assert not trainer._is_probing
    assert "compute_loss" not in vars(trainer)


def test_a_step_without_compute_loss_is_refused(tmp_path):
    class Bare(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    trainer = Bare(gpt2(), arguments(tmp_path), train_dataset=examples())
    with (
        pytest.warns(UserWarning, match="no loss came through AutoLR for this step"),
        pytest.raises(ClosureError, match="scheduler.loss"),
    ):
        trained(trainer, SEARCHING)


def test_a_checkpoint_of_another_scheduler_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    trained(Trainer(gpt2(), args, train_dataset=examples()))
    trainer = Trainer(gpt2(), args, train_dataset=examples())
    with pytest.raises(
        ValueError, match="state_dict is none of AutoLR, but of something else, such as another scheduler"
    ):
        trained(trainer, {}, resume_from_checkpoint=f"{tmp_path}/checkpoint-4")


def broken(folder, options=None, **attributes):
    args = arguments(folder)
    trainer = Trainer(gpt2(), args, train_dataset=examples())
    for name, value in attributes.items():
        setattr(args if name in ("optim", "_n_gpu", "fsdp", "deepspeed") else trainer, name, value)
    return trainer, options or {}


def layerwise(folder):
    trainer, options = broken(folder)
    trainer.args.optim = type(trainer.args.optim)("galore_adamw_layerwise")
    return trainer, options


def scheduled(folder):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = get_constant_schedule(optimizer)
    return Trainer(model, arguments(folder), train_dataset=examples(), optimizers=(optimizer, schedule)), {}


def twice(folder):
    trainer, _ = broken(folder)
    attach(trainer)
    return trainer, {}


def begun(folder):
    return trained(broken(folder)[0]), {}


REFUSED = {
    "deepspeed": (lambda f: broken(f, is_deepspeed_enabled=True), ValueError, "train without deepspeed"),
    "fsdp": (lambda f: broken(f, is_fsdp_enabled=True), ValueError, "train without fsdp by torchrun"),
    "several gpus": (lambda f: broken(f, _n_gpu=2), ValueError, "n_gpu=2: .* one process a GPU by torchrun"),
    "layer by layer": (layerwise, ValueError, "optim='galore_adamw_layerwise' .* such as 'galore_adamw'"),
    "lomo": (lambda f: broken(f, optim="lomo"), ValueError, "optim='lomo' .* such as 'adamw_torch'"),
    "a scheduler": (scheduled, ValueError, r"lr_scheduler=LambdaLR.*optimizers=\(optimizer, None\)"),
    "twice": (twice, ValueError, "a Trainer that has AutoLR already: attach once"),
    "begun": (begun, ValueError, r"begun to train: call attach before trainer.train\(\)"),
    "an unknown option": (lambda f: broken(f, {"max_heats": 1}), TypeError, "max_heats=1 .* max_heat,"),
    "steps": (lambda f: broken(f, {"total_steps": 9}), TypeError, "total_steps=9.*max_steps"),
    "no trainer": (
        lambda f: (gpt2(), {}),
        TypeError,
        "a GPT2LMHeadModel without training_step: expected a Trainer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case, tmp_path):
    make, error, message = REFUSED[case]
    trainer, options = make(tmp_path)
    kind = type(trainer)
    with pytest.raises(error, match=message):
        attach(trainer, **options)
    assert type(trainer) is kind


def test_a_mixed_class_refuses_as_it_begins(tmp_path):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    both = (optimizer, get_constant_schedule(optimizer))
    mixed = Mixed(model, arguments(tmp_path), train_dataset=examples(), optimizers=both)
    with pytest.raises(ValueError, match="trainer has lr_scheduler=LambdaLR"):
        mixed.train()
    own = Mixed(model, arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None))
    assert trained(own).lr_scheduler.optimizer is optimizer


def test_what_is_ignored_is_told_once(tmp_path):
    ignored = {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"last_epoch": 3}}
    args = arguments(tmp_path, max_steps=2, **ignored)
    with pytest.warns(UserWarning, match="is ignored") as told:
        trained(Trainer(gpt2(), args, train_dataset=examples()), PINNED)
    assert {each.filename for each in told} == {__file__}
    with pytest.warns(UserWarning, match="is ignored") as told_by_class:
        trained(Mixed(gpt2(), args, train_dataset=examples()))
    for messages in ([str(each.message) for each in warned] for warned in (told, told_by_class)):
        assert [message.split(" is ignored")[0] for message in messages] == [
            "warmup_steps=0.1",
            "lr_scheduler_type='cosine'",
            "lr_scheduler_kwargs={'last_epoch': 3}",
        ]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_example(capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    trainer_example.main()
    level, loss = re.findall(r"-> (\S+), loss \S+ -> (\S+)", capsys.readouterr().out)[-1]
    assert float(level) > 1e-4  # from 1e-6
    assert float(loss) < math.log(32) / 2  # half that of guessing
