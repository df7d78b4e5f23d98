"""Videos from converted weights, sampled like the published code of their method.

    anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER
    anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER \
        --config.prompt_file=interactive_benchmark.jsonl --out=out/benchmark

FOLDER is a folder that `anchor-jax port` wrote. Fields that are None take the values
of the weights' method, which are printed. Expected: out/<time>/000.mp4, 30 seconds of
480 x 832 pixels. This needs a GPU or a TPU.

Wan2.1's own weights make a whole clip of one prompt, like Wan2.1's own program: 50
steps of UniPC at its noise levels, shift 5, guidance 5, its negative prompt. For the
1.3B model at 480x832 its authors recommend guidance 6 and a shift from 8 to 12.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.weights = "weights/anchor"  # a folder of converted weights
    # HEIGHTxWIDTH in pixels: 480x832, 512x832, 320x576, or other multiples of 16.
    # Default: the weights' own size.
    config.size = placeholder(str)
    config.dtype = placeholder(str)  # bfloat16 or float32; default: the weights' own
    config.attention = "auto"  # or a kernel by name: plain runs on any machine
    # The text encoder is larger than the generator. "device" keeps it on the device,
    # "free" frees it after all prompts are encoded, "sharded" splits it over devices.
    config.text_encoder = "free"
    config.lora = "merged"  # or separate, like the published code; or none

    config.policy = placeholder(str)  # `anchor-jax policies` lists them
    config.rules = placeholder(str)  # paper, or release: like the published code
    # Overrides of the policy. Default: the policy's own values. `anchor-jax policies`
    # lists the RoPE rules and switch actions.
    config.rope = placeholder(str)
    config.on_switch = placeholder(str)
    config.window = placeholder(int)
    config.sink = placeholder(int)
    config.block = placeholder(int)

    config.prompt = (
        "A red fox walks through a snowy birch forest at dawn, the camera follows[10s]"
        " | The red fox stops at a frozen stream and looks at its reflection[10s]"
        " | The red fox runs over the ice towards the rising sun[10s]"
    )
    config.prompt_file = placeholder(str)  # replaces the prompt
    config.frames = placeholder(int)  # latent frames; default: sum of the durations
    config.seed = 0  # for lines without their own seed

    config.sampler = ConfigDict()
    config.sampler.solver = placeholder(str)  # renoise, euler, unipc, dpmpp
    config.sampler.steps = placeholder(tuple)  # for renoise
    config.sampler.warp = placeholder(bool)  # whether steps are given before the shift
    config.sampler.num_steps = placeholder(int)  # for euler, unipc and dpmpp
    # Noise levels for euler, unipc and dpmpp: wan_unipc and wan_dpmpp (Wan2.1's own
    # program), diffusers_unipc and diffusers_euler (diffusers), or even (evenly spaced
    # from 1, timesteps not truncated).
    config.sampler.grid = placeholder(str)
    config.sampler.shift = placeholder(float)
    # 1 turns guidance off. Other values run the model twice.
    config.sampler.guidance = placeholder(float)
    config.sampler.negative_prompt = placeholder(str)
    config.sampler.negative_prompt_file = placeholder(str)

    # Factor by which the video file is enlarged, without smoothing; 1 is as made.
    # Default: 4 for videos of less than 128 pixels on both sides, otherwise 1.
    config.enlarge = placeholder(int)
    config.out = placeholder(str)  # default: a new folder out/<time>
    return config
