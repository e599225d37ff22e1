"""Small MARs and golden cases, for the tests of model, objective and sampler."""

import torch

from goldens_util import CASES, part
from tinyfusion_pl.models import MAR, create_model

SMALL = {"input_size": 4, "in_channels": 3, "hidden_size": 16, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "num_classes": 5,
         "buffer_size": 3, "head_width": 16, "head_depth": 2}  # fmt: skip
NO_DROPOUT = {"attn_dropout": 0.0, "proj_dropout": 0.0}


def trained_like(**overrides):
    """A small MAR whose zero-initialised parts are not zero any more."""
    model = create_model("mar_base", **{**SMALL, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def golden_mar(golden):
    """A MAR of a golden's sizes with its weights, in evaluation mode."""
    state = part(golden, "weights")

    def depth(stack):
        return 1 + max(
            int(k.removeprefix(f"{stack}.").split(".")[0])
            for k in state
            if k.startswith(f"{stack}.")
        )

    num_classes, hidden_size = state["class_emb.weight"].shape
    num_positions, num_tokens = (
        state["encoder_pos_embed_learned"].shape[1],
        state["diffusion_pos_embed_learned"].shape[1],
    )
    model = MAR(input_size=golden["x"].shape[-1], in_channels=golden["x"].shape[1], hidden_size=hidden_size,
                encoder_depth=depth("encoder_blocks"), decoder_depth=depth("decoder_blocks"), num_heads=CASES["config"]["heads"],
                mlp_ratio=state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / hidden_size, num_classes=num_classes,
                buffer_size=num_positions - num_tokens, head_width=state["diffloss.net.input_proj.weight"].shape[0],
                head_depth=depth("diffloss.net.res_blocks"))  # fmt: skip
    model.load_state_dict(state)
    return model.eval()


def golden_positions(golden):
    """Visible (N, V) and masked (N, K) positions, ascending, of a golden's mask (1 = masked, as many in each sample)."""
    num_masked = int(golden["mask"][0].sum())
    order = golden["mask"].argsort(dim=1, descending=True, stable=True)
    return order[:, num_masked:], order[:, :num_masked]
