"""LoRA with PEFT: a tiny Llama that counts up learns to count down, by its adapters alone.

Run ``python -m examples.lora``. The model is made from a configuration and pretrained here: nothing is downloaded.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from autolr_fast import AutoLR

NUMBERS, LENGTH = 32, 12


def main():
    """Pretrain the model, train its adapters, and print the losses of both tasks."""
    torch.manual_seed(0)
    up, down = counting(by=1), counting(by=-1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, **sizes))
    train(model, up, steps=200, lr=1e-6)
    up_before, down_before = loss_of(model, up).item(), loss_of(model, down).item()

    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    # These adapters are far from their data, so AutoLR starts from a rate that is known to suit them.
    train(model, down, steps=150, lr=1e-2, calibration_steps=0)
    print(f"counting down: loss {down_before:.3f}, with adapters {loss_of(model, down).item():.3f}")
    with model.disable_adapter():
        print(f"counting up: loss {up_before:.3f}, without adapters {loss_of(model, up).item():.3f} again")


def counting(by):
    """Return 256 rows of numbers that go on by one, two or three times as much."""
    first, times = torch.randint(NUMBERS, (256, 1)), torch.randint(1, 4, (256, 1))
    return (first + by * times * torch.arange(LENGTH)) % NUMBERS


def train(model, rows, steps, lr, **options):
    """Train what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = AutoLR(optimizer, model, total_steps=steps, **options)
    for batch in rows[torch.randint(len(rows), (steps, 16))]:
        optimizer.zero_grad()
        loss = scheduler.loss(lambda: loss_of(model, batch))
        loss.backward()
        optimizer.step()
        scheduler.step()


def loss_of(model, rows):
    """Return the mean loss of the next number."""
    return model(input_ids=rows, labels=rows).loss


if __name__ == "__main__":
    main()
