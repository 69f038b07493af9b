"""Tiny models of every architecture that transformers knows, built from config classes alone.

A config is shrunk by the names of its fields (widths, depths, heads, vocabularies, ..., in sub-configs too), not by
a recipe per architecture, so that new ones need no work here; `FIXES` holds what a few configs ask for on top.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, DEPTH, VOCAB, IMAGE, PATCH = 64, 4, 3, 200, 32, 8
FIRST_SPECIAL = 100  # ids from here on are special tokens of some kind; batches stay below

MAPPINGS = {
    "causal": "CAUSAL_LM",
    "masked": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence": "SEQUENCE_CLASSIFICATION",
    "token": "TOKEN_CLASSIFICATION",
    "image": "IMAGE_CLASSIFICATION",
    "image-text": "IMAGE_TEXT_TO_TEXT",
}

AUTO_CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "image": transformers.AutoModelForImageClassification,
    "image-text": transformers.AutoModelForImageTextToText,
}

# The largest value of an integer field, by its name; the first match counts.
LIMITS: list[tuple[str, int]] = [
    (r".*per_tok(en)?|num_expert_group|.*topk.*|.*top_k|moe_k|n_group|topk_group|n_groups", 2),
    (r"bos_token_id|pad_token_id|eos_token_id|decoder_start_token_id", VOCAB),  # seen to below
    (r".*(token_id|token_index|_token)", VOCAB),
    (r".*kv_shared_layers|first_k_dense_replace|num_dense_layers|n_?dense_layers?|first_.*dense.*", 1),
    (r"(.*_)?(layers|n_layer|num_blocks|depth|num_layers_per_stack)|.*_layers|layers_per_.*", DEPTH),
    (r".*(kv_heads|key_value_heads|num_key_value.*)|num_query_groups|n_head_kv|linear_num_key_heads", 2),
    (r"(.*_)?(heads|n_head)", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|rotary_dim", 8),
    (r".*head_dim|dim_head|d_kv|d_head|kv_channels|.*head_size|d_rel", 16),
    (r".*lora_rank|.*_rank", 8),
    (r".*(num_experts|n_routed_experts|num_local_experts|num_experts.*|n_experts)", 4),
    (r".*vocab.*size.*|ngram_vocab_size_base|vocab_size_per_layer_input", VOCAB),
    (r".*(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_dim|emb_dim|embedding_size)", HIDDEN),
    (r"dim|width|.*embed_proj_dim|lru_width|.*proj_dim|.*projection_dim|.*output_dim|.*out_hidden.*", HIDDEN),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size).*", HIDDEN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len.*|.*target_positions|.*source_positions", 256),
    (r"context_length|position_embedding_.*|max_sequence_length|model_max_length", 256),
    (r".*image_size|.*img_size|input_size", IMAGE),
    (r".*patch_size", PATCH),
    (r"chunk_size|mamba_chunk_size|.*chunk_length", 8),
    (r".*window.*|attention_chunk_size", 64),
    (r"num_mel_bins|input_feat_per_channel", 16),
    (r".*state_size|mamba_d_state", 8),
]
STAGES = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")  # by the depth before
Settings = dict[str, Any]


def limit_of(name: str) -> int | None:
    return next((limit for pattern, limit in LIMITS if re.fullmatch(pattern, name)), None)


def shrink(settings: Settings) -> Settings:
    """The fields of a config, made small; fields that depend on one another are kept consistent by the rules' names."""
    depths = {v for k, v in settings.items() if is_count(v) and limit_of(k) == DEPTH}
    small = {}
    for name, value in settings.items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "torch_dtype", "dtype", *STAGES):
            continue
        limit = limit_of(name)
        if value is None or name == "vocab_size":
            small[name] = {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": VOCAB}.get(name)
        elif name in ("encoder_layers", "decoder_layers"):
            small[name] = DEPTH  # some classes read the depth of one side for the other
        elif isinstance(value, dict):
            small[name] = shrink(value) if is_config(value) else value
        elif is_count(value) and limit is not None:
            small[name] = min(value, limit)
        elif isinstance(value, (list, tuple)) and len(value) in depths and len(value) > DEPTH:
            small[name] = type(value)(shorten(list(value)))
        elif isinstance(value, (list, tuple)) and value and all(is_count(v) for v in value) and limit is not None:
            small[name] = type(value)(min(v, limit) for v in value)
        elif isinstance(value, float) and ("drop" in name or name.endswith("layerdrop")):
            small[name] = 0.0
        else:
            small[name] = value
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    for kv, heads in (
        ("num_key_value_heads", "num_attention_heads"),
        ("linear_num_key_heads", "linear_num_value_heads"),
    ):
        if is_count(settings.get(kv)) and settings[kv] == settings.get(heads):
            small[kv] = small[heads]
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(small.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        small["rope_parameters"] = {**rope, "mrope_section": [half // 2, half // 4, half // 4]}
    small.pop("per_layer_config", None)  # by the numbers of layers that are no more
    FIXES.get(str(settings.get("model_type")), lambda s: None)(small)
    return special_tokens(small)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_config(value: dict) -> bool:
    return all(isinstance(k, str) for k in value) and (
        "model_type" in value or any(limit_of(k) in (HIDDEN, DEPTH) for k in value)
    )


def shorten(values: list) -> list:
    """`DEPTH` of a list's values, every kind among them if that is possible."""
    kinds = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds + [v for v in values if kinds.count(v)])[:DEPTH]


def special_tokens(settings: Settings) -> Settings:
    """Special token ids within the vocabulary, and different from one another."""
    free = iter(range(VOCAB - 1, FIRST_SPECIAL, -1))
    for name, value in settings.items():
        if re.fullmatch(r"(pad|bos|eos|decoder_start)_token_id", name):
            continue
        if (
            not name.endswith("per_token")
            and re.fullmatch(r".*(token_id|token_index|_token|token_idx)", name)
            and is_count(value)
            and value > 3
        ):
            settings[name] = next(free)
    common = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    for name, value in common.items():
        if name in settings:
            settings[name] = value
    if "decoder_start_token_id" in settings:
        settings["decoder_start_token_id"] = 2
    return settings


def _set(**fields: Any) -> Callable[[Settings], None]:
    return lambda settings: settings.update(fields)


def _mrope(settings: Settings) -> None:
    """Sections of multimodal rotary embeddings that fit the heads, for classes that have their own by default."""
    half = (
        int(settings.get("head_dim", 16) * (settings.get("rope_parameters") or {}).get("partial_rotary_factor", 1)) // 2
    )
    settings["rope_parameters"] = {**(settings.get("rope_parameters") or {"rope_type": "default", "rope_theta": 1e4})}
    settings["rope_parameters"]["mrope_section"] = [half // 2, half // 4, half // 4]


def _mrope_ernie(settings: Settings) -> None:
    """Its sections are for height, width and time, and the first two are alike."""
    settings["rope_parameters"] = {**(settings.get("rope_parameters") or {"rope_type": "default", "rope_theta": 1e4})}
    settings["rope_parameters"]["mrope_section"] = [3, 3, 2]


def _whole_rope(settings: Settings) -> None:
    settings["rope_parameters"] = {**settings["rope_parameters"], "partial_rotary_factor": 1.0}


def _timm(settings: Settings) -> None:
    """A vision transformer in place of the default, a network of convolutions."""
    if settings["architecture"] == "resnet50":
        small = {"depth": DEPTH, "embed_dim": HIDDEN, "num_heads": HEADS, "img_size": [IMAGE] * 2, "patch_size": PATCH}
        settings.update(architecture="vit_tiny_patch16_224", model_args=small)


def _levit(settings: Settings) -> None:
    settings.update(patch_size=16, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], key_dim=[16] * 3)
    del settings["down_ops"]  # worked out from these


_T5 = _set(decoder_start_token_id=0)
_SWIN = _set(embed_dim=32, depths=[2, 2], num_heads=[2, 4], patch_size=4, window_size=4, stage_names=None)
_MAMBA_HEADS = _set(mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128)
# What a config demands beyond small numbers; by model type, applied to the (sub-)config of that type.
FIXES: dict[str, Callable[[Settings], None]] = {
    **dict.fromkeys(["t5", "mt5", "umt5"], _T5),
    **dict.fromkeys(["glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glmga_text", "paddleocr_vl_text"], _mrope),
    **dict.fromkeys(["qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "hunyuan_vl_text"], _mrope),
    "ernie4_5_vl_moe_text": _mrope_ernie,
    **dict.fromkeys(["swin", "donut-swin", "swinv2"], _SWIN),
    **dict.fromkeys(["blip-2", "instructblip", "instructblipvideo"], _set(image_token_index=VOCAB - 2)),
    "instructblipvideo": _set(video_token_index=VOCAB - 2),
    **dict.fromkeys(["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"], _set(vision_start_token_id=VOCAB - 9)),
    **dict.fromkeys(["blt_local_encoder", "blt_local_decoder"], _set(hidden_size_global=HIDDEN)),
    "bros": _set(dim_bbox_sinusoid_emb_2d=16, dim_bbox_sinusoid_emb_1d=2, dim_bbox_projection=16),
    "dory": _set(num_hidden_layers=4, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1, layer_types=None),
    "cvt": _set(embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    "deepseek_ocr2_text": _set(mlp_layer_types=["dense", "sparse", "sparse"], num_experts_per_tok=2),
    "diffusion_gemma": _set(canvas_length=8),
    "diffusion_gemma_text": _set(num_experts=4, top_k_experts=2, moe_intermediate_size=HIDDEN),
    "glm5_next_text": _set(index_topk=16, index_kpool=8),
    "granite4_vision": _set(deepstack_layer_map=[(0, 0)], spatial_target_layers=[1], downsample_rate="1/2"),
    "mistral4": _whole_rope,
    "molmo2_adapter": _set(vision_feature_layer=[2, 1]),
    "pix2struct_vision_model": _set(patch_embed_hidden_size=3 * PATCH**2),
    "shieldgemma2": _set(yes_token_index=5, no_token_index=6),
    "step3p5": _set(sliding_window=16),
    "chameleon": _set(vocabulary_map={"<image>": 4}),
    "emu3": _set(vocabulary_map={"<image>": 4}),
    "layoutlmv3": _set(coordinate_size=8, shape_size=16),
    "bailing_hybrid": _set(num_experts_per_tok=2, n_group=2, topk_group=1),
    "bamba": _set(mamba_n_heads=8, mamba_d_head=16, attn_layer_indices=[1]),
    "cohere_compass_text": _set(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "dbrx": _set(attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}),
    "deepseek_v2": _set(num_experts_per_tok=2),
    "dots3_note_audio_encoder": _set(adapter_input_size=HIDDEN, adapter_out_dim=HIDDEN),
    "dots3_note_vision_encoder": _set(adapter_in_dim=HIDDEN, adapter_out_dim=HIDDEN),
    "dots1": _set(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "falcon_h1": _MAMBA_HEADS,
    "granitemoehybrid": _set(
        mamba_n_heads=8, mamba_d_head=16, layer_types=["linear_attention", "full_attention", "linear_attention"]
    ),
    "hrm_text": _set(num_layers_per_stack=None, num_hidden_layers=2, L_bp_cycles=[2, 2]),
    "jamba": _set(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": _set(num_experts_per_tok=2),
    "levit": _levit,
    "lfm2_moe": _set(layer_types=["conv", "full_attention", "conv"]),
    "lilt": _set(hidden_size=96, channel_shrink_ratio=4),
    "mamba2": _set(num_heads=8, head_dim=16, n_groups=2),
    "perceiver": _set(num_latents=8, d_latents=HIDDEN, d_model=HIDDEN, max_position_embeddings=64, num_blocks=1),
    "qwen4_exp_text": _set(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4
    ),
    "kosmos-2": _set(latent_query_num=2),
    "mobilebert": _set(intra_bottleneck_size=HIDDEN, embedding_size=HIDDEN),
    "reformer": _set(is_decoder=True, axial_pos_embds=False),
    "timm_wrapper": _timm,
    **dict.fromkeys(
        ["vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer_decoder"], _set(num_filters=4)
    ),
    "xlstm": _set(hidden_size=128, embedding_dim=128),
    "xmod": _set(default_language="en_XX"),
    "zamba": _set(
        layers_block_type=["linear_attention", "hybrid", "hybrid"], attention_hidden_size=128, attention_head_dim=32
    ),
    "zamba2": _set(
        hybrid_layer_ids=[1, 2],
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        mamba_headdim=32,
        n_mamba_heads=4,
        kv_channels=16,
        attention_hidden_size=128,
        attention_head_dim=32,
    ),
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """A small config of this type."""
    cls = CONFIG_MAPPING[model_type]
    settings = shrink(cls().to_dict())
    settings.pop("model_type", None)
    return cls(**settings)


def model_types(mapping: str) -> list[str]:
    return list(getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[mapping]}_MAPPING_NAMES"))


def tiny_model(model_type: str, mapping: str = "causal", seed: int = 0) -> nn.Module:
    """A seeded tiny model of an architecture, with the head of a mapping, in eval mode."""
    config = tiny_config(model_type)
    cls = AUTO_CLASSES[mapping]._model_mapping[type(config)]
    if isinstance(cls, (list, tuple)):  # a class for each way of training
        cls = cls[0]
    if not isinstance(config, cls.config_class):  # perhaps the class of a part
        parts = (getattr(config, name) for name in config.sub_configs)
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    torch.manual_seed(seed)
    return cls._from_config(config).eval()


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, and what an oracle has to know about them.

    Attributes:
        inputs: keyword arguments of its forward.
        valid: the columns of each row's tokens (of the encoder's, in an encoder-decoder model); empty for images.
        columns: of a row, padding included.
        decoder_columns: of a row of the decoder's tokens, if there is a decoder beside an encoder.
    """

    inputs: dict[str, Tensor]
    valid: list[list[int]]
    columns: int
    decoder_columns: int | None = None

    @property
    def decoder_valid(self) -> list[list[int]]:
        """The columns of each row's tokens in the decoder."""
        assert self.decoder_columns is not None
        if "decoder_input_ids" in self.inputs or self.decoder_columns != self.columns:
            return [list(range(self.decoder_columns))] * len(self.valid)
        # The encoder's ids moved by one, behind a start token, without the last of each row.
        return [[0, *(column + 1 for column in row[:-1])] for row in self.valid]

    def with_decoder_columns(self, columns: int) -> Batch:
        return replace(self, decoder_columns=columns)


def batch_for(model: nn.Module, mapping: str, lengths: Sequence[int], side: str = "right") -> Batch:
    """A batch with rows of these lengths, padded on one side, for any of the models."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = len(lengths), max(lengths)
    names = inspect.signature(type(model).forward).parameters
    ids = torch.zeros(rows, columns, dtype=torch.long)
    mask = torch.zeros_like(ids)
    valid = []
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else columns - length
        valid.append(list(range(start, start + length)))
        ids[row, start : start + length] = torch.randint(5, FIRST_SPECIAL - 1, (length,), generator=generator)
        mask[row, start : start + length] = 1
        if mapping == "sequence" and model.config.is_encoder_decoder:  # the head reads the end-of-text token
            ids[row, start + length - 1] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs = {name: tensor for name, tensor in inputs.items() if name in names}
    if "attention_mask" not in inputs:  # padding that the model cannot know of
        valid = [list(range(columns))] * rows
    decoder_columns = None
    if model.config.is_encoder_decoder:
        decoder_columns = columns
        if mapping not in ("sequence", "masked", "token"):
            decoder_columns = 4
            inputs["decoder_input_ids"] = torch.randint(5, FIRST_SPECIAL - 1, (rows, 4), generator=generator)
    if "input_ids" not in names or model.config.model_type == "pp_formulanet":  # images alone, or for an encoder
        inputs = {name: tensor for name, tensor in inputs.items() if name == "decoder_input_ids"}
        valid = [[]] * rows
    inputs |= image_inputs(model, ids, mask, generator)
    codebooks = getattr(model.config, "num_codebooks", None)
    if codebooks and type(model).__name__.startswith("Musicgen"):  # a row of ids for each codebook
        inputs["input_ids"] = inputs["input_ids"].repeat_interleave(codebooks, dim=0)
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(rows, columns, 4, dtype=torch.long)
        if model.config.model_type == "udop":
            inputs["bbox"] = inputs["bbox"].float()
    return Batch(inputs, valid, columns, decoder_columns)


def image_inputs(model: nn.Module, ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """An image for each row, where a model cannot do without, in the form that it wants."""
    names = inspect.signature(type(model).forward).parameters
    kind, (rows, columns) = model.config.model_type, ids.shape
    patches = (IMAGE // PATCH) ** 2
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
    first_two = (mask.bool() & (mask.cumsum(1) <= 2)).long()
    special = {
        "blt": {"use_cache": False},  # its cache asks for a setting that its config has not
        "evolla": {"protein_input_ids": ids % 16 + 4, "protein_attention_mask": torch.ones_like(ids)},
        "idefics": {
            "pixel_values": pixels.unsqueeze(1),
            "image_attention_mask": torch.ones(rows, columns, 1, dtype=torch.long),
        },
        "instructblip": {"pixel_values": pixels, "qformer_input_ids": ids},
        "instructblipvideo": {"pixel_values": pixels.unsqueeze(1).repeat(1, 4, 1, 1, 1), "qformer_input_ids": ids},
        "molmo2": {"mm_token_type_ids": torch.zeros_like(ids)},
        "kosmos-2": {"pixel_values": pixels, "image_embeds_position_mask": first_two},
        "pix2struct": {  # the row and the column of a patch, then its pixels
            "flattened_patches": torch.cat(
                [torch.ones(rows, patches, 2), torch.randn(rows, patches, 3 * PATCH**2, generator=generator)], dim=2
            )
        },
        "siglip2": {
            "pixel_values": torch.randn(rows, patches, 3 * PATCH**2, generator=generator),
            "pixel_attention_mask": torch.ones(rows, patches, dtype=torch.long),
            "spatial_shapes": torch.tensor([[IMAGE // PATCH] * 2] * rows),
        },
    }
    if kind in special:
        return special[kind]
    is_needed = "input_ids" not in names or kind in ("blip-2", "pp_formulanet")
    is_needed = is_needed or ("pixel_values" in names and names["pixel_values"].default is inspect.Parameter.empty)
    return {"pixel_values": pixels} if is_needed and "pixel_values" in names else {}
