"""Failures of engines like this one, each with a small reproduction; its docstring says what went wrong, and where."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    EXACT,
    SINGLE,
    assert_engine_right,
    brute_gramian,
    brute_rows,
    check_step,
    relative,
    trainable,
)
from tests.gramian.tuning import tuned
from tests.gramian.zoo import VOCABULARY, Head, instance_losses, losses_of, model_of
from tests.models import tiny_gpt2, tiny_llama, with_lora

DISTINCT, SQUARE = [(3, 7), (3, 5)], [(5, 5), (5, 5)]


def right(head: Head, shapes: list[tuple[int, int]]) -> dict[str, int]:
    model = model_of(head)
    return assert_engine_right(model, losses_of(model, head, shapes))


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
@pytest.mark.parametrize(
    "head",
    [
        *[Head("decoder", f) for f in ("gpt2", "openai-gpt")],
        *[Head("encoder", f) for f in ("bert", "albert", "distilbert", "electra", "convbert", "roberta")],
    ],
    ids=lambda head: head.family,
)
def test_01_position_embedding_without_batch(head: Head, shapes: list[tuple[int, int]]):
    """1 (opacus#841, #845): a position table is fed [1, T], and its gradient arrives summed over the batch."""
    tiers = right(head, shapes)
    positions = [t for n, t in tiers.items() if "position" in n or "wpe" in n]
    assert positions
    assert 0 not in positions


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE, [(2, 6), (2, 4)]], ids=["distinct", "B==T", "B=2"])
@pytest.mark.parametrize(
    "head",
    [
        Head("encoder", "mpnet"),
        *[Head("encoder-decoder", f) for f in ("t5", "mt5", "switch_transformers", "umt5")],
    ],
    ids=lambda head: head.family,
)
def test_02_relative_position_tables(head: Head, shapes: list[tuple[int, int]]):
    """2 (private-transformers, swap_t5): tables [T, T].

    MPNet with B == T passes 'the rows add up to the gradient' with a Gramian that is wrong by 103 %.
    """
    right(head, shapes)


@pytest.mark.parametrize("size", [3, 5, 8], ids=["distinct", "B==T", "B==width"])
def test_03_time_first(size: int):
    """3 (opacus#650): layers called with [T, B, d], as XLNet and LED do."""
    torch.manual_seed(0)
    attention, head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)
    model = nn.ModuleList([nn.Linear(8, 8), attention, head]).double()

    def losses(step: int) -> Tensor:
        x = model[0](normal(size, 5, 8, seed=step).transpose(0, 1))
        return model[2](model[1](x, x, x)[0]).sin().sum((0, 2))

    assert_engine_right(model, losses)


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
def test_04_flattened_tokens(shapes: list[tuple[int, int]]):
    """4 (private-transformers, swap_opt): [B*T, d] inside the model; rows are instance-major, closed rules apply."""

    class Opt(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x.reshape(-1, 6)))).view(*x.shape[:2], 4)

    torch.manual_seed(0)
    model = Opt().double()
    tiers = assert_engine_right(model, lambda step: model(normal(*shapes[step], 6, seed=step)).sin().sum((1, 2)))
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
def test_05_06_experts(family: str, shapes: list[tuple[int, int]]):
    """5, 6: experts see gathered tokens in an order of their own.

    Their weights are 3-D parameters of a module that is no leaf; routers return tuples.
    """
    right(Head("decoder", family), shapes)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("group", [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, -1, 0], None], ids=str)
def test_06_experts_with_many_tokens(family: str, group: list[int] | None):
    """6: where an expert sees many tokens of few objectives, its rows are formed instead of pairs of tokens."""
    model = model_of(Head("decoder", family))
    count = 4 if group is None else 2

    def losses(step: int) -> Tensor:
        each = instance_losses(model(ids(4, 30, seed=step)))
        if group is None:
            return each
        return each.new_zeros(count + 1).index_add(0, torch.tensor(group) + 1, each)[1:]

    segments = None if group is None else lambda step: torch.tensor(group)
    tiers = assert_engine_right(model, losses, segments=segments, steps=1)
    assert all(tier == 1 for name, tier in tiers.items() if "experts" in name and "shared" not in name)


def test_05_switch_experts():
    """5: Switch's experts see [2, d], [7, d], [9, d] tokens, depending on the data."""
    right(Head("encoder-decoder", "switch_transformers"), DISTINCT)


@pytest.mark.parametrize(
    "head", [Head("decoder", "gpt_oss"), Head("decoder", "mamba"), Head("encoder", "bert")], ids=str
)
def test_07_parameter_of_a_parent(head: Head):
    """7 (private-transformers): a module with children has parameters itself (sinks, A_log, D, a head's bias)."""
    tiers = right(head, DISTINCT)
    names = {"gpt_oss": "sinks", "mamba": "A_log", "bert": "predictions.bias"}
    assert any(names[head.family] in n and t > 0 for n, t in tiers.items())


@pytest.mark.parametrize("family", ["bart", "pegasus", "mt5", "m2m_100"])
def test_08_shared_table_whose_owner_is_never_called(family: str):
    """8: `shared` is used by encoder and decoder and head, its own forward never."""
    right(Head("encoder-decoder", family), DISTINCT)


@pytest.mark.parametrize(
    "method", ["ia3", "adalora", "vera", "loha", "vblora", "lora-embeddings", "trainable-tokens", "shira"]
)
def test_08_adapters_in_dictionaries(method: str):
    """8: parameters in a ParameterDict, which is never called: hook-only engines lose them in silence."""
    model = tuned(method, tied=False)
    tiers = assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))
    assert all(t > 0 for t in tiers.values())


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE, [(2, 4), (2, 4)]], ids=["distinct", "B==T", "B=2"])
@pytest.mark.parametrize(
    "head", [Head("decoder", "gpt2"), Head("encoder", "bert"), Head("encoder-decoder", "bart")], ids=str
)
def test_09_tied_weights(head: Head, shapes: list[tuple[int, int]]):
    """9 (opacus#413, #433): rows of all uses add before the Gramian; without the cross terms it is wrong by 10 %."""
    right(head, shapes)


@pytest.mark.parametrize("keep_rows", [True, False, 10_000])
def test_09_tied_embedding_and_head(keep_rows: bool | int):
    """9 (pytorch#80951): in each mode."""
    model = tiny_gpt2()
    engine = Engine(model, keep_rows=keep_rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(2):
            losses = instance_losses(model(ids(3, 6, seed=step)))
            assert not check_step(engine, trainable(model), losses, keep_rows=[keep_rows])


def test_10_module_used_twice():
    """10 (backpack#248, opacus#58): net(x[:, :5]) + net(x[:, 5:]) as two calls; ALBERT's layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()

    def losses(step: int) -> Tensor:
        x = normal(3, 10, seed=step)
        return (net(x[:, :5]) + net(x[:, 5:])).square().sum(1)

    assert_engine_right(net, losses)
    right(Head("encoder", "albert"), DISTINCT)


@pytest.mark.parametrize("batch", [3, 16], ids=["distinct", "B==width"])
def test_11_dora_calls_its_adapter_twice(batch: int):
    """11: DoRA calls lora_A with the identity [in, in] and no gradient; with in == B even its shape fits."""
    model = tuned("dora", tied=False)
    assert_engine_right(model, lambda step: instance_losses(model(ids(batch, 4, seed=step))))


def test_12_keyword_inputs():
    """12 (pytorch#156695): a forward hook sees () where a layer is called head(input=h)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(input=self.norm(input=self.one(input=x)))

    torch.manual_seed(0)
    model = Net().double()
    assert_engine_right(model, lambda step: model(normal(4, 6, seed=step)).sin().sum(1))


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)], ids=str
)
def test_13_in_place_after_a_layer(act: nn.Module):
    """13 (pytorch#61519): views of hooks raise under in-place operations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 2)).double()
    assert_engine_right(model, lambda step: model(normal(4, 6, seed=step)).square().sum(1))


@pytest.mark.parametrize("embeddings", ["frozen", "input gradients"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_14_checkpointing_of_lora(reentrant: bool | None, embeddings: str):
    """14 (peft#80, cloneofsimo/lora#26): reentrant checkpointing and frozen embeddings.

    Taps under `inputs=[sentinel]` record no rows there, in silence.
    """
    model = with_lora(tiny_llama(), warm=True)
    if embeddings == "input gradients" or reentrant:
        model.enable_input_require_grads()
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    tiers = assert_engine_right(
        model, lambda step: instance_losses(model(input_ids=ids(3, 7, seed=step), use_cache=False))
    )
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_15_half_frozen_layers(frozen: str):
    """15 (opacus#436, #437): weight frozen and bias trainable (BitFit), and the other way."""
    model = tiny_gpt2()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))


def test_15_lora_with_all_biases():
    """15: LoraConfig(bias='all')."""
    model = get_peft_model(
        tiny_gpt2(),
        LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True, init_lora_weights=False),
    ).double()
    tiers = assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "lfm2", "olmo2"])
@pytest.mark.parametrize("shapes", [DISTINCT, [(4, 4), (4, 4)]], ids=["distinct", "B==T==heads"])
def test_16_inputs_of_rank_4(family: str, shapes: list[tuple[int, int]]):
    """16 (opacus ghost returns {}): norms of queries and keys see [B, T, heads, d]."""
    right(Head("decoder", family), shapes)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_17_embedding_bag_with_offsets(mode: str):
    """17 (opacus#673, #518): indices are flat; only offsets know the batch. And a norm with a buffer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.weight = nn.EmbeddingBag(9, 6, mode=mode), nn.Parameter(torch.randn(6))
            self.register_buffer("eps", torch.tensor(1e-6))

        def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
            x = self.bag(indices, offsets)
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    torch.manual_seed(0)
    model = Net().double()
    offsets = torch.tensor([0, 2, 5])

    def losses(step: int) -> Tensor:
        indices = torch.randint(9, (9,), generator=torch.Generator().manual_seed(step))
        return (model(indices, offsets) - torch.arange(6).sin()).square().sum(1)

    assert_engine_right(model, losses)


def test_18_attention_in_a_leaf():
    """18 (pytorch#151558): scaled dot-product attention inside a module with parameters of its own."""

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x @ self.q, x @ self.k, x @ self.v, is_causal=True)

    torch.manual_seed(0)
    model = nn.Sequential(Leaf(), nn.Linear(6, 2)).double()
    assert_engine_right(model, lambda step: model(normal(3, 5, 6, seed=step)).sin().sum((1, 2)))


def test_19_autocast_mixes_dtypes():
    """19 (opacus#740, #764): under autocast x is bfloat16 and g float32, or the other way."""
    model = tiny_llama().float()
    engine = Engine(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = instance_losses(model(ids(4, 6))).float()
    expected = brute_rows(losses, list(trainable(model)))
    jacobian = engine.compute_jacobian(losses)
    for p, name in trainable(model).items():
        rows = jacobian.rows(p)
        assert rows.dtype == torch.float32, name
        assert relative(rows, expected[p]) < 0.1, name


def test_20_adapters_after_construction_are_trained():
    """20 (opacus#820, peft#3409): training 'looks healthy', lora_B stays 0, 45 GPU-hours lost."""
    base = tiny_llama()
    engine = Engine(base)
    instance_losses(base(ids(3, 5)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).double()
    model(ids(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            losses = instance_losses(model(ids(3, 5)))
            engine.compute_gramian(losses)
    engine.accumulate_grad(torch.ones(3))
    moved = [p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moved) == 2
    assert all(moved)


def test_22_instance_without_labels():
    """22 (opacus#612, #530): all labels of one instance are ignored; a group is absent."""
    model = tiny_llama()
    labels = ids(3, 6)
    labels[1] = -100

    def losses(step: int) -> Tensor:
        logits = model(input_ids=ids(3, 6, seed=step)).logits.double()
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)

    assert_engine_right(model, losses)
    gramian = Engine(model).compute_gramian(losses(0))
    assert not gramian[1].any()


def test_23_accumulation():
    """23 (backpack#220, opacus#422): entries pop from the wrong forward when forwards and backwards interleave."""
    model = with_lora(tiny_llama(), warm=True)
    names = list(trainable(model))
    engine = Engine(model)
    batches = [ids(n, t, seed=n) for n, t in ((3, 5), (2, 5), (3, 4))]
    pending = [instance_losses(model(b)) for b in batches]
    with torch.no_grad():
        model(batches[0])
    found = []
    for losses in pending:
        expected = brute_rows(losses, names)
        jacobian = engine.compute_jacobian(losses)
        found.append(jacobian)
        assert all(relative(jacobian.rows(p), expected[p]) < SINGLE for p in names)
    total = type(found[0]).cat(found)
    assert len(total) == 8


def test_24_backward_to_given_inputs_changes_nothing_else():
    """24 (backpack#233): `backward(inputs=...)` is silently different with hooks; `.grad` stays as found."""
    model = tiny_gpt2()
    engine = Engine(model)
    losses = instance_losses(model(ids(3, 6)))
    names = list(trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gramian = engine.compute_gramian(losses)
    assert all(p.grad is None for p in names)
    losses.sum().backward(inputs=names[:2], retain_graph=True)
    assert [p.grad is not None for p in names[:3]] == [True, True, False]
    assert relative(gramian, brute_gramian(brute_rows(losses, names), losses.shape)) < EXACT


def test_26_rows_do_not_depend_on_the_batch_size():
    """26 (bergson#112): an instance's row is the same in batches of 2 and 8."""
    model = tiny_gpt2()
    engine = Engine(model)
    tokens = ids(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        large = engine.compute_jacobian(instance_losses(model(tokens)))
        small = engine.compute_jacobian(instance_losses(model(tokens[3:5])))
    assert relative(small.dense(), large.dense()[3:5]) < 1e-9


class Fused(nn.Module):
    """A LoRA layer whose forward reads its adapters' weights and calls neither."""

    def __init__(self):
        super().__init__()
        self.base, self.lora_A, self.lora_B = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight)


@pytest.mark.parametrize("size", [3, 6], ids=["distinct", "B==width"])
def test_29_fused_adapters(size: int):
    """29 (unsloth#1713, #11132): fused forwards bypass modules; their parameters must not vanish from the Gramian."""
    torch.manual_seed(0)
    model = nn.Sequential(Fused(), nn.Tanh(), Fused(), nn.Linear(6, 2)).double()
    tiers = assert_engine_right(model, lambda step: model(normal(size, 5, 6, seed=step)).sin().sum((1, 2)))
    assert all(t > 0 for t in tiers.values())


def test_28_head_read_by_its_weight():
    """28 (trl#5846): a fused loss reads `lm_head.weight`; the head's forward is never called."""
    model = tiny_llama()

    def losses(step: int) -> Tensor:
        tokens = ids(3, 6, seed=step)
        hidden = model.model(input_ids=tokens).last_hidden_state
        logits = (hidden @ model.lm_head.weight.T).double()
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)

    tiers = assert_engine_right(model, losses)
    assert tiers["lm_head.weight"] == 3
    assert {t for n, t in tiers.items() if n != "lm_head.weight"} == {1}


@pytest.mark.parametrize("side", ["left", "right"])
def test_30_padding(side: str):
    """30 (bergson, numerical stability): rows of an instance, batched with padding and alone."""
    model = tiny_llama()
    engine = Engine(model)
    tokens, mask = ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:], mask[2, 5:] = 0, 0
    if side == "left":
        tokens, mask = tokens.flip(1), mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def losses(rows: slice, columns: Tensor) -> Tensor:
        logits = model(
            tokens[rows][:, columns], mask[rows][:, columns], position_ids=positions[rows][:, columns]
        ).logits
        return ((logits.double() - 0.3).square().mean(2) * mask[rows][:, columns]).sum(1)

    together = engine.compute_jacobian(losses(slice(None), torch.arange(7))).dense()
    for i in range(3):
        alone = engine.compute_jacobian(losses(slice(i, i + 1), mask[i].nonzero().squeeze(1))).dense()
        assert relative(together[i : i + 1], alone) < SINGLE


def test_31_padding_free_documents():
    """31 (transformers#46333): batch dimension 1, instances along the tokens; ids follow the documents."""
    model = with_lora(tiny_llama(), warm=True)
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])

    def losses(step: int) -> Tensor:
        logits = model(input_ids=ids(1, 9, seed=step), position_ids=positions, use_cache=False).logits.double()
        return torch.zeros(3, dtype=torch.float64).index_add(0, document[0], (logits - 0.3).square().mean(2)[0])

    tiers = assert_engine_right(model, losses, segments=lambda step: document)
    assert set(tiers.values()) == {1}


def test_32_balancing_loss_is_named():
    """32 (transformers#28255): Mixtral's auxiliary loss mixes instances."""
    head = Head("decoder", "mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1})
    model = model_of(head)
    engine = Engine(model)
    tokens = ids(3, 6)
    output = model(input_ids=tokens, labels=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        engine_losses = instance_losses(output) + output.aux_loss.double()
        with pytest.raises(ValueError, match=r"mix.*balancing"):
            engine.compute_gramian(engine_losses)


def test_34_group_of_two_is_the_sum_of_their_rows():
    """34 (GhostSuite): sum(x) (x) sum(g) is the wrong shortcut; error 1.15 with two instances."""
    model = tiny_llama()
    tokens, group = ids(4, 6), torch.tensor([0, 0, 1, 1])
    engine = Engine(model)
    each = instance_losses(model(tokens))
    rows = engine.compute_jacobian(each).dense()
    grouped = engine.compute_jacobian(torch.stack([each[:2].sum(), each[2:].sum()]), group).dense()
    assert relative(grouped, torch.stack([rows[:2].sum(0), rows[2:].sum(0)])) < SINGLE


class FourBit(torch.autograd.Function):
    """Stands for bitsandbytes: a frozen base whose output is a view made inside a custom Function."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.saved_tensors[0], None


class QuantizedBase(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("packed", layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return FourBit.apply(x, self.packed)


def test_42_quantized_base():
    """42 (AgileRL#585): outputs of a 4-bit layer are views of a custom Function; LoRA adds to them in place."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = QuantizedBase(nn.Linear(6, 6))
            self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.base(x).clone()
            y += self.lora_B(self.lora_A(x))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.Tanh(), Adapted()).double()
    tiers = assert_engine_right(model, lambda step: model(normal(3, 5, 6, seed=step)).sin().sum((1, 2)))
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("option", ["padding_idx", "max_norm", "sparse", "scale_grad_by_freq"])
def test_embedding_options(option: str):
    """Options of nn.Embedding: no rows for padding; sparse gradients; a frequency over the batch is refused by name."""
    value = {"padding_idx": 2, "max_norm": 100.0, "sparse": True, "scale_grad_by_freq": True}[option]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, **{option: value}), nn.Linear(6, 3)).double()
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    if option == "scale_grad_by_freq":
        with pytest.raises(ValueError, match="scale_grad_by_freq=False"):
            Engine(model).compute_gramian(model(tokens).sin().sum((1, 2)))
        return
    tiers = assert_engine_right(model, lambda step: model(tokens).sin().sum((1, 2)))
    assert tiers["0.weight"] == 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma2RMSNorm, T5LayerNorm, Olmo2RMSNorm])
def test_rms_norms_of_float32(norm: type[nn.Module], size: float):
    """Their closed form knows the layer's eps, which counts where inputs are small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), norm(12, eps=1e-5))
    model[0].weight.data *= size
    nn.init.normal_(model[1].weight)
    engine = Engine(model)
    for _ in range(2):
        losses = model(torch.randn(4, 5, 6)).square().sum((1, 2))
        expected = brute_rows(losses, list(model.parameters()))
        jacobian = engine.compute_jacobian(losses)
        assert relative(jacobian.rows(model[1].weight), expected[model[1].weight]) < SINGLE
        assert set(engine.tiers().values()) == {1}
