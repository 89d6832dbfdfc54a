"""Every vision-language model of models.tsv against transformers, which builds it on the meta device: no weights."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from clip_robustness.core.registry import load_models

ROOT = Path(__file__).resolve().parents[2]
LMMS = {n: m for n, m in load_models(ROOT / "config/models.tsv", ROOT).items() if m.library == "transformers"}

# The language models, by the cards of Vicuna 1.5, Mistral 7B and Nous-Hermes-2-Yi-34B; the last rows of the vocabulary
# are what LLaVA's conversion adds for <image> and padding. All see through CLIP's ViT-L/14 of 336 px.
VICUNA_7B = transformers.LlamaConfig(vocab_size=32064)
VICUNA_13B = transformers.LlamaConfig(
    vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
MISTRAL_7B = transformers.MistralConfig(vocab_size=32064, intermediate_size=14336, num_key_value_heads=8)
YI_34B = transformers.LlamaConfig(
    vocab_size=64064,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
)
LANGUAGE = {
    "llava_1_5_7b": VICUNA_7B,
    "llava_1_5_13b": VICUNA_13B,
    "llava_1_6_vicuna_7b": VICUNA_7B,
    "llava_1_6_mistral_7b": MISTRAL_7B,
    "llava_1_6_vicuna_13b": VICUNA_13B,
    "llava_1_6_34b": YI_34B,
}


def test_the_six_of_the_paper():
    assert {name for name, model in LMMS.items() if "lmm6" in model.listed} == set(LANGUAGE)
    for model in LMMS.values():
        assert model.architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        assert (model.group, model.answers_in_text, model.has_text_tower) == ("vlm", True, False)


@pytest.mark.parametrize("name", LANGUAGE)
def test_size(name):
    model = LMMS[name]
    config = getattr(transformers, model.architecture.replace("ForConditionalGeneration", "Config"))
    with torch.device("meta"):
        built = getattr(transformers, model.architecture)(config(text_config=LANGUAGE[name]))
    assert model.params_m == round(sum(parameter.numel() for parameter in built.parameters()) / 1e6, 2)
    assert model.image_size == built.config.vision_config.image_size == model.preprocessing.size[0]
    vision = sum(parameter.numel() for parameter in built.model.vision_tower.parameters())
    words = built.get_input_embeddings().weight.numel()
    crops, tokens = (1, 576) if model.architecture.startswith("LlavaFor") else (5, 2928)
    language = 2 * (model.params_m * 1e6 - vision - words) * (tokens + 50) / 1e9
    assert model.gflops == pytest.approx(language + crops * 382, rel=0.01)  # and a question of about 50 tokens
