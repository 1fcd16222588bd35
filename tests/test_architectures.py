"""Architectures as people train them, tiny and with random weights: each evaluator is right or says no."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from autolr_fast import FACTORS_3

from .helpers import NAMED, losses_of_copies, refusal_of
from .test_evaluators import probed

transformers = pytest.importorskip("transformers", minversion="5.0")  # 4 batches no mixture of experts

# architecture -> evaluator -> what of it the evaluator has no way to do. All other combinations are accepted.
REFUSED = {
    "bloom": {"stacked": "an autograd.Function of the old style"},
    "gpt2-checkpointed": {"stacked": "requires_grad_() on the embeddings"},
    "mixtral-eager-experts": dict.fromkeys(("graphed", "stacked"), "as many tokens to an expert as the values say"),
    "wav2vec2": {"graphed": "reads values back"},
}

VOCABULARY = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**ENCODER, **VOCABULARY, "num_key_value_heads": 2}
IMAGES = {"image_size": 32, "num_labels": 5}


def language_model(config, **options):
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    tokens = torch.randint(3, 64, (4, 12))
    return model, lambda model: model(tokens, labels=tokens).loss


def image_classifier(config, batch=4, dtype=torch.float32):
    model = transformers.AutoModelForImageClassification.from_config(config).to(dtype)
    x, y = torch.randn(batch, 3, 32, 32, dtype=dtype), torch.randint(5, (batch,))
    return model, lambda model: F.cross_entropy(model(x).logits, y)


def padding():
    """Which of 4 x 12 tokens are not padding."""
    return (torch.arange(12) < torch.tensor([[12], [8], [12], [5]])).long()


def gpt2(dropout=0.0, **options):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **VOCABULARY, **rates)
    return language_model(config, **options)


def checkpointed():
    model, loss_of = gpt2(dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all of 5
        model.gradient_checkpointing_enable()
    return model, loss_of


def mixtral(**options):
    return language_model(transformers.MixtralConfig(num_local_experts=4, **DECODER), **options)


def mamba():
    return language_model(transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **VOCABULARY))


def bloom():
    return language_model(transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **VOCABULARY))


def bert(**rates):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, **VOCABULARY, **rates))
    tokens, mask = torch.randint(3, 64, (4, 12)), padding()
    return model, lambda model: model(tokens, attention_mask=mask, labels=tokens).loss


def t5():
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **VOCABULARY,
    )
    model = transformers.T5ForConditionalGeneration(config)
    tokens, labels, mask = torch.randint(3, 64, (4, 12)), torch.randint(3, 64, (4, 7)), padding()
    return model, lambda model: model(tokens, attention_mask=mask, labels=labels).loss


def wav2vec2():
    """Weight-normed convolutions, and layers that are dropped at random."""
    config = transformers.Wav2Vec2Config(
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, apply_spec_augment=False, layerdrop=0.4,
        vocab_size=32, pad_token_id=0, **ENCODER,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    x, y = torch.randn(2, 400), torch.randint(1, 32, (2, 5))
    return model, lambda model: model(x, labels=y).loss


def vit():
    return image_classifier(transformers.ViTConfig(patch_size=8, **ENCODER, **IMAGES))


def swin():
    return image_classifier(
        transformers.SwinConfig(
            embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4, drop_path_rate=0.0, **IMAGES
        )
    )


def convnext():
    return image_classifier(
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4, **IMAGES)
    )


def resnet():
    return image_classifier(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **IMAGES
        )
    )


def mobilenet_v2(dtype):
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=5)
    return image_classifier(config, batch=16, dtype=dtype)


ARCHITECTURES = {
    "gpt2": gpt2,
    "gpt2-eager": lambda: gpt2(attn_implementation="eager"),
    "gpt2-dropout": lambda: gpt2(dropout=0.1),
    "gpt2-eager-dropout": lambda: gpt2(dropout=0.1, attn_implementation="eager"),
    "gpt2-checkpointed": checkpointed,
    "llama": lambda: language_model(transformers.LlamaConfig(**DECODER)),
    "qwen2": lambda: language_model(transformers.Qwen2Config(**DECODER)),
    "mistral": lambda: language_model(transformers.MistralConfig(sliding_window=6, **DECODER)),
    "mixtral": mixtral,
    "mixtral-eager-experts": lambda: mixtral(experts_implementation="eager"),
    "mamba": mamba,
    "bloom": bloom,
    "bert": lambda: bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "bert-dropout": bert,
    "t5": t5,
    "wav2vec2": wav2vec2,
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "resnet": resnet,
    "mobilenet_v2": lambda: mobilenet_v2(torch.float32),
    "mobilenet_v2-float64": lambda: mobilenet_v2(torch.float64),
}

# Of batched losses, relative; 1e-4 for all others. MobileNetV2's 52 normalisations amplify rounding: in float32 its
# losses deviate by 3e-6 here, and by 9e-5 at a factor of 8, where a deep copy's is 2e-4 off that of float64.
# In float64 they deviate by 4e-16.
RTOL = {"mobilenet_v2-float64": 1e-12}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def problem(request):
    """An architecture in training, and the losses of the deep copies of it."""
    torch.manual_seed(0)
    model, loss_of = ARCHITECTURES[request.param]()
    model.train()
    optimizer, line, prev = probed(model, loss_of)
    torch.manual_seed(1)
    losses = losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert all(map(math.isfinite, losses))
    assert len(set(losses)) == len(losses)
    return request.param, {
        "model": model,
        "optimizer": optimizer,
        "line": line,
        "loss_of": loss_of,
        "expected": dict(zip(FACTORS_3, losses, strict=True)),
        "rtol": RTOL.get(request.param, 1e-4),
    }


@pytest.mark.parametrize("evaluator", NAMED)
def test_losses(problem, evaluator):
    architecture, probe = problem
    torch.manual_seed(1)
    reason = refusal_of(evaluator, **probe)
    expected = REFUSED.get(architecture, {}).get(evaluator)
    assert (reason is None) == (expected is None), reason or f"accepted in spite of: {expected}"


def test_table_of_refusals():
    assert set(REFUSED) | set(RTOL) <= set(ARCHITECTURES)
    assert {evaluator for refused in REFUSED.values() for evaluator in refused} <= {
        "graphed",
        "stacked",
        "streamed",
    }
