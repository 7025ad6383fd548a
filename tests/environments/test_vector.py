"""Environments together: the same as alone; one that fails loses its own episode only, and is named."""

import numpy as np
import pytest
from small_environments import (
    CartPole,
    Faulty,
    Guess,
    Older,
    copies,
    make_exiting,
    make_hanging,
    make_printing,
    make_raising,
)  # fmt: skip

from jaxrlhf.environments.pool import MAX_FAILURES, Pool
from jaxrlhf.environments.statistics import Monitor
from jaxrlhf.environments.vector import VecEnv, make_vec_env
from jaxrlhf.environments.workers import Failed
from jaxrlhf.errors import Fault, UserError


def trace(envs, steps=60):
    envs.seed(5)
    seen, random = [envs.reset()], np.random.default_rng(0)
    for _ in range(steps):
        observations, rewards, dones, infos = envs.step(random.integers(2, size=envs.num_envs))
        seen += [observations, rewards, dones, [info.get("episode", {}).get("r") for info in infos]]
    envs.close()
    return seen


def equal(one, other):
    return all(np.array_equal(np.array(a, object), np.array(b, object)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_where_environments_run_changes_nothing(mode):
    assert equal(trace(make_vec_env(CartPole, 3, mode=mode, step_timeout=60.0)), trace(make_vec_env(CartPole, 3)))


def test_the_older_form_gives_the_same():
    assert equal(trace(VecEnv([Older, Older])), trace(VecEnv([CartPole, CartPole])))


def test_episodes_restart_and_have_statistics():
    envs = make_vec_env(CartPole, 2, seed=0)
    before, lengths = envs.reset(), []
    for _ in range(40):
        observations, rewards, dones, infos = envs.step([0, 1])
        for i in np.flatnonzero(dones):
            assert infos[i]["episode"]["l"] == infos[i]["episode"]["r"]
            assert abs(infos[i]["terminal_observation"][2]) > 0.2095 > abs(observations[i][2])
            assert infos[i]["TimeLimit.truncated"] is False and rewards[i] == 1
            lengths.append(infos[i]["episode"]["l"])
    assert len(lengths) >= 6 and 7 < np.mean(lengths) < 12 and before.dtype == np.float32
    assert len({tuple(row) for row in np.round(before, 6).tolist()}) == 2  # each has a seed of its own


def test_truncation_is_told_from_an_end():
    env = VecEnv(CartPole())
    env.reset()
    env.pool.env.env.steps, env.pool.env.env.state = 199, np.zeros(4)
    *_, dones, (info,) = env.step([1])
    assert dones[0] and info["TimeLimit.truncated"] and "terminal_observation" in info


@pytest.mark.parametrize(
    ("how", "line"),
    [("raises", "step raised RuntimeError: no more"), ("shape", "observation must have shape [4], not [2]"),
     ("nan", "observation has NaN"), ("reward", "could not convert string"), ("none", "step must return")],
)  # fmt: skip
def test_a_failure_costs_its_own_episode_only(how, line, capfd):
    envs = VecEnv([CartPole, lambda: Faulty(how), CartPole], seed=3, names=["a", "bad one", "c"])
    alone = VecEnv([CartPole, CartPole, CartPole], seed=3)
    envs.reset(), alone.reset()
    for _ in range(20):
        found, expected = envs.step([0, 1, 1]), alone.step([0, 1, 1])
        for a, b in zip(found[:3], expected[:3]):
            assert np.array_equal(a[[0, 2]], b[[0, 2]])
    assert "failed" in found[3][1] and found[2][1] and found[1][1] == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == MAX_FAILURES and all(text.startswith("bad one: ") and line in text for text in lines)
    assert "it is replaced" in lines[0] and "retired" in lines[-1]


@pytest.mark.parametrize("mode", ["sequential", "threads"])
def test_an_exception_without_a_text_costs_its_own_episode(mode, capfd):
    makers = [CartPole, lambda: Faulty("raises what cannot be printed")]
    envs = VecEnv(makers, mode, step_timeout=None if mode == "sequential" else 30.0, seed=0, names=["a", "b"])
    envs.reset()
    infos = [envs.step([0, 1])[3] for _ in range(3)][-1]
    envs.close()
    assert "failed" in infos[1] and "failed" not in infos[0]
    assert "b: step raised Unprintable" in capfd.readouterr().err


def test_a_ragged_observation_of_reset_costs_its_own_episode(capfd):
    envs = VecEnv([CartPole, lambda: Faulty("ragged reset")], seed=0, names=["a", "b"])
    envs.reset()
    assert "b: reset: the observation" in capfd.readouterr().err
    envs.step([0, 1])


def test_hanging_exiting_and_printing_in_processes(capfd):
    makers = [CartPole, make_hanging, make_exiting, make_printing, make_raising]
    envs = VecEnv(makers, "processes", step_timeout=3.0, seed=0, names=[f.__name__ for f in makers])
    envs.reset()
    for _ in range(5):
        *_, infos = envs.step([0] * 5)
    envs.close()
    captured = capfd.readouterr()
    assert "failed" not in infos[0]
    assert "make_hanging: step took more than 3 s; its episode is lost, it is replaced" in captured.err
    assert "make_exiting: step raised SystemExit: 3" in captured.err and "make_raising: step raised" in captured.err
    assert "CartPole" not in captured.err and "make_printing:" not in captured.err
    assert 60_000 < len(captured.out) < 80_000 and "[the environment printed more, which is dropped]" in captured.out


def test_a_hanging_thread_is_left_behind():
    envs = VecEnv([CartPole, make_hanging], "threads", step_timeout=1.0, seed=0)
    envs.reset()
    failed = [["failed" in info for info in envs.step([0, 0])[3]] for _ in range(4)]
    assert failed == [[False, False], [False, False], [False, True], [False, False]]
    envs.close()


def test_a_hundred_of_which_ten_fail():
    makers = [make_raising if i % 10 == 3 else CartPole for i in range(100)]
    envs = VecEnv(makers, "threads", step_timeout=30.0, seed=0)
    envs.reset()
    for _ in range(12):
        *_, infos = envs.step([1] * 100)
    assert [i for i, info in enumerate(infos) if "failed" in info] == list(range(3, 100, 10))
    envs.close()


def test_when_all_are_retired_the_run_ends():
    envs = VecEnv([make_raising, make_raising])
    envs.reset()
    with pytest.raises(Fault, match="all environments have failed, the last with: step raised RuntimeError: no more"):
        for _ in range(20):
            envs.step([0, 0])


def test_what_one_environment_raises_goes_through():
    env = VecEnv(Faulty("raises"))
    env.reset()
    with pytest.raises(RuntimeError, match="no more"):
        for _ in range(3):
            env.step([0])


def test_text_environments_step_together():
    pool = Pool([Guess] * 3, "threads")
    started = pool.reset({0: 1, 2: 2}, {2: {"row": 1}})
    assert started == {0: ("guess a digit", {}), 2: ("guess a digit", {})}
    number = np.random.default_rng(2).integers(10)
    results = pool.step({2: f"perhaps {number}"})
    assert results == {2: ("right", 1.0, True, False, {})}
    assert not isinstance(pool.step({0: "x"})[0], Failed)
    pool.close()


def test_input_errors():
    for call, message in [
        (lambda: make_vec_env(CartPole, 0), "n_envs: must be at least 1"),
        (lambda: make_vec_env(CartPole, mode="fast"), "mode: must be one of sequential, threads, processes"),
        (lambda: make_vec_env(CartPole, step_timeout=1.0), "step_timeout: needs mode="),
        (lambda: make_vec_env(lambda: CartPole(), mode="processes"), "cannot be sent to a process"),
        (lambda: make_vec_env(CartPole()), "env_id: must be an id or a function"),
        (lambda: VecEnv(object()), "reset is missing"),
        (lambda: VecEnv(Guess()), "observation_space is NoneType, which is not supported"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_a_monitor_writes_what_stable_baselines3_reads(tmp_path):
    env = Monitor(Older(), tmp_path / "run")
    for seed in (0, 1):
        env.reset(seed=seed)
        while True:
            *_, terminated, truncated, info = env.step(0)
            if terminated or truncated:
                break
    env.close()
    head, names, *rows = (tmp_path / "run.monitor.csv").read_text().splitlines()
    assert head.startswith('#{"t_start": ') and '"env_id": "Older"' in head and names == "r,l,t" and len(rows) == 2
    assert rows[1].split(",")[:2] == [str(info["episode"]["r"]), str(info["episode"]["l"])]
    assert env.returns == [float(n) for n in env.lengths]


def test_spaces_describe_themselves_and_know_their_elements():
    from jaxrlhf.environments import spaces

    for env in copies().values():
        for space in (env.observation_space, env.action_space):
            assert space.contains(space.sample()) and spaces.from_json(spaces.to_json(space)) == space
    unbounded = spaces.Box(-np.inf, [1.0, np.inf])
    assert spaces.from_json(spaces.to_json(unbounded)) == unbounded and unbounded.sample()[0] <= 1
    assert not spaces.Box(0, 1, (2,)).contains([0.5]) and "out of bounds" in spaces.misfit(spaces.Discrete(2), 2)
