"""The commands of `anchor-jax`, by name.

A command is a module with

* `SUMMARY`, a line for the list of commands, and `USAGE`, examples of its use: both
  plain strings, since help reads them without importing the module;
* `define_flags()`, which defines absl flags on `absl.flags.FLAGS`
  (`anchor_jax.config.define_config_flag()` defines `--config`);
* `main(argv)`, which finds the parsed flags in `FLAGS`, and returns an exit status or
  None. `argv[0]` is the command. Other arguments that are not flags are refused unless
  the module names them: `ARGUMENTS = "FILE..."`.

Long work calls `anchor_jax.interrupts.check()` wherever it can stop.

A command may name pairs of config fields of which only one can be given on the command
line: `EXCLUSIVE = (("prompt", "prompt_file"),)`.

Import slow modules, such as jax, inside `main`.
"""

COMMANDS = {
    "sample": "anchor_jax.cli.sample",
    "replay": "anchor_jax.cli.replay",
    "compare": "anchor_jax.cli.compare",
    "verify": "anchor_jax.cli.verify",
    "trajectories": "anchor_jax.cli.trajectories",
    "train": "anchor_jax.cli.train",
    "sweep": "anchor_jax.cli.sweep",
    "score": "anchor_jax.cli.score",
    "ablate": "anchor_jax.cli.ablate",
    "port": "anchor_jax.cli.port",
    "export": "anchor_jax.cli.export",
    "bench": "anchor_jax.cli.bench",
    "policies": "anchor_jax.cli.policies",
    "plan": "anchor_jax.cli.plan",
    "doctor": "anchor_jax.cli.doctor",
}
