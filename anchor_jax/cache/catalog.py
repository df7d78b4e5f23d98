"""The one table of methods: cache policies, RoPE rules and switch actions, by name.

The command line, configs, recipes, `anchor-jax policies` and the tables of the READMEs
read it.
"""

import dataclasses

from anchor_jax.cache.actions import Flush, Keep, Recache, Restart, SwitchAction
from anchor_jax.cache.junctions import (
    Junction,
    PeriodicJunction,
    ReleaseJunction,
    TrainedJunction,
)
from anchor_jax.cache.policy import Policy
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative, RopeRule

TEACHER = "wan_teacher"

_ANCHOR_FORCING = "Anchor Forcing, arXiv:2603.13405"
_CAUSVID = "CausVid, arXiv:2412.07772"
_INFINITY_ROPE = "Infinity-RoPE, arXiv:2511.20649"
_LONGLIVE = "LongLive, arXiv:2509.22622"
_SELF_FORCING = "Self-Forcing, arXiv:2506.08009"
_WAN = "Wan2.1, arXiv:2503.20314"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method by name.

    Attributes:
      policy: its cache policy; None for `TEACHER`, whose policy depends on the clip.
      about: one sentence.
      source: the publication. Methods that have one are listed in the READMEs.
    """

    policy: Policy | None
    about: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Rope:
    """A RoPE rule by its name for `--config.rope`.

    Attributes:
      rule: the class. Recipes and snapshots find it by its own name.
      about: one sentence.
      range: number of RoPE positions; None takes the policy's window. It has no effect
        on a rule without a `range`.
    """

    rule: type[RopeRule]
    about: str
    range: int | None = None

    def make(self, window: int, cut: int | None) -> RopeRule:
        """Returns the rule for a policy's window and scene cut position, if any."""
        if not self._has_range:
            return self.rule()
        return self.rule(range=self.range or window, cut=cut)

    @property
    def ends_at_window(self) -> bool:
        """Whether the range has no position left for a junction."""
        return self._has_range and self.range is None

    @property
    def _has_range(self) -> bool:
        return "range" in {field.name for field in dataclasses.fields(self.rule)}


@dataclasses.dataclass(frozen=True)
class SwitchEntry:
    """A switch action by its name for `--config.on_switch`."""

    action: SwitchAction
    about: str


CATALOG = {
    "anchor_forcing": Entry(
        Policy(junction=Junction()),
        "the paper's method: positions 0-20, switch kept as junction",
        _ANCHOR_FORCING,
    ),
    "anchor_forcing_release": Entry(
        Policy(junction=ReleaseJunction()),
        "the released code's variant, for the released weights",
        f"{_ANCHOR_FORCING}, code",
    ),
    "longlive": Entry(
        Policy(positions=Absolute()),
        "LongLive 1.0: positions grow without bound",
        _LONGLIVE,
    ),
    "longlive_relative": Entry(
        Policy(positions=Relative(range=12)),
        "LongLive with positions 0-11",
        _LONGLIVE,
    ),
    "self_forcing": Entry(
        Policy(sink=0, window=21, positions=Absolute(), on_switch=Keep(), limit=21),
        "Self-Forcing: reads all frames, limited to 21 latent frames",
        _SELF_FORCING,
    ),
    "self_forcing_rolling": Entry(
        Policy(sink=0, window=21, positions=Absolute(), on_switch=Keep()),
        "Self-Forcing with a rolling window",
        _SELF_FORCING,
    ),
    "causvid": Entry(
        Policy(
            sink=0, window=21, positions=Absolute(), on_switch=Keep(), restart=Restart()
        ),
        "CausVid: clips of 21 latent frames, chained by their last 3",
        _CAUSVID,
    ),
    "infinity_rope": Entry(
        Policy(
            sink=1, window=6, positions=Relative(range=6, cut=45), on_switch=Flush()
        ),
        "Infinity-RoPE: positions 0-5, flush at a switch, scene cuts at 45-47",
        _INFINITY_ROPE,
    ),
    "infinity_rope_release": Entry(
        Policy(sink=1, window=6, positions=Ranked(range=6, cut=45), on_switch=Flush()),
        "Infinity-RoPE with the official code's key positions",
        f"{_INFINITY_ROPE}, code",
    ),
    "bounded_rope": Entry(
        Policy(positions=Bounded(range=21)),
        "bounded RoPE of the paper's table 6: sink directly before the local window",
        _ANCHOR_FORCING,
    ),
    "tri_region_no_junction": Entry(
        Policy(),
        "ablation: anchor_forcing without the junction",
        _ANCHOR_FORCING,
    ),
    "no_recache": Entry(
        Policy(junction=Junction(), on_switch=Keep()),
        "ablation: anchor_forcing without the re-cache",
        _ANCHOR_FORCING,
    ),
    "no_global_sink": Entry(
        Policy(junction=Junction(), on_switch=Recache(rewrite_sink=True)),
        "ablation: anchor_forcing whose re-cache replaces the sink",
        _ANCHOR_FORCING,
    ),
    TEACHER: Entry(
        None,
        "not streaming: the whole clip at once, bidirectional, one prompt",
        _WAN,
    ),
}
"""Every name of `--config.policy`."""

POLICIES = {
    name: entry.policy for name, entry in CATALOG.items() if entry.policy is not None
}
"""Streaming policies by name; `dataclasses.replace` composes others."""

ROPES = {
    "absolute": Rope(Absolute, "the frame's number, without bound"),
    "relative": Rope(Relative, "ends at the window's size, sink at 0"),
    "tri_region": Rope(Relative, "0-20: sink at 0, junction, local window at 20", 21),
    "bounded": Rope(Bounded, "0-20, sink directly before the local window", 21),
    "ranked": Rope(Ranked, "ends at the window's size, keys close up after a flush"),
}

SWITCHES = {
    "keep": SwitchEntry(Keep(), "only the prompt changes"),
    "flush": SwitchEntry(Flush(), "forgets all but the sink and the newest 2 frames"),
    "recache": SwitchEntry(
        Recache(), "runs the local window again under the new prompt; keeps the sink"
    ),
    "recache_sink": SwitchEntry(
        Recache(rewrite_sink=True), "as recache; the oldest frames become the sink"
    ),
}

_JUNCTIONS = (Junction, ReleaseJunction, PeriodicJunction, TrainedJunction)

PARTS = tuple(
    dict.fromkeys(
        (
            *(Policy, Restart, *_JUNCTIONS),
            *(type(switch.action) for switch in SWITCHES.values()),
            *(rope.rule for rope in ROPES.values()),
        )
    )
)
"""Classes of policies and their parts, which recipes and snapshots may name."""
