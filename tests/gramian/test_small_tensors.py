"""Small tensors of a proof, which are copied side by side into blocks."""

import torch

from hf_jd.gramian._passes.check import probed_gradients
from hf_jd.gramian._passes.graph import Differentiator
from hf_jd.gramian._passes.small_tensors import BLOCK, SMALL, SmallTensors
from tests.models import tiny_llama


def test_copies_are_exact_and_lie_in_few_blocks() -> None:
    small = SmallTensors()
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(SMALL // 3, 2).to(dtype) for _ in range(9)]
        stored = [small.store(tensor) for tensor in tensors]
        assert all(torch.equal(a, b) for a, b in zip(stored, tensors, strict=True))
        blocks = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in stored}
        assert list(blocks.values()) == [BLOCK * tensors[0].element_size()] * 2


def test_large_and_sparse_tensors_stay_as_they_are() -> None:
    small = SmallTensors()
    for tensor in (torch.zeros(SMALL + 1), torch.eye(3).to_sparse()):
        assert small.store(tensor) is tensor


def test_gradients_of_a_proof_lie_in_one_block() -> None:
    model = tiny_llama()
    parameters = list(model.parameters())
    ids = torch.randint(0, 10, (3, 4))
    losses = model(input_ids=ids).logits.square().mean((1, 2))
    probe = torch.tensor([[1.0, 0.5, -0.25], [0.5, 0.5, 1.0]]).to(losses)
    gradients = probed_gradients(Differentiator(None), losses, probe, parameters)
    expected = [torch.autograd.grad((r * losses).sum(), parameters, retain_graph=True) for r in probe]
    for p, *parts in zip(parameters, *expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients[p] or (), parts, strict=True))
    assert len({g.untyped_storage().data_ptr() for part in gradients.values() for g in part or ()}) == 1
    assert not any(p._backward_hooks for p in parameters)
