"""Models of transformers and methods of PEFT, compared with brute force."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    SINGLE,
    TIER_3,
    assert_engine_right,
    brute_rows,
    closed_share,
    jacobian_rows,
    tiers_line,
    trainable,
    wrong_parameters,
)
from tests.gramian.tuning import METHODS, MIXING, extra_inputs, tuned
from tests.gramian.zoo import VOCABULARY, Head, instance_losses, losses_of, model_of
from tests.marks import in_turn

# B and T of each step: distinct from each other and from the widths; B == T; B == width; B divides everything.
SHAPES = {
    "distinct": [(3, 7), (3, 5)],
    "B==T": [(5, 5), (5, 5)],
    "B==width": [(16, 4)],
    "divides": [(2, 4), (2, 6)],
}


def words(text: str) -> list[str]:
    return text.split()


DECODERS = words(
    """
    afmoe apertus arcee aria_text bart beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
    bloom camembert codegen cohere cohere2 cohere2_moe cwm data2vec-text diffllama doge electra ernie ernie4_5
    ernie4_5_moe exaone4 exaone_moe falcon_mamba flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt-sw3
    gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder
    jais2 jetmoe kolibri1 laguna lfm2 llama llama4_text mamba marian mbart megatron-bert mellum mimo_v2_flash
    minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi mpt mvp nanochat nemotron olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3
    qwen3_moe roberta roberta-prelayernorm roformer seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma
    whisper xlm xlm-roberta xlm-roberta-xl
    """
)
ENCODERS = words(
    """
    albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm
    eurobert flaubert fnet gte ibert jina_embeddings_v3 longformer mbart megatron-bert mobilebert modernbert mpnet
    mvp nomic_bert nystromformer roberta roberta-prelayernorm roformer squeezebert tapas ultrabert xlm xlm-roberta
    xlm-roberta-xl
    """
)
PAIRS = words(
    """
    bart bigbird_pegasus blenderbot longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart
    seamless_m4t seamless_m4t_v2 switch_transformers t5 umt5
    """
)
IMAGES = words(
    """
    beit convnext convnextv2 data2vec-vision deit dinov2 dinov2_with_registers focalnet ijepa regnet resnet vit
    vit_msn
    """
)
AUDIO = words(
    """
    data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm
    """
)
OVERRIDES = {
    "longformer": {"attention_window": 8},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 2},
    "longt5": {"local_radius": 3, "global_block_size": 2},
}
# Their hyper-connections cancel in float32: brute force repeats itself only to 1e-5.
ROUGH = {"hy_v4": 1e-4}
HEADS = [
    *[Head("decoder", family) for family in DECODERS],
    *[Head("encoder", family, OVERRIDES.get(family, {})) for family in ENCODERS],
    *[Head("encoder-decoder", family, OVERRIDES.get(family, {})) for family in PAIRS],
    *[Head("image", family) for family in IMAGES],
    *[Head("audio", family) for family in AUDIO],
    *[Head("classification", family) for family in ("bert", "deberta-v2", "gpt2", "llama", "opt")],
    *[Head("tokens", family) for family in ("bert", "llama", "roberta")],
    *[Head("questions", family) for family in ("bert", "distilbert", "llama")],
    *[Head("choice", family) for family in ("bert", "albert", "roberta")],
]


FEW = {name: SHAPES[name] for name in ("distinct", "divides")}
CASES = [
    *in_turn([head for head in HEADS if head.kind not in ("image", "audio")], SHAPES),
    *in_turn([head for head in HEADS if head.kind in ("image", "audio")], FEW),
]


@pytest.mark.parametrize("head, shapes", CASES)
def test_full_fine_tuning(head: Head, shapes: list[tuple[int, int]]):
    model = model_of(head)
    tolerance = ROUGH.get(head.family)
    assert_engine_right(model, losses_of(model, head, shapes), steps=len(shapes), tolerance=tolerance)


MAIN = words(
    """
    bloom gemma2 gpt2 gpt_neox llama mistral opt phi3 qwen2 qwen3
    """
)


def with_lora(head: Head) -> nn.Module:
    model = head.build()
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=head.family == "gpt2")
    return get_peft_model(model, config).double().eval()


@pytest.mark.filterwarnings(f"ignore:{TIER_3}")
@pytest.mark.parametrize("batch, length", [(3, 7), (4, 4)])
@pytest.mark.parametrize("method", MIXING)
def test_method_of_peft_that_mixes_instances(method: str, batch: int, length: int):
    """A loss that reads other instances has no row of its own: it is refused, or rows are those of the given losses."""
    model = tuned(method, tied=False)
    torch.manual_seed(0)
    for p in model.parameters():  # At first, one factor is zero, so nothing mixes.
        p.data += 0.1 * torch.randn_like(p)
    engine, names = Engine(model), trainable(model)
    for _ in range(3):
        losses = instance_losses(model(input_ids=torch.randint(3, VOCABULARY, (batch, length))))
        expected = brute_rows(losses, list(names))
        try:
            jacobian = engine.compute_jacobian(losses)
        except ValueError as error:
            assert "instances of the batch mix" in str(error)  # noqa: PT017
            continue
        assert not wrong_parameters(names, jacobian_rows(jacobian, losses), expected, SINGLE)


@pytest.mark.parametrize("family, shapes", in_turn(MAIN, FEW))
def test_lora(family: str, shapes: list[tuple[int, int]]):
    head = Head("decoder", family)
    model = with_lora(head)
    tiers = assert_engine_right(model, losses_of(model, head, shapes))
    assert closed_share(model, tiers) > 0.95, tiers_line(tiers)


@pytest.mark.parametrize("family", MAIN)
def test_closed_rules_cover_full_fine_tuning(family: str):
    # Position tables, which have no batch dimension, are a small part of real models.
    positions = {"gpt2": {"n_positions": 8, "max_position_embeddings": 8}, "opt": {"max_position_embeddings": 8}}
    head = Head("decoder", family, positions.get(family, {}))
    model = model_of(head)
    tiers = assert_engine_right(model, losses_of(model, head, [(3, 7)]), steps=1, keep_rows=[True])
    assert closed_share(model, tiers) > 0.95, tiers_line(tiers)


@pytest.mark.parametrize(
    "method, case", in_turn(METHODS, {"distinct": (3, 7, False), "tied": (3, 7, True), "B==T": (4, 4, False)})
)
def test_method_of_peft(method: str, case: tuple[int, int, bool]):
    batch, length, tied = case
    model = tuned(method, tied)

    def losses(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        if method == "alora":
            ids[1:, 1] = 4  # The first instance does not invoke it.
        return instance_losses(model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra_inputs(method, batch)))

    assert_engine_right(model, losses, steps=2)
