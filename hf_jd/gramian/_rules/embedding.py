"""The rule of embeddings."""

from torch import Tensor, nn

from hf_jd.gramian.layouts import Segments, UnsupportedError, shared_features
from hf_jd.gramian.rows import Rows, SparseRows


def embedding(module: nn.Embedding, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of y = W[ids]: entry e gets the gradients of the tokens with id e; none for `padding_idx`."""
    if module.scale_grad_by_freq:
        raise UnsupportedError(
            "nn.Embedding(scale_grad_by_freq=True) divides gradients by counts over the whole batch, so instances have "
            "no separate rows: set scale_grad_by_freq=False."
        )
    g = shared_features(grad_output)
    ids = input.reshape(g.shape[:2])
    owners = segments.token_ids(g.shape[:2]).to(ids.device)
    used = owners >= 0
    if module.padding_idx is not None:
        used = used & (ids != module.padding_idx)
    values = g[used].to(module.weight.dtype)
    return {"weight": SparseRows(owners[used], ids[used], values, segments.objectives, module.weight.shape)}
