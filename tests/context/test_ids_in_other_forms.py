"""Ids and padding that a module is told in another form: several ids for each token, or under another name."""

import pytest
import torch
import transformers
from architectures import tiny_config, tiny_model
from conftest import reft_model
from edit_spy import edited_columns, spied

PADDED = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])  # a mask
MIMI = {
    "model_type": "mimi",
    "hidden_size": 32,
    "num_filters": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "head_dim": 16,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 32,
    "num_quantizers": 3,
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_codebooks": 3,
    "codec_config": MIMI,
}

SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64, "layerdrop": 0.0}  # of an encoder or a decoder


def csm():
    depth = {**SMALL, "backbone_hidden_size": 32, "vocab_size": 17, "intermediate_size": 32, "num_hidden_layers": 1}
    del depth["codec_config"]
    special = {"bos_token_id": 1, "pad_token_id": 2, "codebook_pad_token_id": 16, "codebook_eos_token_id": 0}
    special |= {"audio_token_id": 98, "audio_eos_token_id": 99}
    settings = {**SMALL, **special, "vocab_size": 17, "text_vocab_size": 100, "intermediate_size": 64}
    return transformers.CsmForConditionalGeneration(transformers.CsmConfig(depth_decoder_config=depth, **settings))


def kyutai():
    special = {"audio_bos_token_id": 16, "audio_pad_token_id": 99, "pad_token_id": 3, "bos_token_id": 98}
    settings = {**SMALL, **special, "vocab_size": 100, "codebook_vocab_size": 17, "ffn_dim": 64, "head_dim": 8}
    config = transformers.KyutaiSpeechToTextConfig(sliding_window=64, max_position_embeddings=64, **settings)
    return transformers.KyutaiSpeechToTextForConditionalGeneration(config)


def dia():
    return transformers.DiaForConditionalGeneration(tiny_config("dia"))


BLOCKS = {csm: "backbone_model.layers.0", kyutai: "model.layers.0", dia: "model.decoder.layers.0"}


def pair(make, **settings):
    """A model with an adapter, and the same without."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().eval())
    return reft_model(models[0], positions="f1+l2", **settings), models[1]


def ids_of(make, rows=2, columns=6):
    """Ids of each token: of its sound in three codebooks, with Kyutai's model of its text, too; Dia has nine."""
    return torch.randint(4, 15, (rows, columns, {csm: 3, kyutai: 4, dia: 9}[make]))


@pytest.mark.parametrize("make", [csm, kyutai])
def test_a_token_with_ids_in_several_codebooks_is_one_token(make):
    model, clean = pair(make, task_type="CAUSAL_LM")
    inputs = {"input_ids": ids_of(make), "attention_mask": PADDED}
    found = edited_columns(model.get_base_model(), clean, BLOCKS[make], **inputs)
    assert found == [[0, 4, 5], [2, 4, 5]]
    labels = torch.full((2, 6), -100)
    labels[:, 4:] = 5
    if make is csm:
        labels = labels.unsqueeze(2).repeat(1, 1, 3)
    found = edited_columns(model.get_base_model(), clean, BLOCKS[make], **inputs, labels=labels)
    assert found == [[0, 2, 3], [2, 3]]


def test_a_decoders_tokens_with_ids_in_several_codebooks_are_tokens():
    model, clean = pair(dia, task_type="SEQ_2_SEQ_LM")
    text = {"input_ids": torch.randint(5, 90, (2, 4)), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    inputs = {**text, "decoder_input_ids": ids_of(dia)}
    found = edited_columns(model, clean, BLOCKS[dia], **inputs, decoder_attention_mask=PADDED)
    assert found == [[0, 4, 5], [2, 4, 5]]
    labels = torch.full((2 * 9, 6), -100)  # a row for each codebook, one after the other
    labels[:9, 2:] = 7  # column i holds what follows token i
    labels[13, 3:] = 7
    assert edited_columns(model, clean, BLOCKS[dia], **inputs, labels=labels) == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize("make", [csm, kyutai, dia])
def test_generated_tokens_with_ids_in_several_codebooks_are_not_edited(make):
    model, clean = pair(make)
    base = model.get_base_model()
    inputs = {"input_ids": torch.randint(5, 90, (2, 6)), "attention_mask": PADDED}
    prompt = [[0, 4, 5], [2, 4, 5]]
    if make is dia:
        prompt = [[0], [0]]
    elif make is kyutai:  # which hears a sound of four frames, and begins with one token
        inputs, prompt = {"input_values": torch.randn(1, 1, 4 * 1920)}, [[0]]
    with spied(base, clean, BLOCKS[make]) as calls, torch.no_grad():
        base.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(calls) >= 4 and calls[0] == prompt
    assert all(call == [[]] * len(prompt) for call in calls[1:])


def test_a_choice_is_a_row_though_its_ids_have_three_dimensions():
    model, clean = pair(lambda: transformers.BertForMultipleChoice(tiny_config("bert")))
    inputs = {"input_ids": torch.randint(5, 90, (2, 2, 6)), "attention_mask": PADDED.repeat(2, 1).view(2, 2, 6)}
    name = "bert.encoder.layer.0"
    assert edited_columns(model, clean, name, **inputs) == [[0, 4, 5], [2, 4, 5]] * 2
    del inputs["attention_mask"]
    assert edited_columns(model, clean, name, **inputs) == [[0, 4, 5]] * 4


def test_an_encoder_of_text_beside_one_of_sounds_takes_its_ids_by_another_name():
    def speecht5():
        settings = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE.items()}
        config = transformers.SpeechT5Config(
            vocab_size=100, hidden_size=32, num_mel_bins=8, speaker_embedding_dim=8, **settings
        )
        return transformers.SpeechT5ForTextToSpeech(config)

    model, clean = pair(speecht5)
    inputs = {"input_ids": torch.randint(5, 90, (2, 6)), "attention_mask": PADDED}
    inputs |= {"labels": torch.randn(2, 10, 8), "speaker_embeddings": torch.randn(2, 8)}
    found = edited_columns(model, clean, "speecht5.encoder.wrapped_encoder.layers.0", **inputs)
    assert found == [[0, 4, 5], [2, 4, 5]]


def test_padding_of_a_decoder_that_has_its_own_name_for_it():
    model, clean = pair(lambda: tiny_model("fsmt", "seq2seq"))
    inputs = {"input_ids": torch.randint(5, 90, (2, 4)), "decoder_input_ids": torch.randint(5, 90, (2, 6))}
    inputs |= {"decoder_attention_mask": PADDED, "use_cache": False}  # with a cache the model drops the mask
    found = edited_columns(model, clean, "model.decoder.layers.0", **inputs)  # rows of each column
    assert found == [[0], [], [1], [], [0, 1], [0, 1]]
