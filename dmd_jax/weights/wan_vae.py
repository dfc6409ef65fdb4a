"""Tables of Wan's video autoencoders in files of other programs: names, layouts and settings.

"diffusers" is AutoencoderKLWan; "original" is Wan2.1_VAE.pth and Wan2.2_VAE.pth. Imports the
network and the row.
"""

import math
import re

from dmd_jax.models.wan_vae import WAN_2_1, WAN_2_2, WanVAEConfig
from dmd_jax.weights.table import Row

LAYOUTS = ("diffusers", "original")

# ours: (diffusers, original)
ENDS = {
    "encoder/conv": ("encoder.conv_in", "encoder.conv1"),
    "encoder/head/conv": ("encoder.conv_out", "encoder.head.2"),
    "decoder/conv": ("decoder.conv_in", "decoder.conv1"),
    "decoder/head/conv": ("decoder.conv_out", "decoder.head.2"),
}
END_NORMS = {
    "encoder/head/norm": ("encoder.norm_out", "encoder.head.0"),
    "decoder/head/norm": ("decoder.norm_out", "decoder.head.0"),
}
POINTWISE = {
    "quant": ("quant_conv", "conv1"),
    "post_quant": ("post_quant_conv", "conv2"),
}
# Of a coder's middle, in turn.
MIDDLE = {
    "diffusers": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    "original": ("middle.0", "middle.1", "middle.2"),
}
# Of a residual block.
NORMS = {"norm1": ("norm1", "residual.0"), "norm2": ("norm2", "residual.3")}
CONVS = {"conv1": ("conv1", "residual.2"), "conv2": ("conv2", "residual.6")}
SHORTCUT = ("conv_shortcut", "shortcut")

VOLUME, IMAGE = "o i t h w -> t h w i o", "o i h w -> h w i o"


def table(config, layout):
    """The rows of a network of `config` in a file of `layout`, "diffusers" or "original"."""
    column = LAYOUTS.index(layout)
    rows = []
    for ours, theirs in ENDS.items():
        rows += _kernel_and_bias(ours, theirs[column], VOLUME)
    for ours, theirs in END_NORMS.items():
        rows.append(_norm(ours, theirs[column], "c 1 1 1 -> c"))
    for ours, theirs in POINTWISE.items():
        rows += _kernel_and_bias(ours, theirs[column], "o i 1 1 1 -> i o")
    for coder in ("encoder", "decoder"):
        first, attention, second = (f"{coder}.{name}" for name in MIDDLE[layout])
        rows += _block(f"{coder}/middle/0", first, column, wider=False)
        rows += _attention(f"{coder}/middle/1", attention)
        rows += _block(f"{coder}/middle/2", second, column, wider=False)
    return rows + _encoder_stages(config, layout) + _decoder_stages(config, layout)


def _encoder_stages(config, layout):
    widths, rows = config.encoder_widths, []
    for stage, outputs in enumerate(widths[1:]):
        for i in range(config.blocks):
            rows += _block(
                f"encoder/stages/{stage}/layers/{i}",
                _down(config, layout, stage, i),
                LAYOUTS.index(layout),
                wider=i == 0 and widths[stage] != outputs,
            )
        if stage < len(config.temporal):
            i = config.blocks
            theirs = _down(config, layout, stage, i)
            rows += _resample(f"encoder/stages/{stage}/layers/{i}", theirs, config.temporal[stage])
    return rows


def _decoder_stages(config, layout):
    widths, rows = config.decoder_widths, []
    for stage, outputs in enumerate(widths[1:]):
        inputs = widths[stage] if config.residual or stage == 0 else widths[stage] // 2
        for i in range(config.blocks + 1):
            rows += _block(
                f"decoder/stages/{stage}/layers/{i}",
                _up(config, layout, stage, i),
                LAYOUTS.index(layout),
                wider=i == 0 and inputs != outputs,
            )
        if stage < len(config.temporal):
            i = config.blocks + 1
            theirs = _up(config, layout, stage, i)
            rows += _resample(
                f"decoder/stages/{stage}/layers/{i}", theirs, config.temporal[::-1][stage]
            )
    return rows


def _down(config, layout, stage, layer):
    """The name of a layer in a stage of the encoder; the layer after the blocks downsamples."""
    name = "down_blocks" if layout == "diffusers" else "downsamples"
    if not config.residual:
        return f"encoder.{name}.{stage * (config.blocks + 1) + layer}"
    if layout == "original":
        return f"encoder.downsamples.{stage}.downsamples.{layer}"
    inner = f"resnets.{layer}" if layer < config.blocks else "downsampler"
    return f"encoder.down_blocks.{stage}.{inner}"


def _up(config, layout, stage, layer):
    """The name of a layer in a stage of the decoder; the layer after the blocks upsamples."""
    if layout == "original" and not config.residual:
        return f"decoder.upsamples.{stage * (config.blocks + 2) + layer}"
    if layout == "original":
        return f"decoder.upsamples.{stage}.upsamples.{layer}"
    doubling = "upsampler" if config.residual else "upsamplers.0"
    inner = f"resnets.{layer}" if layer < config.blocks + 1 else doubling
    return f"decoder.up_blocks.{stage}.{inner}"


def _kernel_and_bias(ours, theirs, pattern):
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", pattern),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _norm(ours, theirs, pattern):
    return Row(f"{ours}/scale", f"{theirs}.gamma", pattern)


def _block(ours, theirs, column, *, wider):
    rows = [
        _norm(f"{ours}/{name}", f"{theirs}.{names[column]}", "c 1 1 1 -> c")
        for name, names in NORMS.items()
    ]
    for name, names in CONVS.items():
        rows += _kernel_and_bias(f"{ours}/{name}", f"{theirs}.{names[column]}", VOLUME)
    if wider:
        name = f"{theirs}.{SHORTCUT[column]}"
        rows += _kernel_and_bias(f"{ours}/shortcut", name, "o i 1 1 1 -> i o")
    return rows


def _attention(ours, theirs):
    return [
        _norm(f"{ours}/norm", f"{theirs}.norm", "c 1 1 -> c"),
        *_kernel_and_bias(f"{ours}/qkv", f"{theirs}.to_qkv", "o i 1 1 -> i o"),
        *_kernel_and_bias(f"{ours}/out", f"{theirs}.proj", "o i 1 1 -> i o"),
    ]


def _resample(ours, theirs, temporal):
    rows = _kernel_and_bias(f"{ours}/conv", f"{theirs}.resample.1", IMAGE)
    return rows + (
        _kernel_and_bias(f"{ours}/time", f"{theirs}.time_conv", VOLUME) if temporal else []
    )


# Settings in config.json that must have these values.
FIXED = {"attn_scales": [], "dropout": 0.0}
# Files of the original layout lack the statistics of the latents: their programs have them.
STATISTICS = {len(config.mean): (config.mean, config.std) for config in (WAN_2_1, WAN_2_2)}


def config_of(shapes, layout, settings=None):
    """The WanVAEConfig of a file, from its shapes; they lack the statistics of the latents.

    Args:
        shapes: {name: shape} of its tensors.
        settings: its parsed config.json, for the statistics; without one, they are those of the
            published network with as many latent channels.

    Raises:
        ValueError: it is not of a Wan autoencoder, or of one that this library does not have, or
            the statistics are not known.
    """
    settings = settings or {}
    for name, wanted in FIXED.items():
        if (found := settings.get(name, wanted)) != wanted:
            raise ValueError(f"{name} is {found!r} in its config.json, and can only be {wanted!r}")
    column = LAYOUTS.index(layout)
    try:
        conv, norm = ENDS["encoder/conv"][column], END_NORMS["decoder/head/norm"][column]
        encoder_dim, pixels = shapes[f"{conv}.weight"][:2]
        decoder_dim = shapes[f"{norm}.gamma"][0]
        channels = shapes[f"{POINTWISE['post_quant'][column]}.weight"][0]
        widest = shapes[f"{END_NORMS['encoder/head/norm'][column]}.gamma"][0]
    except KeyError as error:
        raise ValueError(f"there is no {error}: this is no Wan autoencoder") from None
    halvings = _halvings(shapes)
    widths = [*(shapes[f"{name}.resample.1.weight"][0] for name in halvings), widest]
    multipliers = tuple(width // encoder_dim for width in widths)
    norms = [name for name in shapes if re.match(_FIRST_NORM, name)]
    return WanVAEConfig(
        encoder_dim=encoder_dim,
        decoder_dim=decoder_dim // multipliers[0],
        multipliers=multipliers,
        blocks=len(norms) // len(widths),
        temporal=tuple(f"{name}.time_conv.weight" in shapes for name in halvings),
        patch=math.isqrt(pixels // 3),
        residual=any(re.search(r"^encoder\.\w+\.\d+\.(resnets|downsamples)\.", n) for n in shapes),
        **_statistics(channels, settings),
    )


# The first norm of every residual block of an encoder's stages, in both layouts.
_FIRST_NORM = r"encoder\.(down_blocks|downsamples)\..*(norm1|residual\.0)\.gamma$"


def _halvings(shapes):
    """Names of the layers that halve the resolution, from full resolution down."""
    names = [
        n.removesuffix(".resample.1.weight") for n in shapes if n.endswith("resample.1.weight")
    ]
    names = [name for name in names if name.startswith("encoder.")]
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _statistics(channels, settings):
    if "latents_mean" in settings:
        return dict(mean=tuple(settings["latents_mean"]), std=tuple(settings["latents_std"]))
    if channels not in STATISTICS:
        raise ValueError(
            f"mean and std of {channels} latent channels are not known: give a config.json with "
            "latents_mean and latents_std"
        )
    return dict(zip(("mean", "std"), STATISTICS[channels], strict=True))


def to_settings(config, layout):
    """The config.json with which the programs of `layout` load such a network.

    Those of the original layout read none, and know its two published networks by name.
    """
    c = config
    if layout == "original":
        return {}
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": c.encoder_dim,
        "decoder_base_dim": c.decoder_dim,
        "z_dim": c.channels,
        "dim_mult": list(c.multipliers),
        "num_res_blocks": c.blocks,
        "temperal_downsample": list(c.temporal),
        "latents_mean": list(c.mean),
        "latents_std": list(c.std),
        "is_residual": c.residual,
        "in_channels": 3 * c.patch**2,
        "out_channels": 3 * c.patch**2,
        "patch_size": c.patch if c.patch > 1 else None,
        "scale_factor_temporal": c.time_factor,
        "scale_factor_spatial": c.space_factor,
        **FIXED,
    }
