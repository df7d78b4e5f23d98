import dataclasses
import json

import bundles
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
from bundles import BLUE, GREEN, RED

from anchor_jax import flow
from anchor_jax.cache import policies, positions
from anchor_jax.cache.policies import POLICIES, single_prompt
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling.resolve import SOLVERS, make_policy
from anchor_jax.streaming import stream
from anchor_jax.streaming.recipe import (
    Switch,
    describe,
    differences,
    digest,
    fingerprint,
    load_recipe,
    parse_recipe,
    rebuild,
)
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.snapshot import Moments
from anchor_jax.weights.load import load_bundle

ONE = flow.few_step_levels((900,), 5.0)
LARGE = 10**9
_CONFIG = load_config("tiny")
_CONFIG.rules = "release"
_TWO = Script((Segment(RED, 0), Segment(BLUE, 3)), 6)
POLICIES_HERE = {
    "anchor_forcing": POLICIES["anchor_forcing"],
    "anchor_forcing_release": make_policy(_CONFIG, _TWO),
    "single_prompt_release": single_prompt(make_policy(_CONFIG, _TWO)),
    "infinity_rope": POLICIES["infinity_rope"],
    "causvid": POLICIES["causvid"],
}


@pytest.fixture
def kept(monkeypatch):
    """Latents of each block that any session makes, (frame, latents), in order."""
    made, make_block = [], stream.make_block

    def recording(variables, state, rng, frame, *, setup):
        state, latents, plan = make_block(variables, state, rng, frame, setup=setup)
        made.append((int(frame), np.array(latents)))
        return state, latents, plan

    monkeypatch.setattr(stream, "make_block", recording)
    return made


def make(policy="anchor_forcing", **options):
    setup = tiny.setup(POLICIES_HERE.get(policy, policy), levels=ONE)
    return Session(bundles.load(), setup, RED, seed=1, **options)


def ask(session):
    """Three switches, two of them closer than a block, so that one waits."""
    session.switch(BLUE, 4)
    session.switch(GREEN, 14)
    session.switch(RED, 15)
    return session


def blocks(session, until):
    """Returns the pixels of each block up to a latent frame."""
    return [frames for frames, _ in session.blocks(until)]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def by_frame(made):
    return {frame: latents for frame, latents in made}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES_HERE)
def test_a_recipe_makes_the_same_latents_again(kept, name):
    session = ask(make(name))
    pixels = blocks(session, 30)
    first = list(kept)
    kept.clear()

    recipe = parse_recipe(json.loads(json.dumps(session.recipe())), "recipe")
    again = Session.from_recipe(bundles.load(), recipe)

    assert same(blocks(again, recipe.frames), pixels)
    assert [frame for frame, _ in kept] == list(range(0, 30, 3))
    assert same([x for _, x in kept], [x for _, x in first])
    assert again.segments == session.segments
    assert [one.landed for one in again.segments] == [0, 6, 15, 18]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES_HERE)
@pytest.mark.parametrize("frame", [6, 15, 24])
def test_a_rewound_session_makes_the_same_again(kept, name, frame):
    session = ask(make(name, moments=Moments(LARGE, every=4)))
    pixels = blocks(session, 30)
    first = by_frame(kept)
    kept.clear()

    session.rewind(frame)

    assert session.frame == frame
    assert len(kept) == frame // 3 % 4, "only what follows the last moment is remade"
    assert same(blocks(session, 30), pixels[frame // 3 :])
    assert all(np.array_equal(latents, first[at]) for at, latents in kept)
    assert [one.landed for one in session.segments] == [0, 6, 15, 18]


@pytest.mark.slow
def test_a_rewind_without_moments_starts_over(kept):
    session = ask(make())
    pixels = blocks(session, 21)
    kept.clear()

    session.rewind(9)

    assert [frame for frame, _ in kept] == [0, 3, 6]
    assert same(blocks(session, 21), pixels[3:])


@pytest.mark.slow
def test_late_switches_land_where_they_landed(kept):
    session = make()
    blocks(session, 9)
    session.switch(BLUE, requested=2)
    session.switch(GREEN, requested=2)
    session.switch(RED, requested=3)
    pixels = blocks(session, 12)

    session.rewind(3)
    replayed = blocks(session, 18)

    assert same(replayed[2:3], pixels)
    assert [one.landed for one in session.segments] == [0, 9, 12, 15]
    assert [one.requested for one in session.segments] == [0, 2, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES_HERE)
@pytest.mark.parametrize("moments", [None, LARGE])
def test_a_fork_is_a_stream_that_was_switched_there(kept, name, moments):
    store = Moments(moments, every=3) if moments else None
    session = ask(make(name, moments=store))
    first = blocks(session, 21)
    other = session.fork(12, GREEN)
    ahead = blocks(other, 27)
    rest = blocks(session, 27)

    straight = make(name)
    straight.switch(BLUE, 4)
    straight.switch(GREEN, 12)
    whole = blocks(straight, 27)
    unforked = blocks(ask(make(name)), 27)

    assert same(ahead, whole[4:])
    assert same(first[:4], whole[:4])
    assert not np.array_equal(ahead[0], first[4])
    assert same(first + rest, unforked), "the fork leaves its origin as it was"


def test_a_fork_of_the_next_block_makes_nothing_again(kept):
    session = make()
    blocks(session, 9)
    kept.clear()

    other = session.fork(9, BLUE)

    assert not kept
    session.switch(BLUE)
    assert same(blocks(other, 12), blocks(session, 12))


def test_a_store_keeps_to_its_past_after_a_rewind():
    session = make(moments=Moments(LARGE, every=1))
    blocks(session, 15)
    session.rewind(6)
    session.pending.clear()
    session.switch(BLUE)
    blocks(session, 15)

    session.rewind(12)
    after = blocks(session, 15)

    straight = make()
    straight.switch(BLUE, 6)
    assert same(after, blocks(straight, 15)[4:])


@pytest.mark.parametrize("frame", [-3, 4, 12])
def test_only_block_starts_of_the_past_can_be_gone_to(frame):
    session = make()
    blocks(session, 9)

    with pytest.raises(UserError, match=f"frame={frame}: must be"):
        session.rewind(frame)
    with pytest.raises(UserError, match="multiple of 3 from 0 to 9"):
        session.fork(frame, BLUE)


def one_moment():
    """Returns the bytes of a moment of the stream."""
    store = Moments(LARGE)
    session = make(moments=store)
    blocks(session, 3)
    session.pin()
    return store.nbytes


def test_automatic_moments_stay_within_the_budget_and_apart():
    size = one_moment()
    store = Moments(4 * size + size // 2, every=1)
    session = make(moments=store)

    for until in range(3, 61, 3):
        blocks(session, until)
        assert store.nbytes <= store.budget

    assert len(store.frames) == 4
    gaps = np.diff([0, *store.frames, 60])
    assert gaps.max() <= 24
    assert store.frames[0] < 24 < store.frames[-1]


def test_pins_stay_and_one_too_many_is_refused():
    size = one_moment()
    store = Moments(2 * size, every=1)
    session = make(moments=store)
    blocks(session, 6)
    assert session.pin() == 6
    blocks(session, 15)
    assert 6 in store.frames and len(store.frames) == 2
    session.pin()
    blocks(session, 24)
    assert store.frames == (6, 15)

    needed = (
        rf"needs {size} bytes, but pins hold {2 * size} of the budget of {2 * size}"
    )
    with pytest.raises(UserError, match=f"{needed}; unpin .* {3 * size} or more"):
        session.pin()

    assert store.frames == (6, 15)
    store.unpin(6)
    session.pin()
    assert store.frames == (15, 24)


def test_a_pin_needs_a_store_and_a_store_one_video():
    with pytest.raises(UserError, match="moments=Moments"):
        make().pin()
    with pytest.raises(UserError, match="budget=-1"):
        Moments(-1)
    store = Moments(LARGE)
    make(moments=store)
    with pytest.raises(ValueError, match="another video"):
        make("causvid", moments=store)


@pytest.mark.parametrize("name", POLICIES_HERE)
@pytest.mark.parametrize("frame", [3, 15, 24])
def test_a_saved_session_continues_bit_for_bit(tmp_path, name, frame):
    session = ask(make(name))
    blocks(session, frame)
    session.save(tmp_path / "moment.safetensors")
    rest = blocks(session, 30)

    other = Session.restore(tmp_path / "moment.safetensors", bundles.load())

    assert other.frame == frame
    assert same(blocks(other, 30), rest)
    assert other.recipe() == session.recipe()
    assert [file.name for file in tmp_path.iterdir()] == ["moment.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "free", "sharded"])
def test_weights_that_nobody_has_used_yet_restore_a_session(tmp_path, where):
    session = ask(make("anchor_forcing"))
    blocks(session, 6)
    session.save(tmp_path / "moment.safetensors")
    rest = blocks(session, 12)
    bundles.save(tmp_path / "weights")

    fresh = load_bundle(str(tmp_path / "weights"), text_encoder=where)
    other = Session.restore(tmp_path / "moment.safetensors", fresh)

    assert same(blocks(other, 12), rest)


def test_a_moment_is_of_no_kernel(tmp_path):
    session = make("anchor_forcing")
    session.step()
    session.save(tmp_path / "m")

    names = safetensors.safe_open(tmp_path / "m", "np").keys()

    assert not [name for name in names if "context" in name]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"prompt": ""}, "prompt"), ({"requested": -3}, "requested=-3")],
)
def test_what_could_not_be_read_again_is_not_taken(wrong, named):
    with pytest.raises(UserError, match=named):
        make("anchor_forcing").switch(**{"prompt": BLUE, "requested": 3, **wrong})


def test_every_part_of_a_policy_can_be_written_and_read():
    kinds = {
        kind
        for module in (policies, positions)
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        # Arrays are data, not parts.
        if kind.__module__ != "anchor_jax.cache.types"
    }

    assert len(kinds) >= 14
    for kind in kinds - {policies.RecachePass}:
        assert rebuild(describe(kind()), "here") == kind()


@pytest.mark.parametrize("depth", [20, 900])
def test_parts_that_are_nested_without_end_are_refused(depth):
    nested = []
    for _ in range(depth):
        nested = [nested]

    with pytest.raises(UserError, match="deep"):
        rebuild(nested, "setup")


def test_the_fingerprint_tells_how_noise_is_drawn():
    before = fingerprint(bundles.load())
    with jax.default_prng_impl("rbg"):
        after = fingerprint(bundles.load())

    (line,) = differences(before, after)
    assert "prng" in line


@pytest.mark.slow
def test_guided_videos_in_half_precision_are_saved_too(tmp_path):
    loaded = bundles.load()
    model = dataclasses.replace(loaded.model, dtype="bfloat16")
    half = dataclasses.replace(loaded, model=model)
    setup = tiny.setup(levels=ONE, model=model, guidance=2.0)
    session = Session(half, setup, RED, 0, GREEN, batch=2)
    session.step()
    session.save(tmp_path / "m")
    expected = session.step().fetch()
    jax.clear_caches()

    other = Session.restore(tmp_path / "m", half)

    np.testing.assert_array_equal(other.step().fetch(), expected)


def test_nothing_can_be_saved_before_the_first_block(tmp_path):
    with pytest.raises(UserError, match="made no block yet"):
        make().save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "m"
    session = make()
    blocks(session, 6)
    session.save(path)
    with safetensors.safe_open(path, "np") as opened:
        header = json.loads(opened.metadata()["anchor_jax_moment"])
    return path.read_bytes(), safetensors.numpy.load(path.read_bytes()), header


def restore(path, content):
    path.write_bytes(content)
    return Session.restore(path, bundles.load())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anchor_forcing", "anchor_forcing_release"])
def test_a_file_of_the_first_cache_layout_continues(tmp_path, name):
    session = make(name)
    blocks(session, 6)
    session.save(tmp_path / "new")
    tensors = safetensors.numpy.load((tmp_path / "new").read_bytes())
    with safetensors.safe_open(tmp_path / "new", "np") as opened:
        header = json.loads(opened.metadata()["anchor_jax_moment"])
    assert header.pop("cache_layout") == 2
    apart = [
        key
        for key in tensors
        if ".cache.slots." in key or (".cache.prior." in key and tensors[key].ndim == 5)
    ]
    for key in apart:
        x = tensors[key]
        heads = tiny.MODEL.num_heads
        tensors[key] = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    old = safetensors.numpy.save(tensors, {"anchor_jax_moment": json.dumps(header)})

    assert len(apart) == (4 if name.endswith("release") else 2)
    again = restore(tmp_path / "old", old)

    assert same(blocks(again, 12), blocks(session, 12))


def test_a_later_cache_layout_is_refused(saved, tmp_path):
    header = saved[2] | {"cache_layout": 3}
    content = safetensors.numpy.save(
        saved[1], {"anchor_jax_moment": json.dumps(header)}
    )
    with pytest.raises(UserError, match="cache_layout=3: must be 1 to 2"):
        restore(tmp_path / "m", content)


@pytest.mark.parametrize("part", [0, 4, 100, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(saved, tmp_path, part):
    size = int(part * len(saved[0])) if part < 1 else part

    with pytest.raises(UserError, match="not a whole safetensors file|cannot be read"):
        restore(tmp_path / "m", saved[0][:size])


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be read"):
        Session.restore(tmp_path / "nowhere", bundles.load())
    with pytest.raises(UserError, match="holds no moment"):
        restore(tmp_path / "m", safetensors.numpy.save({"x": np.zeros(1)}))


KEYS = "[0].cache.slots.k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEYS), "missing"),
        (lambda t: t.update(more=np.zeros(2)), "unexpected more"),
        (lambda t: t.update({KEYS: t[KEYS][:1]}), "expected"),
        (lambda t: t.update({KEYS: t[KEYS].astype(np.float16)}), "F16"),
        (
            lambda t: t.update({"[0].cache.index.start": np.array(9, "i4")}),
            "is at frame 9, expected 6",
        ),
    ],
)
def test_tensors_of_another_setup_are_refused(saved, tmp_path, change, message):
    _, tensors, header = saved
    tensors = dict(tensors)
    change(tensors)
    content = safetensors.numpy.save(tensors, {"anchor_jax_moment": json.dumps(header)})

    with pytest.raises(UserError, match=message):
        restore(tmp_path / "m", content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": -3}, "origin=-3"),
        ({"origin": 6}, "origin=6"),
        ({"origin": "0"}, "origin='0'"),
        ({"pending": [{"prompt": 3}]}, r"pending\[0\]"),
        ({"pending": {"prompt": RED}}, "pending: got"),
        ({"frames": 3_000_000}, "is at frame 6"),
        ({"batch": 1000}, "tensors are not those"),
        ({"fingerprint": {"weights": "0" * 64}}, "weights of SHA-256 0000"),
        ({"format_version": 2}, "format_version=2, expected 1"),
    ],
)
def test_a_header_that_lies_is_refused(saved, tmp_path, change, message):
    _, tensors, header = saved
    lie = {"anchor_jax_moment": json.dumps(header | change)}

    with pytest.raises(UserError, match=message):
        restore(tmp_path / "m", safetensors.numpy.save(tensors, lie))


@pytest.mark.parametrize("name", [*POLICIES, *POLICIES_HERE])
def test_a_setup_is_rebuilt_from_plain_values(name):
    policy = POLICIES_HERE.get(name) or POLICIES[name]
    setup = tiny.setup(policy, levels=flow.even_levels(4, 3.0), guidance=2.5)

    plain = json.loads(json.dumps(describe(setup)))

    assert rebuild(plain, "setup") == setup


@pytest.mark.parametrize("grid", flow.GRIDS)
@pytest.mark.parametrize("solver", SOLVERS.values())
def test_any_solver_and_noise_levels_are_rebuilt(grid, solver):
    levels = flow.GRIDS[grid](1000, 1.0)
    setup = tiny.setup(POLICIES["longlive"], levels=levels, solver=solver)

    plain = json.loads(json.dumps(describe(setup)))

    assert rebuild(plain, "setup") == setup


def test_recipes_from_before_noise_levels_had_names_stay_as_they_were():
    """Finished videos are known by these values, and replayed from them."""
    levels = {
        "kind": "Levels",
        "timestep": [1000.0, 961.5384521484375, 909.0909423828125],
        "sigma": [1.0, 0.9615384340286255, 0.9090909361839294],
    }
    first = flow.even_levels(6, 5.0)
    first = flow.Levels(first.timestep[:3], first.sigma[:3])

    assert rebuild(levels, "levels") == first
    assert describe(first) == levels
    assert describe(SOLVERS["unipc"]) == {"kind": "UniPC", "floor": 0.001}
    assert describe(SOLVERS["euler"]) == {"kind": "Euler"}


@pytest.fixture(scope="module")
def recipe():
    session = ask(make())
    made = [digest(frames) for frames in blocks(session, 21)]
    return json.loads(json.dumps(session.recipe() | {"blocks": made}))


def changed(recipe, path, value):
    """Returns the recipe with the field at a dotted path replaced."""
    copy = json.loads(json.dumps(recipe))
    *above, last = (int(x) if x.isdigit() else x for x in path.split("."))
    place = copy
    for name in above:
        place = place[name]
    place[last] = value
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", None, "format_version=None"),
        ("seed", -1, "seed=-1"),
        ("seed", 2**63, "seed="),
        ("seed", True, "seed"),
        ("seed", "1", "seed: got '1'"),
        ("frames", 10**12, "frames=1000000000000"),
        ("frames", 20, "frames=20: must be a multiple"),
        ("frames", 0, "frames=0"),
        ("batch", 10**6, "batch=1000000"),
        ("prompts", [], "prompts landed at"),
        ("prompts", "a red ring", "prompts: got"),
        ("prompts.1", RED, r"prompts\[1\]: got"),
        ("prompts.1.prompt", 3, r"prompts\[1\].prompt: got 3"),
        ("prompts.1.prompt", " ", r"prompts\[1\].prompt"),
        ("prompts.1.prompt", "x" * 10_001, "10001 characters"),
        ("prompts.1.requested", -4, r"prompts\[1\].requested=-4"),
        ("prompts.1.requested", 9, r"prompts\[1\].landed=6"),
        ("prompts.1.landed", 7, r"prompts\[1\].landed=7"),
        ("prompts.1.landed", None, r"prompts\[1\].landed=None"),
        ("prompts.1.landed", 15, "prompts landed at"),
        ("prompts.1.extra", 1, "unknown field 'extra'"),
        ("negative_prompt", None, "negative_prompt: got None"),
        ("fingerprint", [], "fingerprint: got"),
        ("fingerprint", {}, "fingerprint.weights is missing"),
        ("fingerprint.jax", ["0.10"], "fingerprint.jax: got"),
        ("blocks", ["0" * 64], "blocks: got 1 entries"),
        ("blocks.0", "no", "blocks: got"),
        ("blocks.0", 7, "blocks: got"),
        ("setup", None, "setup: got None"),
        ("setup.kind", "os.system", "setup.kind='os.system' is unknown"),
        ("setup.policy.kind", "Polciy", "did you mean 'Policy'"),
        ("setup.policy.positions.kind", "Recache", "positions"),
        ("setup.policy.positions", None, "positions: got None of type NoneType"),
        ("setup.policy.window", 10**9, "window=1000000000"),
        ("setup.policy.window", -12, "window"),
        ("setup.policy.block", 0, "block"),
        ("setup.policy.sink", -3, "sink"),
        ("setup.levels.sigma", [], "timestep and sigma must be"),
        ("setup.levels.sigma", ["a"], "timestep and sigma must be"),
        ("setup.levels.sigma", [0.0], "timestep and sigma must be"),
        ("setup.levels.timestep", [-1.0], "timestep and sigma must be"),
        ("setup.solver", "renoise", "solver: got str"),
        ("setup.guidance", -1.0, "guidance=-1.0"),
        ("setup.kernel", "plain", "kernel: got str"),
        ("setup.model.num_heads", 0, "model"),
        ("config", {"weights": 3}, "weights: got 3"),
    ],
)
def test_a_hostile_recipe_is_refused_by_name(recipe, path, value, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(changed(recipe | {"config": {}}, path, value), "r.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "got list, expected a JSON object"),
        (b'{"seed": NaN}', "NaN"),
        (b'{"format_version": 1}', "prompts|setup"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_bytes(content)

    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.json")


def test_a_recipe_is_shortened_and_forked(recipe):
    whole = parse_recipe(recipe, "r.json")

    short, other = whole.shortened(15), whole.forked(13, GREEN, 30)

    assert [one.landed for one in short.prompts] == [0, 6]
    assert len(short.blocks) == 5
    assert other.prompts[-1] == Switch(GREEN, 13, landed=15)
    assert [one.landed for one in other.prompts] == [0, 6, 15]
    assert (other.frames, len(other.blocks)) == (30, 5)
    assert whole.forked(0, GREEN, 3).prompts == (Switch(GREEN, 0, landed=0),)
