"""Pipelines of diffusers on tiny networks with random weights, all made here: nothing is loaded.

Text encoders are left out; `text_inputs` gives the embeddings that a call takes in their place.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

SD_TABLES = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TEXT = 8  # width of text embeddings


def _made(seed: int, kind: Any, **config: Any) -> Any:
    """A model with weights of its own seed; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**config).eval().requires_grad_(False)


def quiet(pipeline: Any) -> Any:
    """The pipeline without its progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet_2d() -> Any:
    return _made(
        0, diffusers.UNet2DModel, sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _unet_of_text(seed: int = 1, **config: Any) -> Any:
    config = dict(in_channels=4, out_channels=4, cross_attention_dim=TEXT) | config
    return _made(
        seed, diffusers.UNet2DConditionModel, sample_size=8, layers_per_block=1,
        block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **config,
    )  # fmt: skip


def _vae(**config: Any) -> Any:
    config = dict(latent_channels=4) | config
    return _made(
        2, diffusers.AutoencoderKL, sample_size=16, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )  # fmt: skip


def ddpm() -> Any:
    return quiet(diffusers.DDPMPipeline(_unet_2d(), diffusers.DDPMScheduler()))


def ddim() -> Any:
    return quiet(diffusers.DDIMPipeline(_unet_2d(), diffusers.DDIMScheduler()))


def consistency() -> Any:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    return quiet(diffusers.ConsistencyModelPipeline(_unet_2d(), scheduler))


def stable_diffusion(kind: str = "StableDiffusionPipeline", scheduler: Any = None) -> Any:
    """Latents of 4 channels, half as wide as the image; 4 channels in, so inpainting blends."""
    scheduler = scheduler or diffusers.DDIMScheduler(
        **SD_TABLES, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = getattr(diffusers, kind)(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=_unet_of_text(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipeline)


def stable_diffusion_xl(kind: str = "StableDiffusionXLPipeline") -> Any:
    unet = _unet_of_text(
        10, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=TEXT + 6 * 4,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_TABLES, use_karras_sigmas=True)
    absent = {f"{part}{k}": None for part in ("text_encoder", "tokenizer") for k in ("", "_2")}
    return quiet(
        getattr(diffusers, kind)(
            vae=_vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **absent
        )
    )


def latent_consistency() -> Any:
    pipeline = diffusers.LatentConsistencyModelPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=_unet_of_text(time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler(**SD_TABLES, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipeline)


def deepfloyd_if() -> Any:
    """Learned-range variance and dynamic thresholding, in pixel space."""
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5, beta_schedule="squaredcos_cap_v2",
    )  # fmt: skip
    pipeline = diffusers.IFPipeline(
        tokenizer=None, text_encoder=None, unet=_unet_of_text(3, in_channels=3, out_channels=6),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipeline)


def dit() -> Any:
    transformer = _made(
        4, diffusers.DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=4,
        in_channels=4, out_channels=8, num_layers=1, sample_size=8, norm_num_groups=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(
        transformer=transformer, vae=_vae(), scheduler=diffusers.DDIMScheduler()
    )
    return quiet(pipeline)


def stable_diffusion_3() -> Any:
    transformer = _made(
        5, diffusers.SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4,
        out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=TEXT, caption_projection_dim=8, pooled_projection_dim=TEXT,
        pos_embed_max_size=16,
    )  # fmt: skip
    absent = {
        f"{part}{k}": None for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")
    }
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(shift_factor=0.06, use_quant_conv=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **absent,
    )  # fmt: skip
    return quiet(pipeline)


def flux() -> Any:
    transformer = _made(
        6, diffusers.FluxTransformer2DModel, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    absent = {f"{part}{k}": None for part in ("text_encoder", "tokenizer") for k in ("", "_2")}
    pipeline = diffusers.FluxPipeline(
        transformer=transformer, vae=_vae(shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        ), **absent,
    )  # fmt: skip
    return quiet(pipeline)


def wan() -> Any:
    """Video, by UniPC on the noise levels of flow matching."""
    transformer = _made(
        7, diffusers.WanTransformer3DModel, num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=8, ffn_dim=16, num_layers=1,
        rope_max_seq_len=16,
    )  # fmt: skip
    vae = _made(
        8, diffusers.AutoencoderKLWan, base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1],
        num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 1.0, 0.7],
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    return quiet(pipeline)


def cogvideox(scheduler: Any) -> Any:
    transformer = _made(
        11, diffusers.CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=8,
        in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=TEXT, num_layers=1,
        sample_width=4, sample_height=4, sample_frames=5, patch_size=2, max_text_seq_length=5,
        temporal_compression_ratio=4,
    )  # fmt: skip
    vae = _made(
        12, diffusers.AutoencoderKLCogVideoX, latent_channels=4, layers_per_block=1,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    return quiet(pipeline)


def text_inputs(
    batch: int = 1, *, pooled: bool = False, negative: bool = True, dtype: Any = torch.float32
) -> dict[str, Any]:
    """Embeddings for `batch` prompts, the same ones at the front of any batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        prompt, against = torch.randn(2, 4, 5, TEXT).to(dtype).unbind()
    given = {"prompt_embeds": prompt[:batch]}
    if pooled:
        given["pooled_prompt_embeds"] = prompt[:batch, 0]
    if negative:
        given["negative_prompt_embeds"] = against[:batch]
        if pooled:
            given["negative_pooled_prompt_embeds"] = against[:batch, 0]
    return given


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(height: int = 16, width: int = 16) -> torch.Tensor:
    """A picture in [0, 1], (1, 3, height, width)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)])[None]
