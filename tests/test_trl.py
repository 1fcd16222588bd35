"""TRL's trainers with AutoLR: what they count and average is that of training alone."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .test_transformers import (
    LENGTH,
    PINNED,
    STEPS,
    arguments,
    assert_same_weights,
    examples,
    levels,
    logged,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter"),
]
WORDS = {f"w{index}": index for index in range(16)}
PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6", "rejected": " w7 w8"},
    {"prompt": "w3 w2", "chosen": " w5 w6", "rejected": " w7 w9 w8"},
    {"prompt": "w9 w5 w11 w2", "chosen": " w5", "rejected": " w10 w11 w12"},
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: None)


def tokenizer():
    words = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def llama(seed=0):
    torch.manual_seed(seed)
    size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 32}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(**size, **depth, bos_token_id=0, eos_token_id=1))


def sft(folder, **changes):
    texts = [row["input_ids"][: 3 + index % 8].tolist() for index, row in enumerate(examples())]
    args = arguments(folder, SFTConfig, max_length=LENGTH, **changes)
    data = Dataset.from_list([{"input_ids": text} for text in texts])
    return SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer())


def dpo(folder, adapters=False, **changes):
    peft_config = None
    if adapters:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    args = arguments(folder, DPOConfig, max_length=32, **changes)
    data = {"train_dataset": Dataset.from_list(PAIRS * 8), "processing_class": tokenizer()}
    reference = None if adapters else llama(seed=1)
    return DPOTrainer(llama(), args=args, ref_model=reference, peft_config=peft_config, **data)


CASES = {
    "sft": (sft, {}),
    "sft, accumulation": (sft, {"gradient_accumulation_steps": 3, "logging_steps": 2}),
    "sft, full precision": (sft, {"bf16": False, "activation_checkpointing": False}),
    "dpo": (dpo, {}),
    "dpo, accumulation": (dpo, {"gradient_accumulation_steps": 3, "logging_steps": 2}),
    "dpo, adapters": (dpo, {"adapters": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_metrics_are_those_of_training_alone(case, tmp_path):
    make, changes = CASES[case]
    plain = trained(make(tmp_path, lr_scheduler_type="constant", **changes))
    ours = trained(make(tmp_path, **changes), PINNED)
    assert logged(ours) == logged(plain)
    assert_same_weights(ours.model, plain.model)
    rows = [row for row in ours.state.log_history if "loss" in row]
    assert {"num_tokens", "mean_token_accuracy", "entropy", "autolr/level"} <= {*rows[-1]}
    assert rows[-1]["num_tokens"] == ours._total_train_tokens == plain._total_train_tokens > 0
    assert len(ours.lr_scheduler.history) == STEPS
    assert all(len({*probe.losses.tolist()}) > 1 for probe in ours.lr_scheduler.history)


@pytest.mark.parametrize("case", ["sft", "dpo, adapters"])
def test_streamed_candidates_are_those_in_place(case, tmp_path):
    make, changes = CASES[case]
    seen = {}
    for evaluator in ("inplace", "streamed"):
        trainer = trained(make(tmp_path, max_steps=3, **changes), {**PINNED, "evaluator": evaluator})
        assert {probe.evaluator for probe in trainer.lr_scheduler.history} == {evaluator}
        seen[evaluator] = torch.stack([probe.losses for probe in trainer.lr_scheduler.history])
    assert torch.equal(seen["streamed"], seen["inplace"])


@pytest.mark.parametrize("make", [sft, dpo])
def test_autolr_finds_a_rate(make, tmp_path):
    plain = trained(make(tmp_path, learning_rate=1e-9, max_steps=20))
    ours = trained(make(tmp_path, learning_rate=1e-9, max_steps=20), {})
    assert ours.state.log_history[-1]["train_loss"] < 0.95 * plain.state.log_history[-1]["train_loss"]
    assert 1e-4 < levels(ours)[-1] < 1


def test_a_run_goes_on_bit_for_bit(tmp_path):
    saved = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5}
    whole = trained(sft(tmp_path, **saved), {"calibration_steps": 3, "probe_every_steps": 2})
    again = sft(tmp_path / "again", **saved)
    trained(
        again,
        {"calibration_steps": 3, "probe_every_steps": 2},
        resume_from_checkpoint=str(tmp_path / "checkpoint-5"),
    )
    assert levels(again, after=5) == levels(whole, after=5)
    ours, theirs = ([row["loss"] for row in logged(each, after=5)[:-1]] for each in (again, whole))
    assert ours == theirs
    assert_same_weights(again.model, whole.model)
