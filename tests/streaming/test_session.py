import contextlib
import dataclasses
import json
import re

import bundles
import jax
import numpy as np
import pytest
import tiny
from bundles import BLUE, GREEN, RED

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES, Restart
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling.resolve import make_policy
from anchor_jax.streaming import stream
from anchor_jax.streaming.clock import Clock, landings
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, UniPC
from anchor_jax.streaming.session import Session
from anchor_jax.wan.tokenizer import CutWarning

PROMPTS = (RED, BLUE, GREEN)
# Levels that no test before that of the warm-up compiles anything for.
ONE = flow.few_step_levels((900,), 5.0)


def make(policy="anchor_forcing", seed=0, prompt=RED, **changes):
    options = {k: changes.pop(k) for k in ("negative_prompt", "batch") if k in changes}
    setup = tiny.setup(policy, **changes)
    return Session(bundles.load(), setup, prompt, seed, **options)


def script(frames, *switches):
    starts = (0, *switches)
    return Script(tuple(map(Segment, PROMPTS, starts)), frames)


def play(session, plan):
    """Returns all frames of a script and the segment of each block."""
    frames, segments = zip(*session.play(plan), strict=True)
    return np.concatenate(frames), segments


@pytest.mark.slow
def test_a_script_makes_its_frames_and_names_its_segments():
    frames, segments = play(make(), script(18, 4, 12))

    assert frames.shape == (1 + 4 * 17, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 1
    assert segments == (0, 0, 1, 1, 2, 2)


@pytest.mark.slow
def test_the_seed_decides_the_frames():
    first, _ = play(make(), script(9, 4))
    again, _ = play(make(), script(9, 4))
    other, _ = play(make(seed=1), script(9, 4))

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_prompt_decides_the_frames_from_its_block_on():
    one, _ = play(make(), script(12))
    two, _ = play(make(), script(12, 6))

    np.testing.assert_array_equal(one[:21], two[:21])
    assert (one[21:] != two[21:]).any()


@pytest.mark.slow
def test_a_session_does_what_the_pure_functions_do():
    setup, loaded = tiny.setup(), bundles.load()
    contexts = [
        stream.project(loaded.variables, loaded.encode_prompts([text]), setup=setup)
        for text in (RED, BLUE)
    ]
    state = stream.start(contexts[0], setup=setup)
    latents = []
    for start in range(0, 15, 3):
        if start == 6:
            state, _ = stream.switch(
                loaded.variables,
                state,
                contexts[1],
                4,
                setup=setup,
                recache=setup.policy.recache(6),
            )
        noise = stream.draw_noise(jax.random.key(0), start, np.zeros(1), setup=setup)
        state, block = stream.step(loaded.variables, state, noise, setup=setup)
        latents.append(block.latents)
    pixels, _ = loaded.codec.decode(
        loaded.codec_params, None, np.concatenate(latents, axis=1)
    )
    expected = np.clip((np.asarray(pixels[0]) + 1) * 127.5, 0, 255)

    frames, _ = play(make(), script(15, 4))

    assert np.abs(frames - expected).max() < 0.6


@pytest.mark.parametrize(
    ("requested", "landed"),
    [
        ([3], [3]),
        ([4], [6]),
        ([4, 5], [6, 9]),
        ([4, 5, 6, 7], [6, 9, 12, 15]),
        ([1, 40, 41], [3, 42, 45]),
        ([40, 80, 120, 160, 200], [42, 81, 120, 162, 201]),
    ],
)
def test_switches_take_effect_at_the_next_free_block(requested, landed):
    assert landings(requested, 3) == tuple(landed)


@pytest.mark.slow
def test_a_session_lands_switches_where_they_are_predicted():
    session = make()
    session.step()
    session.switch(GREEN, requested=8)
    session.switch(BLUE)
    session.switch(RED)

    handles = [session.step() for _ in range(5)]

    assert [handle.start for handle in handles] == [3, 6, 9, 12, 15]
    assert [handle.segment for handle in handles] == [1, 2, 3, 3, 3]
    kept = [(one.prompt, one.requested, one.landed) for one in session.segments]
    assert kept == [(RED, 0, 0), (BLUE, 3, 3), (RED, 3, 6), (GREEN, 8, 9)]
    assert not session.pending


def test_before_the_first_block_a_switch_replaces_the_prompt():
    session = make(prompt=BLUE)
    session.switch(RED)
    frames = session.step().fetch()

    np.testing.assert_array_equal(frames, make().step().fetch())
    assert [one.prompt for one in session.segments] == [RED]


def test_a_recipe_can_be_stored_and_replayed():
    session = make(seed=3)
    frames, _ = play(session, script(12, 4, 8))

    recipe = json.loads(json.dumps(session.recipe()))

    noted = recipe["prompts"]
    assert [one["landed"] for one in noted] == [0, 6, 9]
    assert recipe["fingerprint"]["weights"] == bundles.load().digest
    segments = tuple(Segment(one["prompt"], one["requested"]) for one in noted)
    again, _ = play(make(seed=recipe["seed"]), Script(segments, recipe["frames"]))
    np.testing.assert_array_equal(frames, again)


@contextlib.contextmanager
def compilations():
    """Yields the list of compilations until the end of the context."""
    compiled = []

    def note(event, *_, **__):
        if event.startswith("/jax/core/compile"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
def test_playing_compiles_nothing_after_a_warm_up():
    for policy in ("anchor_forcing", "infinity_rope", "causvid"):
        session, plan = make(policy, levels=ONE), script(36, 4, 20)
        session.warm_up(plan)
        with compilations() as compiled:
            play(session, plan)

        assert not compiled, policy


@pytest.mark.slow
def test_a_prepared_session_compiles_nothing_and_says_what_it_does():
    session, lines = make(levels=ONE), []
    session.prepare(lines.append)

    assert lines[0] == "compiling (once)"
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[1]) and len(lines) == 2
    assert session.frame == 0
    with compilations() as compiled:
        for block in range(6):
            if block in (1, 4):
                session.switch(PROMPTS[block % 3])
            session.step().fetch()
    assert not compiled


@pytest.mark.slow
def test_any_switch_is_warm_after_a_warm_up_without_a_script(monkeypatch):
    session = make()
    session.warm_up()
    tiny.trace_at_most(monkeypatch, advance=0, _recache=0)
    sizes = stream.switch._cache_size()

    for _ in range(7):
        session.step()
        session.switch(BLUE)

    assert stream.switch._cache_size() == sizes


def test_chained_restarts_run_on_without_doubled_frames():
    plan = script(45, 22)

    frames, segments = play(make("causvid", levels=ONE), plan)

    assert len(frames) == 1 + 4 * 44
    assert segments == (0,) * 8 + (1,) * 7
    # Two stretches of the same noise differ, so noise goes by the video's frame.
    assert (frames[9:21] != frames[81:93]).any()


@pytest.mark.slow
def test_a_restart_forgets_frames_before_its_overlap():
    policy = dataclasses.replace(POLICIES["causvid"], restart=Restart(12, overlap=6))
    session = make(policy)

    handles = [session.step() for _ in range(7)]

    assert [handle.pixels.shape[1] for handle in handles] == [9, *[12] * 6]
    assert [int(one.plan.frames) for one in handles] == [3, 6, 9, 12, 9, 12, 9]


def test_an_overlap_that_is_not_a_block_is_refused():
    policy = dataclasses.replace(POLICIES["causvid"], restart=Restart(overlap=2))

    with pytest.raises(UserError, match="multiple of block=3"):
        make(policy)


def test_a_policy_with_an_end_is_refused_up_front():
    session = make("self_forcing")

    with pytest.raises(
        UserError, match="24 latent frames, but this policy is limited to"
    ):
        session.play(script(24))

    session.check(21)
    session._clock = Clock(frame=21)
    with pytest.raises(UserError, match="self_forcing_rolling"):
        session.step()


@pytest.mark.slow
def test_guidance_leads_each_video_away_from_the_negative_prompt():
    def frames(guidance, negative):
        session = make(guidance=guidance, negative_prompt=negative, batch=2)
        session.step()
        session.switch(BLUE)
        return session.step().fetch()

    guided, other = frames(2.0, GREEN), frames(2.0, BLUE)

    assert guided.shape == (2, 12, 32, 32, 3)
    assert (guided[0] != guided[1]).any(), "each video has noise of its own"
    assert (guided != other).any()
    plain, _ = play(make(), script(6, 1))
    assert (plain[9:] != guided[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Euler(), UniPC(), DpmPlusPlus()])
def test_the_whole_clip_at_once_is_a_policy_too(solver):
    config = load_config("tiny:wan_teacher")
    policy = make_policy(config, script(6))
    levels = flow.even_levels(4, 3.0)
    session = make(policy, solver=solver, levels=levels, guidance=2.0)
    session.warm_up(script(6))

    frames, segments = play(session, script(6))

    assert frames.shape[0] == 21
    assert segments == (0,)


def test_play_wants_a_fresh_session():
    session = make()
    session.step()

    with pytest.raises(ValueError, match="a new session"):
        session.play(script(6))


def test_a_prompt_of_another_type_is_refused():
    session = make()
    with pytest.raises(UserError, match="prompt is 3, expected text"):
        session.switch(3)
    with pytest.raises(UserError, match="expected text"):
        make(prompt=[RED])


def test_a_prompt_that_is_cut_gives_a_warning(monkeypatch):
    # Tests share a tokenizer, which warns of the first prompts only.
    monkeypatch.setattr(bundles.load().tokenizer, "_warned", 0)
    session = make(prompt=f"{BLUE} and {RED} and {GREEN}")

    with pytest.warns(CutWarning, match="a blue square.*6 of 16 tokens"):
        session.step()


@pytest.mark.parametrize("given", [{"prompt": "a\ud800"}, {"negative_prompt": "a\0"}])
def test_invalid_text_is_refused(given):
    with pytest.raises(UserError, match="so this is not text"):
        make(**given)
    with pytest.raises(UserError, match="so this is not text"):
        make().switch("a\udc80")
