"""What an autoencoder makes of an image: rebuilt from noise, or from the patches that are left."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.losses.denoising import masked_patches, patch_statistics, patchify, unpatchify
from overproof.models.autoencoder import autoencoder_of, normalised
from overproof.models.classifier import Classifier


def denoised(model: nn.Module, noisy: Tensor, source: Tensor | None) -> Tensor:
    """x^ = clamp(unpatchify(P sqrt(v + 1e-6) + mu)), P = D(E(noisy)), mu and v of the patches of `source`; or clamp(unpatchify(P)).

    Normalisation happens inside; noisy images come unclamped, and only the result is clamped. Nothing is detached: the gradient
    flows through the noisy images and through mu and v.

    Args:
        model: an autoencoder, such as a `Classifier` around one.
        noisy: in pixel units, (N, C, H, W).
        source: whose statistics are put in, in pixel units; None: the autoencoder was trained without `norm_pix`.

    Returns:
        (N, C, H, W) in [0, 1].
    """
    net = autoencoder_of(model)
    said = net.said(net.tokens(normalised(model, noisy))).to(noisy.dtype)
    return _pixels(model, _scaled(model, said, source)).clamp(0, 1)


def inpainted(model: nn.Module, images: Tensor, kept: Tensor, *, norm_pix: bool) -> Tensor:
    """Images (N, C, H, W) whose patches are guessed from those at `kept` (N, M), which stay as they are; in [0, 1].

    Args:
        model: a masked autoencoder, such as a `Classifier` around one.
        images: in [0, 1].
        kept: places of the patches that the encoder sees.
        norm_pix: whether the autoencoder was trained so; mu and v then come from the images, masked patches and all.
    """
    net = autoencoder_of(model)
    said = net.said(net.tokens(normalised(model, images), kept), kept).to(images.dtype)
    guessed = _scaled(model, said, images if norm_pix else None)
    own = patchify(normalised(model, images), net.patch_size)
    masked = masked_patches(kept, net.patches)[:, :, None].to(own.dtype)
    return _pixels(model, masked * guessed + (1 - masked) * own).clamp(0, 1)


def _scaled(model: nn.Module, said: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        return said
    mean, scale = patch_statistics(patchify(normalised(model, source), autoencoder_of(model).patch_size))
    return said * scale + mean


def _pixels(model: nn.Module, patches: Tensor) -> Tensor:
    net = autoencoder_of(model)
    images = unpatchify(patches, net.patch_size, net.shape)
    return images * model.normalize.std + model.normalize.mean if isinstance(model, Classifier) else images
