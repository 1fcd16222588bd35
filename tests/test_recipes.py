"""The blocks of docs/recipes.md run as they stand, and train like loops that are written out here."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from autolr_fast import AutoLR
from benchmarks.games import ring
from benchmarks.games.players import AUTO, METHODS, Setting

from .helpers import assert_same

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
STEPS = 24

pytestmark = pytest.mark.cpu


def blocks(heading):
    """The Python of a section."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def block(heading):
    (code,) = blocks(heading)
    return code


def network(width=5):
    """Its BatchNorm has other losses in eval mode."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batches(count=12, size=12):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def run(code, given):
    """Run a block with the names it is given; returns all that it has then."""
    scope = {"torch": torch, "F": F, "AutoLR": AutoLR, **given}
    exec(code, scope)
    return scope


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **options)


def by_hand(model, scheduler, loss_of, data, *, parts=1, clip=None):
    """The plain loop; ``loss_of`` is of the model and a batch. Returns the parameters after each step."""
    (optimizer,), seen = scheduler.optimizers, []
    for first in range(0, len(data), parts):
        optimizer.zero_grad()
        for batch in data[first : first + parts]:
            loss = scheduler.loss(functools.partial(loss_of, model, *batch))
            (loss / parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        seen.append(weights(model))
    return seen


def by_hand_remembered(model, scheduler, data):
    (optimizer,) = scheduler.optimizers
    for x, y in data:
        optimizer.zero_grad()
        scheduler.remember(lambda x=x, y=y: F.cross_entropy(model(x), y))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()


def weights(model):
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


def assert_like(scheduler, model, plain_scheduler, plain_model):
    """Both trained the same way, bit for bit, and were probed."""
    assert [probe.to_dict() for probe in scheduler.history] == [
        probe.to_dict() for probe in plain_scheduler.history
    ]
    assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()
    assert scheduler.last_epoch == STEPS
    assert scheduler.history[0].retaken is not None
    assert len(scheduler.history) >= 20
    assert_same(weights(model), weights(plain_model))


class Language(nn.Module):
    """Returns logits and loss, as nanoGPT's."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x, y):
        logits = self.body(x)
        return logits, F.cross_entropy(logits, y)


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nanogpt(dtype, monkeypatch):
    torch._dynamo.reset()
    backend, drawn, raw = CompileCounter(), iter(batches(2 * STEPS + 1)), Language()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    given = {"model": raw, "get_batch": lambda split: next(drawn), "device_type": "cpu", "dtype": dtype}
    sizes = {"max_iters": STEPS, "gradient_accumulation_steps": 2, "grad_clip": 0.1}
    scope = run(block("nanoGPT"), given | sizes)
    assert backend.frame_count > 0

    model = Language()
    optimizer = adamw(model, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = AutoLR(optimizer, model, total_steps=STEPS, micro_batches="all")

    def loss_of(model, x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(x, y)[1]

    by_hand(model, scheduler, loss_of, batches(2 * STEPS), parts=2, clip=0.1)
    assert_like(scope["scheduler"], raw, scheduler, model)


@pytest.mark.usefixtures("every_probe")
def test_torchvision():
    """The average is that of the weights as they are after scheduler.step()."""
    model, data = network(), batches(STEPS // 2)

    def mixup(images, targets):
        return 0.7 * images + 0.3 * images.roll(1, 0), targets

    given = {"model": model, "optimizer": adamw(model), "loader": data, "epochs": 2}
    scope = run(block("torchvision and timm"), given | {"mixup": mixup, "criterion": F.cross_entropy})

    plain = network()
    scheduler = AutoLR(adamw(plain), plain, total_steps=STEPS)
    mixed = [mixup(*batch) for batch in 2 * data]
    after = by_hand(plain, scheduler, lambda model, x, y: F.cross_entropy(model(x), y), mixed, clip=1.0)
    assert_like(scope["scheduler"], model, scheduler, plain)
    average = after[0]
    for now in after[1:]:
        average = [0.99 * one + 0.01 * other for one, other in zip(average, now, strict=True)]
    for one, other in zip(scope["ema"].module.parameters(), average, strict=False):  # the buffers come last
        torch.testing.assert_close(one.detach(), other)


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("which", [0, 1], ids=["own-step", "supervised-trainer"])
def test_ignite(which):
    pytest.importorskip("ignite")
    model, data = network().eval(), batches(STEPS // 2)
    given = {"model": model, "optimizer": adamw(model), "loader": data, "epochs": 2, "loss_fn": F.cross_entropy}
    scope = run(blocks("pytorch-ignite")[which], given)

    plain = network()
    scheduler = AutoLR(adamw(plain), plain, total_steps=STEPS)
    if which == 0:
        by_hand(plain, scheduler, lambda model, x, y: F.cross_entropy(model(x), y), 2 * data)
    else:
        by_hand_remembered(plain, scheduler, 2 * data)
    assert_like(scope["scheduler"], model, scheduler, plain)


def test_skorch():
    """An epoch of validation leaves the network in eval mode before each epoch of training."""
    skorch = pytest.importorskip("skorch")
    helper, dataset = pytest.importorskip("skorch.helper"), pytest.importorskip("skorch.dataset")
    data = batches(STEPS // 2)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    finds = run(block("skorch"), {})["FindsLR"](STEPS)
    net = skorch.NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=1e-3,
        batch_size=12,
        max_epochs=2,
        train_split=helper.predefined_split(dataset.Dataset(x.numpy(), y.numpy())),
        callbacks=[finds],
        verbose=0,
    )
    net.fit(x.numpy(), y.numpy())

    plain = network()
    scheduler = AutoLR(adamw(plain, lr=1e-3), plain, total_steps=STEPS)
    by_hand_remembered(plain, scheduler, 2 * data)
    assert_like(finds.scheduler_, net.module_, scheduler, plain)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora():
    """The adapters are those of a loop without AutoLR at the rates that it had: a probe changes nothing else."""
    peft = pytest.importorskip("peft")
    ids = torch.randint(20, (12, 4, 8), generator=torch.Generator().manual_seed(7))
    loader, rates = [{"input_ids": each, "labels": each} for each in ids], []

    class Noted(AutoLR):
        def loss(self, closure):
            torch.manual_seed(len(rates))  # of dropout
            rates.append(self.get_last_lr()[0])
            return super().loss(closure)

    base = llama()
    frozen = [parameter.detach().clone() for parameter in base.parameters()]
    torch.manual_seed(3)
    scope = run(block("LoRA with PEFT"), {"model": base, "loader": loader, "epochs": 5, "AutoLR": Noted})
    model, scheduler = scope["model"], scope["scheduler"]
    assert_same([each for name, each in model.named_parameters() if "lora_" not in name], frozen)
    assert [probe.step for probe in scheduler.history] == [
        20,
        30,
    ]  # before the 10th there are no ten steps
    assert len(set(rates)) == len(rates) == 60

    base = llama()
    torch.manual_seed(3)
    plain = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    optimizer = torch.optim.AdamW([parameter for parameter in plain.parameters() if parameter.requires_grad])
    for step, (batch, rate) in enumerate(zip(5 * loader, rates, strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.manual_seed(step)
        plain(**batch).loss.backward()
        optimizer.step()
    assert_same(weights(model), weights(plain))
    assert any(each.any() for name, each in plain.named_parameters() if "lora_B" in name)


@pytest.mark.usefixtures("every_probe")
def test_gan():
    """The levels are those of the benchmark whose figures the page gives."""
    rounds, seed = 30, 3
    torch.manual_seed(seed)
    _, players = ring.gan(Setting(METHODS[AUTO], 1e-3, rounds, seed))

    torch.manual_seed(seed)
    generator, discriminator = ring._networks()
    given = {"generator": generator, "discriminator": discriminator, "rounds": rounds, "real": ring.real}
    for name, network in (("g_optimizer", generator), ("d_optimizer", discriminator)):
        given[name] = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.5, 0.999))
    scope = run(block("A GAN"), given | {"batch_size": ring._BATCH, "latent": ring._NOISE})
    for player, name in zip(players, ("g_scheduler", "d_scheduler"), strict=True):
        assert scope[name].level[0] / 1e-3 == player.levels[-1]
        assert len(scope[name].history) == len(player.scheduler.history) >= 20
        assert player.levels[-1] != 1


@pytest.mark.usefixtures("every_probe")
def test_a_compiled_step(monkeypatch):
    torch._dynamo.reset()
    backend, data = CompileCounter(), batches(STEPS)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = network()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=False)}
    scope = run(block("A compiled optimizer step"), given | {"loader": data, "loss_fn": F.cross_entropy})
    assert backend.frame_count > 0

    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), 1e-3, momentum=0.9, foreach=False)
    scheduler = AutoLR(optimizer, plain, total_steps=STEPS)
    by_hand(plain, scheduler, lambda model, x, y: F.cross_entropy(model(x), y), data)
    assert_like(scope["scheduler"], model, scheduler, plain)


def test_blocks_are_short():
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        assert len(code.splitlines()) <= 40
