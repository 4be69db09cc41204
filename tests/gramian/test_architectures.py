"""Kinds of architectures that TorchJD's engine is tested on, and some that break per-instance gradient engines."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_jd.gramian import Engine
from tests.gramian.architectures import D, Plain
from tests.gramian.modules_of_functions import (
    BatchLast,
    BiasKeepsNoInput,
    Custom,
    DataDependent,
    Dropouts,
    Flattened,
    Gathered,
    InPlace,
    OneByOne,
    Random,
    Reordered,
    Views,
)
from tests.gramian.modules_of_layers import (
    Attention,
    Bags,
    Bilinear,
    Cell,
    Convolutions,
    ConvTransposed,
    InstanceNormNet,
    MultiLinear,
    NoModules,
    Normalised,
    Recurrent,
    Transformer,
    WeightNorm,
)
from tests.gramian.modules_of_structure import (
    BatchByKeyword,
    Branches,
    Buffered,
    CalledByForward,
    CountedBuffer,
    DataclassOut,
    Keywords,
    Lambda,
    NamedOuter,
    Nested,
    NoTensorOut,
    PyTrees,
    ScalarOut,
    Scripted,
    SharedDictionary,
    SideEffect,
    Strings,
    TwoPaths,
)
from tests.gramian.modules_that_share import (
    CalledOnceInVain,
    CalledOnParts,
    CalledTwice,
    FreeParameters,
    Frozen,
    FrozenBranch,
    ParentAlsoReadsChild,
    ParentReadsChild,
    ReadOutside,
    ReadTwoLevelsUp,
    SharedByLinears,
    SharedByParentAndChild,
    SharedByTwoModules,
    SharedTransposed,
    TrainableButUnusedThere,
    Unused,
    UnusedOutput,
    UsedTwiceInside,
)
from tests.gramian.oracle import assert_engine_right, check_step, trainable

VECTORS: dict[str, Callable[[], nn.Module]] = {
    "nested": Nested,
    "branches": Branches,
    "pytrees": PyTrees,
    "named tuple with a string": NamedOuter,
    "no tensor out": NoTensorOut,
    "parameter used twice inside": UsedTwiceInside,
    "parameter of two modules": SharedByTwoModules,
    "weight of two Linears": SharedByLinears,
    "parameter of parent and child": SharedByParentAndChild,
    "module called twice": CalledTwice,
    "module called on parts": CalledOnParts,
    "module called in vain": CalledOnceInVain,
    "unused": Unused,
    "frozen": Frozen,
    "frozen branch": FrozenBranch,
    "output without gradient": TrainableButUnusedThere,
    "unused output": UnusedOutput,
    "buffer": Buffered,
    "buffer that counts": CountedBuffer,
    "side effect": SideEffect,
    "strings": Strings,
    "keywords": Keywords,
    "batch by keyword": BatchByKeyword,
    "free parameters": FreeParameters,
    "parent reads child": ParentReadsChild,
    "parent also reads child": ParentAlsoReadsChild,
    "read two levels up": ReadTwoLevelsUp,
    "weight in the loss": ReadOutside,
    "in place": InPlace,
    "in place on inputs": BiasKeepsNoInput,
    "called by forward": CalledByForward,
    "scripted part": Scripted,
    "dataclasses": DataclassOut,
    "shared dictionary": SharedDictionary,
    "two paths": TwoPaths,
    "scalar out": ScalarOut,
    "views": Views,
    "random": Random,
    "dropouts": Dropouts,
    "bag of sums": lambda: Bags("sum"),
    "bag of means": lambda: Bags("mean"),
    "bilinear": Bilinear,
    "custom function": Custom,
    "control flow": DataDependent,
    "weight norm": lambda: WeightNorm(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: WeightNorm(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: WeightNorm(nn.utils.parametrizations.orthogonal),
    "many norms": MultiLinear,
    "RMSNorms, and alike": Normalised,
    "containers": Lambda,
    **{
        f"outputs of rank {len(shape) + 1}": lambda shape=shape: NoModules(*shape)
        for shape in [(), (2,), (2, 3), (2, 1, 3)]
    },
    "RNN cell over features": lambda: Plain(nn.Linear(D, 3), 0),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "attention, time first": lambda: Attention(batch_first=False),
    "transformer": Transformer,
    "transformer, norm first": lambda: Transformer(norm_first=True),
    "transformer, time first": lambda: Transformer(batch_first=False),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU, num_layers=2),
    "LSTM": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "LSTM, time first": lambda: Recurrent(nn.LSTM, batch_first=False),
    "RNN cell": lambda: Cell(nn.RNNCell),
    "LSTM cell": lambda: Cell(nn.LSTMCell),
    "flattened and stacked": Flattened,
    "gathered": Gathered,
    "shared table": SharedTransposed,
    "in another order": Reordered,
    "batch last": BatchLast,
    "one by one": OneByOne,
    "linear in rank 3": lambda: Plain(nn.Linear(D, 3)),
    "conv1d": lambda: Plain(nn.Conv1d(5, 4, 3)),
    "transposed conv1d": lambda: Plain(nn.ConvTranspose1d(5, 4, 3)),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "instance norm": lambda: InstanceNormNet(affine=True),
    "instance norm without parameters": lambda: InstanceNormNet(),
    "convolution": lambda: Plain(nn.Conv2d(3, 2, 3)),
    "depthwise": lambda: Plain(nn.Conv2d(3, 6, 3, groups=3, padding=1)),
    "circular": lambda: Plain(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
    "transposed convolution": lambda: Plain(nn.ConvTranspose2d(3, 2, 3)),
}


def cases(kinds: dict[str, Callable[[], nn.Module]]) -> list:
    return [pytest.param(build, id=name) for name, build in kinds.items()]


def build_in_float64(build: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested_tensor")
        model = build().double()
    with torch.no_grad():
        model(x)  # Lazy layers.
    return model.double()


def losses_from(model: nn.Module, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    def losses(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        y = model(torch.randn(*shape, generator=generator, dtype=torch.float64))
        y = y.flatten(1) if y.dim() > 1 else y[:, None]
        # Targets differ, since after a norm, the loss for a single target would be constant.
        return (y - torch.arange(y.shape[1]).sin()).square().mean(1)

    return losses


def assert_right(build: Callable[[], nn.Module], *shape: int) -> None:
    model = build_in_float64(build, torch.ones(*shape, dtype=torch.float64))
    # Each forward continues a power iteration, so its result can't be repeated.
    assert_engine_right(
        model, losses_from(model, shape), own_graph=not any("_u" in name for name, _ in model.named_buffers())
    )


@pytest.mark.parametrize("size", [4, D, 1], ids=["B=4", "B==width", "B=1"])
@pytest.mark.parametrize("build", cases(VECTORS))
def test_architectures_on_vectors(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, D)


@pytest.mark.parametrize("size", [4, 5, D], ids=["B=4", "B==T", "B==width"])
@pytest.mark.parametrize("build", cases(SEQUENCES))
def test_architectures_on_sequences(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, 5, D)


@pytest.mark.parametrize("size", [2, 3], ids=["B=2", "B==channels"])
@pytest.mark.parametrize("build", cases(IMAGES))
def test_architectures_on_images(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, 3, 9, 9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims: int):
    assert_right(lambda: ConvTransposed(dims), 2, 3, *[4] * dims)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])  # The CPU's backends.
def test_attention_backends(backend: SDPBackend):
    model = build_in_float64(Transformer, torch.ones(4, 5, D, dtype=torch.float64))
    losses = losses_from(model, (4, 5, D))

    def under(step: int) -> Tensor:
        with sdpa_kernel(backend):
            return losses(step)

    assert_engine_right(model, under)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_with_running_statistics(affine: bool):
    """In training mode, statistics are per instance; buffers average over the batch and change with each forward."""
    model = build_in_float64(
        lambda: InstanceNormNet(affine=affine, track_running_stats=True), torch.ones(2, 3, 9, 9).double()
    )
    losses = losses_from(model, (2, 3, 9, 9))
    engine = Engine(model)
    for mode in (True, False, True):
        model.train(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            y = losses(0)
            before = {k: v.clone() for k, v in model.state_dict().items()}
            assert not check_step(engine, trainable(model), y)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("build", [CountedBuffer, lambda: WeightNorm(nn.utils.parametrizations.spectral_norm)])
def test_buffers_keep_their_values_from_the_forward(build: Callable[[], nn.Module]):
    """Calling a module again to form rows must not change its buffers."""
    model = build_in_float64(build, torch.ones(4, D, dtype=torch.float64)).train()
    engine = Engine(model)
    for step in range(2):
        losses = losses_from(model, (4, D))(step)
        before = {k: v.clone() for k, v in model.named_buffers()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            engine.compute_gramian(losses)
        assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_a_module_that_is_called_again_keeps_its_tensors():
    model = build_in_float64(TwoPaths, torch.ones(2, D).double())
    before = [*model.parameters(), *model.buffers()]
    engine = Engine(model)
    engine.compute_gramian(losses_from(model, (3, D))(0))
    assert engine.tiers()["scale"] == 2
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))


@pytest.mark.parametrize("build", [SharedDictionary, Custom])
def test_architectures_that_need_tier_2(build: Callable[[], nn.Module]):
    """Adapters that read one dictionary; functions that only plain autograd knows."""
    model = build_in_float64(build, torch.ones(2, D).double())
    engine = Engine(model)
    engine.compute_gramian(losses_from(model, (3, D))(0))
    assert 3 not in engine.tiers().values()


def test_hooks_leave_a_plain_backward_unchanged():
    """Hooks change neither gradients nor outputs, whether the engine is used or not."""
    for build in (Branches, PyTrees, InPlace, Strings, SharedByTwoModules):
        model = build_in_float64(build, torch.ones(4, D, dtype=torch.float64))
        plain = losses_from(model, (4, D))(0)
        plain.sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        engine = Engine(model)
        for use in (False, True):
            losses = losses_from(model, (4, D))(0)
            assert torch.equal(losses, plain)
            if use:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    engine.compute_gramian(losses)
            losses.sum().backward()
            for name, p in model.named_parameters():
                assert torch.equal(p.grad, expected[name])
            model.zero_grad()
