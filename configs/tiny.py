"""The tiny world: ten seconds, three prompts, on any CPU.

    anchor-jax sample --config=configs/tiny.py
    anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1

No GPU and no download: the weights come with the package. Expected: out/<time>/000.mp4,
10 seconds of 64 x 64 pixels; the object changes within a second of 4 s and 7 s. One
core takes well under a minute the first time, half of that once compiled.
"""

from ml_collections import ConfigDict


def get_config(policy: str = "anchor_forcing") -> ConfigDict:
    """Returns the config; `anchor-jax policies` lists what `policy` can be."""
    config = ConfigDict()
    config.weights = "tiny"  # or a folder with model.safetensors and tokenizer.model
    config.policy = policy
    config.rules = "paper"  # or "release", as the published code has it
    # Parts of the policy to replace; None keeps its own.
    config.rope = None  # absolute, relative, tri_region, bounded, ranked
    config.on_switch = None  # keep, flush, recache, recache_sink
    config.window = None
    config.sink = None
    config.block = None

    config.prompt = (
        "a red square moves right on a black background[4s]"
        " | a blue ring moves right on a black background[3s]"
        " | a yellow triangle moves up on a white background[3s]"
    )
    config.prompt_file = None  # taken instead of the prompt
    config.frames = None  # latent frames; None takes the prompts' durations
    config.seed = 0

    config.sampler = ConfigDict()
    config.sampler.solver = "renoise"  # or euler, unipc
    config.sampler.steps = (1000, 750, 500, 250)  # of renoise
    config.sampler.num_steps = 50  # of euler and unipc
    config.sampler.shift = 5.0
    config.sampler.guidance = 1.0  # 1 is none; more runs the model twice
    config.sampler.negative_prompt = ""
    config.sampler.negative_prompt_file = None

    config.out = None  # None makes a new folder out/<time>
    return config
