"""`anchor-jax plan`: estimates memory, time and cost for chips you don't have."""

import dataclasses
import os
import sys

from absl import flags

from anchor_jax import config as configs
from anchor_jax import interrupts
from anchor_jax.config import define_config_flag
from anchor_jax.errors import UserError, suggest
from anchor_jax.wan.spec import GRIDS, PRESETS, REMAT, WAN_2_1

SUMMARY = (
    "Estimate memory, time and cost for chips you don't have, by compiling for them."
)
USAGE = """\
anchor-jax plan --target=h100
anchor-jax plan --target=v5e --size=320x576
anchor-jax plan --target=all --model=1.3B --size=480x832 --json=plan.json
anchor-jax plan --config=configs/train_dmd.py --topology=v5p:4x4x4
anchor-jax plan --config=configs/train_streaming.py --config.batch=56 \\
    --config.mesh="(7,8,1,1)" --topology=h100:7x8,a100:7x8 --price=2.5 --nocompile
anchor-jax plan --config=configs/train_dmd.py --topology=v6e:8x8 --sweep
Without --config it plans a stream. With the config of a training it plans that
training's steps on a topology, with the config's mesh, batch and LoRA. The text encoder
is on the first chip of each machine. Without the target's compiler, or with
--nocompile, the numbers are formulas."""

# The process stays on the CPU. The TPU variables keep the TPU compiler from looking for
# a real TPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
AUTOTUNING = "--xla_gpu_autotune_level=0"  # needs a device

FLAGS = flags.FLAGS
_MODELS = ("1.3B", "14B")
_STEPS, _SHIFT = (1000, 750, 500, 250), 5.0
_HELD = {"param_dtype": "bfloat16"}  # as weights are stored
_COMPILED = 3  # of a sweep
PAPER = ("train_streaming.py", {"chip_hours": 1344, "chip": "A800", "batch": 56})
"""The shipped config of the paper's long tuning, and what that took."""
_FREE = (
    *("weights", "teacher", "critic", "batch", "mesh", "microbatches", "prefetch"),
    *("remat", "attention", "out", "watchdog", "profile", "preflight"),
)


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "target", "all", "Chip: a100, b200, h100, h200, v4, v5e, v5p, v6e, or all."
    )
    flags.DEFINE_list(
        "topology",
        [],
        "Chips and how they are connected, instead of --target and --chips: nodes x"
        " chips per node (h100:7x8), the sides of a TPU slice (v5p:4x4x4), or one chip"
        " (v6e). Several are planned one after another.",
    )
    flags.DEFINE_string("model", "1.3B", f"Generator: {' or '.join(_MODELS)}.")
    flags.DEFINE_string(
        "size", WAN_2_1.size, f"Size of a stream in pixels: {', '.join(GRIDS)}."
    )
    flags.DEFINE_string("policy", "anchor_forcing", "Cache policy of a stream.")
    define_config_flag("")
    flags.DEFINE_integer(
        "chips", 64, "Chips of a training: a power of two, or nodes of 8 GPUs.", 1
    )
    flags.DEFINE_string(
        "teacher", "14B", f"Real score of a training: {' or '.join(_MODELS)}."
    )
    flags.DEFINE_list(
        "remat",
        [],
        "Rematerialisation policies of a training, planned one after another. Default:"
        " the config's.",
    )
    flags.DEFINE_boolean("compile", True, "Whether to compile. If not, only formulas.")
    flags.DEFINE_boolean(
        "sweep",
        False,
        "Whether to rank the meshes and rematerialisation policies of a training by"
        f" formula, and plan the best {_COMPILED} that fit.",
    )
    flags.DEFINE_float(
        "mfu", 0.4, "Share of the peak that matrix products are assumed to reach.", 0, 1
    )
    flags.DEFINE_float(
        "price",
        None,
        "Price of one chip for an hour, for the cost of a training or of an hour of"
        " video.",
        0,
    )
    flags.DEFINE_string(
        "hlo",
        None,
        "Folder for the texts of compiled programs. Default: none are kept.",
    )
    flags.DEFINE_string("json", None, "JSON file for the numbers. Default: no file.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: A name is unknown, or the config does not fit the chips.
    """
    del argv
    _prepare_environment()
    from anchor_jax import io

    path = FLAGS.json and io.expand(FLAGS.json)
    if not FLAGS.mfu:
        raise UserError("--mfu=0: must be above 0 and at most 1, such as 0.4")
    if FLAGS.config:
        summaries = _plan_training()
    else:
        summaries = _plan_stream()
    if path:
        io.write_json(path, summaries)
        print(f"Wrote {path}")


def _plan_stream() -> dict:
    from anchor_jax.cli import plan_tables
    from anchor_jax.perf import aot

    if FLAGS.sweep:
        raise UserError("--sweep is for a training; add --config=configs/train_dmd.py")
    setup, text, vae = _sizes()
    summaries = {}
    for one in _topologies(chips=1):
        if one.chips > 1:
            raise UserError(
                f"--topology={one.label}: a stream uses one chip; write"
                f" --topology={one.name}, or add the --config of a training"
            )
        options = _options(one)
        report = aot.plan(one.name, setup, text, vae, _say(one.name), **options)
        cost = {"cost": report.cost(FLAGS.price)}
        summaries[one.name] = report.summary() | cost
        lines = plan_tables.table(one.name, summaries[one.name])
        print("\n".join(lines), flush=True)
    return summaries


def _plan_training() -> dict:
    from anchor_jax.perf import train_plan
    from anchor_jax.training.run import read_config
    from anchor_jax.wan.text import TextConfig
    from anchor_jax.wan.vae import VaeConfig

    config = read_config(FLAGS.config)
    models = (_stored(flag) for flag in ("model", "teacher"))
    networks = train_plan.NetworkSizes(*models, VaeConfig(**_HELD), TextConfig(**_HELD))
    summaries: dict = {}
    for one in _topologies(FLAGS.chips):
        options = _options(one)
        if FLAGS.sweep:
            chosen = _sweep(one, config, networks, summaries)
        else:
            policies = FLAGS.remat or [config.remat]
            chosen = {
                f"{_title(one)}, remat {remat}": dataclasses.replace(
                    config, remat=_remat(remat)
                )
                for remat in policies
            }
        for title, some in chosen.items():
            _plan_one(title, one, some, networks, options, summaries)
    return summaries


def _plan_one(title: str, one, config, networks, options: dict, summaries) -> None:
    """Plans a training on one topology, adds the numbers, and prints them."""
    from anchor_jax.cli import plan_tables
    from anchor_jax.perf import train_plan
    from anchor_jax.perf.work import Cost

    report = train_plan.plan(one, config, networks, _say(title), **options)
    if report.lacks_memory:
        smaller = train_plan.find_smaller(one, config, networks)
        report = dataclasses.replace(report, smaller=smaller)
    seconds = report.estimate.step.seconds
    cost = Cost(config.steps, one.chips, seconds, FLAGS.price)
    summaries[title] = report.summary() | {
        "cost": cost.summary(),
        "paper": PAPER[1] if is_of_the_paper(config) else None,
    }
    lines = plan_tables.training_table(title, summaries[title])
    print("\n".join(lines), flush=True)


def _sweep(one, config, networks, summaries: dict) -> dict:
    """Prints a ranking, and returns the best configs by title."""
    from anchor_jax.cli import plan_tables
    from anchor_jax.perf import train_sweep

    if FLAGS.remat:
        raise UserError(
            "--remat and --sweep: a sweep chooses the policy; leave one out"
        )
    fitting, others = train_sweep.best(
        one, config, networks, _COMPILED, efficiency=FLAGS.mfu, progress=_checking()
    )
    rows = [candidate.summary() for candidate in (*others, *fitting)]
    rows.sort(key=lambda row: row["seconds"])
    summaries[f"{_title(one)}, sweep"] = {"ranking": rows}
    print("\n".join([f"{_title(one)}, sweep", *plan_tables.ranking(rows)]), flush=True)
    if not fitting:
        print("  nothing fits; choose more chips or a smaller --config.size")
    return {f"{_title(one)}, {some.name}": some.config for some in fitting}


def is_of_the_paper(config) -> bool:
    """Returns whether a config trains what the paper's long tuning trains.

    Its batch, mesh and folders may differ.
    """
    from anchor_jax.training.run import read_config

    file = configs.find_config(PAPER[0])
    theirs = read_config(configs.load_config(str(file)))
    free = {name: getattr(theirs, name) for name in _FREE}
    sizes = (FLAGS.model, FLAGS.teacher, config.size or WAN_2_1.size)
    same = dataclasses.replace(config, size=None, **free) == theirs
    return same and sizes == (*_MODELS, WAN_2_1.size)


def _title(one) -> str:
    """Returns a topology's name in titles: as it was given."""
    return one.label if FLAGS.topology else one.name


def _options(one) -> dict:
    """Returns the options of a plan on a topology, and says if it is a formula."""
    from anchor_jax import io
    from anchor_jax.perf import targets

    compiles = FLAGS.compile
    if compiles:
        try:
            targets.find_target(one.name)
        except UserError as error:
            compiles = False
            print(f"only formulas: {error}", file=sys.stderr, flush=True)
    keep = io.expand(FLAGS.hlo) if FLAGS.hlo else None
    return {"compiles": compiles, "efficiency": FLAGS.mfu, "keep": keep}


def _remat(name: str) -> str:
    if name not in REMAT:
        raise UserError(f"--remat={name!r}{suggest(name, REMAT, 'choices')}")
    return name


def _prepare_environment() -> None:
    os.environ |= ENVIRONMENT
    import jax

    # A config file may have imported jax already, and jax then ignores the environment.
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
    given = os.environ.get("XLA_FLAGS", "")
    if AUTOTUNING not in given:
        os.environ["XLA_FLAGS"] = f"{given} {AUTOTUNING}".strip()


def _sizes():
    """Returns the stream's setup, and the sizes of text encoder and VAE."""
    from anchor_jax.cache.policies import POLICIES
    from anchor_jax.flow import few_step_levels
    from anchor_jax.streaming.types import StreamSetup
    from anchor_jax.wan.text import TextConfig
    from anchor_jax.wan.vae import VaeConfig

    setup = StreamSetup(
        model=_stored("model"),
        grid=GRIDS[_one_of("size", GRIDS)],
        policy=POLICIES[_one_of("policy", POLICIES)],
        levels=few_step_levels(_STEPS, _SHIFT),
    )
    return setup, TextConfig(**_HELD), VaeConfig(**_HELD)


def _stored(flag: str):
    """Returns the sizes of the network that a flag names."""
    return dataclasses.replace(PRESETS[_one_of(flag, _MODELS)], **_HELD)


def _one_of(flag: str, known) -> str:
    """Returns a flag's value.

    Raises:
      UserError: The value is unknown.
    """
    value = FLAGS[flag].value
    if value not in known:
        raise UserError(f"--{flag}={value!r}{suggest(value, known, 'choices')}")
    return value


def _topologies(chips: int) -> list:
    """Returns the requested topologies; for "all", this number of every chip."""
    from anchor_jax.perf import targets

    if FLAGS.topology:
        for flag in ("target", "chips"):
            if FLAGS[flag].present:
                raise UserError(
                    f"--topology and --{flag}: a topology names both the chip and the"
                    f" number; leave out --{flag}"
                )
        return [targets.parse_topology(text) for text in FLAGS.topology]
    if FLAGS.target != "all":
        return [targets.topology(FLAGS.target, chips)]
    return [targets.topology(name, chips) for name in targets.TARGETS]


def _say(name: str):
    def say(part: str) -> None:
        print(f"{name}: compiling {part}", file=sys.stderr, flush=True)

    return interrupts.checking(say)


def _checking():
    """Returns a silent function that notices requests to stop."""
    return interrupts.checking(lambda _: None)
