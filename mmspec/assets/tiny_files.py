"""Makes the embedded target's untrained parts: tokenizer, chat template, processor and model, from nothing but code.

Needs transformers. `scripts/build_tiny_target.py` trains what is made here and saves it in Hugging Face layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 96
PATCH_SIZE = 16
N_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCAB_SIZE = 1024
CONTEXT = 4096
EMBEDDING_STD = 0.5
"""Of text embeddings and of projected image features: whichever is much larger drowns the other in the residual sum."""
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"

# As LLaVA-1.5's: roles in capitals, images before text. Other than there, an answer ends in </s>, and the generation
# tags enclose it with its leading space, so that masks mark exactly the tokens which the model has to produce.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content | trim }}{%- else -%}
{%- for part in content -%}{%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ text_of(message['content']) + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text_of(message['content']) + eos_token }}{% endgeneration %}
{%- else -%}{{ 'USER: ' }}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endif -%}{%- endfor -%}
{%- endif -%}{{ text_of(message['content']) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes any text and most of the corpus's words as one token.

    Args:
        texts: Text to learn the merges from.

    Returns:
        A tokenizer of `VOCAB_SIZE` tokens that puts <s> in front, as Llama's does.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    front = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    # Without trim_offsets=False a token's span leaves its leading space out, and masks by span would shift.
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), front])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor over a plain resize to 96 x 96, which takes any size and mode and needs no torchvision."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


@dataclass(frozen=True)
class TextSize:
    """Of the language model: layers, their width, their MLP's width, and attention heads."""

    layers: int = 12
    hidden: int = 192
    inner: int = 512
    heads: int = 6


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: TextSize = TextSize()
) -> LlavaForConditionalGeneration:
    """The untrained target in fp32: deep and narrow, so that verifying several tokens costs about as much as one.

    Args:
        tokenizer: For the ids of the special tokens.
        seed: Of the initial weights.
        size: Of the language model; the embedded target's by default.

    Returns:
        A LLaVA with a CLIP tower of which LLaVA reads the last layer but one.
    """
    special: dict[str, Any] = {
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
    }
    image: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE)}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        # Of 192 nearer to 1 / sqrt(192) than the default 0.02, which suits wider models.
        initializer_range=0.04 if size.hidden <= 512 else 0.02,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=N_IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **image,
        **special,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=512, **special)
    return model
