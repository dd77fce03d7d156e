"""The contrastive train step of sentence-transformers, on the batches of ours."""

import importlib.util

import numpy as np

PEER = "sentence-transformers"


def installed() -> bool:
    """Whether there is a peer to compare with."""
    return importlib.util.find_spec(PEER.replace("-", "_")) is not None


def make_peer(folder, *, dtype: str, rate: float, clip: float = 1.0, device="cpu"):
    """A function from one of our batches to the loss, which trains the model.

    `MultipleNegativesRankingLoss` at its default temperature, 1/20 as ours, gradient
    norms clipped as ours are, AdamW without weight decay. Dropout is off: ours has
    none. In bfloat16 by autocast: parameters stay float32, as ours do.

    Args:
        folder: of the checkpoint.
        dtype: 'float32' or 'bfloat16'.
        rate: learning rate.
        clip: largest norm of the gradient.
        device: as torch names it.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    if device == "cuda":  # TF32, which is what jax does unless told otherwise
        torch.set_float32_matmul_precision("high")
    model = SentenceTransformer(str(folder), device=device)
    model.eval()
    contrast = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def features(batch, side, rows):
        names = {"input_ids": f"{side}_ids", "attention_mask": f"{side}_mask"}
        return {
            name: torch.as_tensor(batch[ours][rows].astype(np.int64), device=device)
            for name, ours in names.items()
        }

    def step(batch) -> float:
        # It takes each query's own document from the same row; other documents follow.
        own = batch["target"]
        others = np.setdiff1d(np.arange(len(batch["documents"])), own)
        if len(others):
            raise ValueError("--pool: the peer knows the documents of the batch only")
        pair = [
            features(batch, "queries", slice(None)),
            features(batch, "documents", own),
        ]
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = contrast(pair, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())  # waits for the device

    return step
