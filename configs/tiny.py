"""A ten-second stream of the tiny world with three prompts, on any CPU.

    anchor-jax sample --config=configs/tiny.py
    anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1

It needs no GPU and no download, because the weights come with the package. Expected:
out/<time>/000.mp4, 10 seconds of 64 x 64 pixels, enlarged four times; the object
changes within a second after 4 s and 7 s. It takes about 15 seconds the first time,
and 4 seconds when the programs are in the cache.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(policy: str = "anchor_forcing") -> ConfigDict:
    """Returns the config; `anchor-jax policies` lists the values of `policy`."""
    config = ConfigDict()
    config.weights = "tiny"  # or a folder of weights: ported, trained, or a bundle
    config.size = placeholder(str)  # pixels, such as "64x64"; default: the weights' own
    config.dtype = placeholder(str)  # bfloat16 or float32; default: the weights' own
    config.attention = "auto"  # or a kernel by name: plain runs on any machine
    config.text_encoder = "device"  # or free, sharded
    config.lora = "merged"  # or separate, none; for weights with LoRA adapters
    config.policy = policy
    config.rules = "paper"  # or "release", like the published code
    # Overrides of the policy. Default: the policy's own values. `anchor-jax policies`
    # lists the RoPE rules and switch actions.
    config.rope = placeholder(str)
    config.on_switch = placeholder(str)
    config.window = placeholder(int)
    config.sink = placeholder(int)
    config.block = placeholder(int)

    config.prompt = (
        "a red square moves right on a black background[4s]"
        " | a blue ring moves right on a black background[3s]"
        " | a yellow triangle moves up on a white background[3s]"
    )
    config.prompt_file = placeholder(str)  # replaces the prompt
    config.frames = placeholder(int)  # latent frames; default: sum of the durations
    config.seed = 0

    config.sampler = ConfigDict()
    config.sampler.solver = "renoise"  # or euler, unipc, dpmpp
    config.sampler.steps = (1000, 750, 500, 250)  # for renoise
    config.sampler.warp = True  # whether steps are given before the shift
    config.sampler.num_steps = 50  # for euler, unipc and dpmpp
    # Noise levels for euler, unipc and dpmpp: even, or wan_unipc and wan_dpmpp (of
    # Wan2.1's own program), or diffusers_unipc and diffusers_euler (diffusers).
    config.sampler.grid = "even"
    config.sampler.shift = 5.0
    config.sampler.guidance = 1.0  # 1 turns guidance off; others run the model twice
    config.sampler.negative_prompt = ""
    config.sampler.negative_prompt_file = placeholder(str)

    # Factor by which the video file is enlarged, without smoothing; 1 is as made.
    # Default: 4 for videos of less than 128 pixels on both sides, otherwise 1.
    config.enlarge = placeholder(int)
    config.out = placeholder(str)  # default: a new folder out/<time>
    return config
