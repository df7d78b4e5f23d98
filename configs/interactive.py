"""Videos from ported weights, sampled as their method's published code does.

    anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER
    anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER \
        --config.prompt_file=interactive_benchmark.jsonl --out=out/benchmark

FOLDER is what `anchor-jax port` wrote. Fields without a value are chosen for the method
that the weights were ported as, and the choice is printed. Expected:
out/<time>/000.mp4, 30 seconds of 480 x 832 pixels, which needs a GPU or a TPU.

Wan2.1's own weights make a whole clip of one prompt, as Wan2.1's program does: 50 steps
of UniPC at its noise levels, shift 5, guidance 5, its negative prompt. For the 1.3B
model at 480x832 its makers recommend guidance 6 and a shift from 8 to 12.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.weights = "weights/anchor"  # a folder of ported weights
    # Pixels, height first: 480x832, 512x832, 320x576, or others in multiples of 16;
    # without a value the weights' own.
    config.size = placeholder(str)
    config.dtype = placeholder(str)  # bfloat16 or float32; else the weights' own
    config.attention = "auto"  # or plain, heads, cudnn, splash
    # The text encoder is larger than the generator: "device" keeps it on the device,
    # "free" only until all prompts are encoded, "sharded" splits it over all devices.
    config.text_encoder = "free"
    config.lora = "merged"  # or separate, as the published code has it; or none

    config.policy = placeholder(str)  # `anchor-jax policies` lists them
    config.rules = placeholder(str)  # paper, or release: as the published code has it
    # Parts of the policy to replace; without a value it keeps its own. The RoPE rules
    # and switch actions are listed by `anchor-jax policies`.
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
    config.prompt_file = placeholder(str)  # taken instead of the prompt
    config.frames = placeholder(int)  # latent frames; else from the prompts' durations
    config.seed = 0  # of lines that have none

    config.sampler = ConfigDict()
    config.sampler.solver = placeholder(str)  # renoise, euler, unipc, dpmpp
    config.sampler.steps = placeholder(tuple)  # of renoise
    config.sampler.warp = placeholder(bool)  # whether steps are before the shift
    config.sampler.num_steps = placeholder(int)  # of euler, unipc and dpmpp
    # Noise levels of the same: wan_unipc, wan_dpmpp (of Wan2.1's own program),
    # diffusers_unipc, diffusers_euler (of diffusers), even (from 1, timesteps uncut).
    config.sampler.grid = placeholder(str)
    config.sampler.shift = placeholder(float)
    config.sampler.guidance = placeholder(float)  # 1 is none; more runs the model twice
    config.sampler.negative_prompt = placeholder(str)
    config.sampler.negative_prompt_file = placeholder(str)

    config.out = placeholder(str)  # else a new folder out/<time>
    return config
