"""The tiny world: ten seconds, three prompts, on any CPU.

    anchor-jax sample --config=configs/tiny.py
    anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1

No GPU and no download: the weights come with the package. Expected: out/<time>/000.mp4,
10 seconds of 64 x 64 pixels; the object changes within a second of 4 s and 7 s. About
20 seconds on one core the first time, 5 once the programs are compiled.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(policy: str = "anchor_forcing") -> ConfigDict:
    """Returns the config; `anchor-jax policies` lists what `policy` can be."""
    config = ConfigDict()
    config.weights = "tiny"  # or a folder with model.safetensors and tokenizer.model
    config.size = placeholder(str)  # pixels, such as "64x64"; else the weights' own
    config.dtype = placeholder(str)  # bfloat16, float32; else the weights' own
    config.attention = "auto"  # or plain, heads, cudnn, splash
    config.text_encoder = "device"  # or free, sharded
    config.lora = "merged"  # or separate, none; for weights that have updates
    config.policy = policy
    config.rules = "paper"  # or "release", as the published code has it
    # Parts of the policy to replace; without a value it keeps its own. The RoPE rules
    # and switch actions are listed by `anchor-jax policies`.
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
    config.prompt_file = placeholder(str)  # taken instead of the prompt
    config.frames = placeholder(int)  # latent frames; else from the prompts' durations
    config.seed = 0

    config.sampler = ConfigDict()
    config.sampler.solver = "renoise"  # or euler, unipc, dpmpp
    config.sampler.steps = (1000, 750, 500, 250)  # of renoise
    config.sampler.warp = True  # whether steps are before the shift
    config.sampler.num_steps = 50  # of euler, unipc and dpmpp
    # Noise levels of the same; or wan_unipc, wan_dpmpp, diffusers_unipc,
    # diffusers_euler, as Wan2.1's own program and diffusers have them.
    config.sampler.grid = "even"
    config.sampler.shift = 5.0
    config.sampler.guidance = 1.0  # 1 is none; more runs the model twice
    config.sampler.negative_prompt = ""
    config.sampler.negative_prompt_file = placeholder(str)

    config.out = placeholder(str)  # else a new folder out/<time>
    return config
