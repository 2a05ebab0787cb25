"""Models of transformers, with random weights: every parameter is served by a rule, and exactly."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_fisher import one_example_at_a_time
from torch import nn
from torch.nn import functional as F

from unlearn_fast import causal_lm_losses, classification_losses, coverage, diagonal_fisher

transformers = pytest.importorskip("transformers")
T = transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {"num_key_value_heads": 1, "vocab_size": 40, **SMALL}
IMAGES = (torch.rand(5, 3, 32, 32), torch.arange(5) % 4)
TOKENS = (torch.randint(1, 40, (5, 9), generator=torch.Generator().manual_seed(0)),) * 2


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    batch: tuple[torch.Tensor, torch.Tensor]
    losses: Callable[[nn.Module, Any], torch.Tensor]
    rules: set[str]  # what serves its parameters, as `coverage` lists it


def causal(model, batch):
    """Padded on the right to different lengths."""
    ids = batch[0]
    mask = torch.arange(ids.shape[1]) < 4 + ids[:, :1] % 6
    return causal_lm_losses(model, {"input_ids": ids, "attention_mask": mask.long()})


def masked(model, batch):
    return token_losses(model(input_ids=batch[0]).logits, batch[1])


def sequence_to_sequence(model, batch):
    return token_losses(model(input_ids=batch[0], decoder_input_ids=batch[1][:, :5]).logits, batch[1][:, 1:6])


def token_losses(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def squared_states(model, batch):
    return model(batch[0]).last_hidden_state.flatten(1).square().mean(1)


def whisper_encoder():
    config = T.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=10,
    )  # fmt: skip
    return T.models.whisper.modeling_whisper.WhisperEncoder(config)


def low_rank_llama():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


FAMILIES = {
    "vit": Family(
        lambda: T.ViTForImageClassification(T.ViTConfig(image_size=32, patch_size=8, num_labels=4, **SMALL)),
        IMAGES, classification_losses, {"broadcast", "convolution", "layer_norm", "linear"},
    ),
    "gpt2": Family(
        lambda: T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        TOKENS, causal, {"addmm", "broadcast + embedding", "embedding + linear", "layer_norm"},
    ),
    "llama": Family(
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), TOKENS, causal, {"broadcast", "embedding", "linear"}
    ),
    "llama, tied": Family(
        lambda: T.LlamaForCausalLM(T.LlamaConfig(tie_word_embeddings=True, **GROUPED)),
        TOKENS, causal, {"broadcast", "embedding + linear", "linear"},
    ),
    "llama, low rank": Family(low_rank_llama, TOKENS, causal, {"frozen", "linear"}),
    "mistral": Family(
        lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED)), TOKENS, causal, {"broadcast", "embedding", "linear"}
    ),
    "qwen": Family(
        lambda: T.Qwen3ForCausalLM(T.Qwen3Config(head_dim=8, **GROUPED)),
        TOKENS, causal, {"broadcast", "embedding", "linear"},
    ),
    "gemma": Family(
        lambda: T.Gemma2ForCausalLM(T.Gemma2Config(head_dim=8, **GROUPED)),
        TOKENS, causal, {"broadcast", "embedding + linear", "linear"},
    ),
    "bert": Family(
        lambda: T.BertForMaskedLM(T.BertConfig(vocab_size=40, **SMALL)),
        TOKENS, masked, {"broadcast + embedding", "embedding", "embedding + linear", "layer_norm", "linear"},
    ),
    "t5": Family(
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        TOKENS, sequence_to_sequence, {"broadcast", "broadcast + embedding", "embedding + linear", "linear"},
    ),
    "resnet": Family(
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4)
        ),
        IMAGES, classification_losses, {"batch_norm", "convolution", "linear"},
    ),
    "convnext": Family(
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=4)
        ),
        IMAGES, classification_losses, {"broadcast", "convolution", "layer_norm", "linear"},
    ),
    "swin": Family(
        lambda: T.SwinForImageClassification(
            T.SwinConfig(
                image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=4
            )
        ),
        IMAGES, classification_losses, {"broadcast", "convolution", "layer_norm", "linear"},
    ),
    "whisper": Family(
        whisper_encoder, (torch.rand(5, 8, 20), torch.zeros(5)), squared_states,
        {"convolution", "frozen", "layer_norm", "linear"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_rule_and_is_exact(family):
    build, (x, y), losses, rules = FAMILIES[family]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms and biases start at 1 and 0, where a gradient may vanish or be the same for all
                p.add_(0.1 * torch.randn_like(p))
    batches = [(x, y), (x[:3], y[:3]), (x[3:4], y[3:4])]
    assert set(coverage(model, (x, y), losses).values()) - {"unused"} == rules
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="measured one example at a time")
        ours = diagonal_fisher(model, batches, losses, progress=False)
    double = [tuple(t.double() if t.is_floating_point() else t for t in b) for b in batches]
    truth = one_example_at_a_time(model.double(), double, losses)
    largest = max(float(t.norm()) for t in truth.values())
    for name, expected in truth.items():
        error = float((ours[name].double() - expected).norm())
        assert error < 1e-5 * float(expected.norm()) + 1e-9 * largest, name
