"""PPO on control tasks: the update against a plain loop, learning, reproducing, files, and the form of its methods."""

import json
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_environments import CartPole, Faulty, Older, copies

import jaxrlhf
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.stages.control.mlp_policy import actions_of, minibatches
from jaxrlhf.stages.control.rollouts import collect

SMALL = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "policy_kwargs": {"net_arch": [16]}, "seed": 7}


def weights(model):
    return jax.tree.leaves(jax.tree.map(np.asarray, model.policy.state))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt CartPole, from eight environments."""
    model = jaxrlhf.PPO(
        "MlpPolicy", jaxrlhf.make_vec_env(CartPole, 8), n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
        n_epochs=20, learning_rate="lin_0.001", clip_range="lin_0.2", seed=0,
    )  # fmt: skip
    return model.learn(25_000)


def test_cartpole_is_learnt(trained):
    untrained = jaxrlhf.PPO("MlpPolicy", CartPole(), seed=0)
    before, _ = jaxrlhf.evaluate_policy(untrained, CartPole(), 10)
    after, deviation = jaxrlhf.evaluate_policy(trained, jaxrlhf.make_vec_env(CartPole, 5, seed=1), 20)
    assert before < 60 and after > 180 and deviation < 40
    metrics = trained.metrics
    assert trained.num_timesteps == metrics["time/total_timesteps"] == 98 * 256
    assert metrics["rollout/ep_rew_mean"] == metrics["rollout/ep_len_mean"] > 100
    assert metrics["train/n_updates"] == 98 * 20 and abs(metrics["train/approx_kl"]) < 0.05


def reference_update(params, samples, order, config):
    """The losses of Stable-Baselines3's PPO and its GAE, written as loops; Adam as in PyTorch."""
    steps, count = samples.rewards.shape

    def network(layers, x):
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ layers[-1]["kernel"] + layers[-1]["bias"]

    value = lambda params, x: network(params["value"], x)[..., 0]  # noqa: E731
    values, following = value(params, samples.observations), value(params, samples.next_observations)
    advantages = np.zeros((steps, count))
    for n in range(count):
        last = 0.0
        for t in reversed(range(steps)):
            ended = samples.terminated[t, n] or samples.truncated[t, n]
            reward = samples.rewards[t, n] + (config.gamma * following[t, n] if samples.truncated[t, n] else 0.0)
            coming = 0.0 if ended else (values[t + 1, n] if t + 1 < steps else following[t, n])
            delta = reward + config.gamma * coming - values[t, n]
            last = delta + config.gamma * config.gae_lambda * (0.0 if ended else last)
            advantages[t, n] = last
    flat = {"x": samples.observations, "a": samples.actions, "adv": advantages, "ret": advantages + values}
    flat = {name: jnp.asarray(v).reshape(-1, *v.shape[2:]) for name, v in flat.items()}

    def logprobs(params, x, a):
        z = (a - network(params["policy"], x)) / jnp.exp(params["log_std"])
        return jnp.sum(-0.5 * z**2 - params["log_std"] - 0.5 * jnp.log(2 * jnp.pi), -1)

    old = logprobs(params, flat["x"], flat["a"])

    def loss(params, rows):
        x, a, advantage, target = (flat[name][rows] for name in ("x", "a", "adv", "ret"))
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
        ratio = jnp.exp(logprobs(params, x, a) - old[rows])
        clipped = jnp.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
        policy = -jnp.mean(jnp.minimum(advantage * ratio, advantage * clipped))
        entropy = jnp.sum(params["log_std"] + 0.5 + 0.5 * jnp.log(2 * jnp.pi))
        return policy + config.vf_coef * jnp.mean((target - value(params, x)) ** 2) - config.ent_coef * entropy

    first = second = jax.tree.map(jnp.zeros_like, params)
    gradient = jax.jit(jax.grad(loss))
    for step, rows in enumerate(order, 1):
        grads = gradient(params, rows[rows >= 0])
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, config.max_grad_norm / norm)
        grads = jax.tree.map(partial(jnp.multiply, scale), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        both = ((0.9, first), (0.999, second))
        mean, square = (jax.tree.map(partial(jnp.multiply, 1 / (1 - decay**step)), m) for decay, m in both)
        changes = jax.tree.map(lambda m, v: -config.learning_rate * m / (jnp.sqrt(v) + 1e-5), mean, square)
        params = jax.tree.map(jnp.add, params, changes)
    return params


class Short(type(copies()["Box"])):
    """Episodes end at 5 steps, half of them by truncation."""

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        odd = bool(self.shown.sum() % 2)
        return observation, reward, self.steps == 5 and odd, self.steps >= 5 and not odd, info


def test_an_update_equals_a_plain_loop():
    box = copies()["Box"]
    make = lambda: Short(box.observation_space, box.action_space)  # noqa: E731
    envs = jaxrlhf.VecEnv([make] * 3, seed=1)
    model = jaxrlhf.PPO("MlpPolicy", envs, **SMALL | {"batch_size": 20, "ent_coef": 0.01, "learning_rate": 0.01})
    policy, random = model.policy, np.random.default_rng(0)
    samples, _, whole = collect(policy, envs, policy.read(envs.reset()), 32, random, lambda values: True)
    assert whole and samples.truncated.any() and samples.terminated.any() and not samples.failed.any()
    order = minibatches(96, 20, 2, np.random.default_rng(5))
    assert order.shape == (10, 20) and sorted(order[:5].ravel()) == [*[-1] * 4, *range(96)]
    before = jax.tree.map(jnp.asarray, policy.state.params)
    expected = reference_update(before, samples, order, model.config)
    metrics = policy.update(samples, 1.0, np.random.default_rng(5))
    for a, b, start in zip(*map(jax.tree.leaves, (policy.state.params, expected, before))):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.abs(a - start).max() > 1e-3
    assert metrics["n_updates"] == 10 and metrics["std"] != 1


def test_a_failed_transition_is_not_learnt_from():
    """Whatever stands in its place changes nothing, and the transition before it is bootstrapped."""
    envs = jaxrlhf.make_vec_env(CartPole, 2, seed=1)
    results = []
    for action in (0, 1):
        model = jaxrlhf.PPO("MlpPolicy", envs, **SMALL)
        envs.seed(3)
        policy = model.policy
        samples, *_ = collect(policy, envs, policy.read(envs.reset()), 32, np.random.default_rng(0), lambda v: True)
        samples.failed[4, 0], samples.actions[4, 0], samples.rewards[4, 0] = True, action, 100.0 * action
        policy.update(samples, 1.0, np.random.default_rng(5))
        results.append(model)
    assert same(*results)


@pytest.mark.parametrize("kind", ["Discrete", "MultiDiscrete", "MultiBinary", "Box"])
def test_every_kind_of_space_learns(kind):
    env = copies()[kind]
    model = jaxrlhf.PPO(
        "MlpPolicy", env, n_steps=128, batch_size=64, learning_rate=0.01, seed=1, gamma=0.0,
        policy_kwargs={"net_arch": {"pi": [16], "vf": [8]}, "log_std_init": -1.0},
    )  # fmt: skip
    before, _ = jaxrlhf.evaluate_policy(model, env, 20)
    after, _ = jaxrlhf.evaluate_policy(model.learn(2500), env, 20)
    assert after > -0.6 and after > before + 1
    action, state = model.predict(env.reset()[0])
    assert env.action_space.contains(action) and state is None
    several, _ = model.predict(np.stack([env.reset()[0]] * 5))
    assert len(several) == 5 and all(env.action_space.contains(a) for a in several)


def test_logprobs_are_those_of_the_sampler():
    """Frequencies of sampled actions are the probabilities by which the update weighs them."""
    from jaxrlhf.models.mlp import choose, logprobs_and_entropies, noise

    for kind in ("Discrete", "MultiDiscrete", "MultiBinary"):
        actions = actions_of(copies()[kind].action_space)
        outputs = np.linspace(-1, 1, actions.outputs, dtype=np.float32)[None].repeat(40_000, 0)
        chosen = choose(actions, outputs, None, noise(actions, np.random.default_rng(0), (40_000,)))
        logprobs, entropies = jax.jit(partial(logprobs_and_entropies, actions, log_std=None))(outputs, chosen=chosen)
        found, counts = np.unique(chosen, axis=0, return_counts=True)
        first = [int(np.argmax((chosen == row).all(-1))) for row in found]
        np.testing.assert_allclose(counts / 40_000, np.exp(np.asarray(logprobs)[first]), atol=0.01)
        np.testing.assert_allclose(entropies[0], -np.mean(logprobs), atol=0.02)


def test_one_seed_gives_one_training():
    def train(**changes):
        return jaxrlhf.PPO("MlpPolicy", jaxrlhf.make_vec_env(CartPole, 2), **SMALL | changes).learn(130)

    assert same(train(), train()) and not same(train(), train(seed=8))


@pytest.mark.parametrize("extra", [{}, {"normalize_observations": True, "normalize_rewards": True}])
def test_a_loaded_model_goes_on_bit_for_bit(tmp_path, extra):
    model = jaxrlhf.PPO("MlpPolicy", jaxrlhf.make_vec_env(CartPole, 2), **SMALL | extra).learn(130)
    model.save(tmp_path / "model")
    model.save(tmp_path / "again")
    assert (tmp_path / "model.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    loaded = jaxrlhf.PPO.load(tmp_path / "model", env=jaxrlhf.make_vec_env(CartPole, 2))
    observations = np.random.default_rng(0).normal(size=(20, 4))
    for deterministic in (True, False):
        one, other = (m.predict(observations, deterministic=deterministic)[0] for m in (model, loaded))
        assert np.array_equal(one, other)
    for each in (model, loaded):
        each.learn(130, reset_num_timesteps=False)
    assert same(model, loaded) and loaded.num_timesteps == 384 and model.metrics["time/total_timesteps"] == 384
    for name, array in model.policy.normalization.arrays().items():
        assert np.array_equal(array, loaded.policy.normalization.arrays()[name])
    assert list(model.ep_info_buffer)[-1]["r"] == list(loaded.ep_info_buffer)[-1]["r"]


def test_normalised_observations_are_the_running_statistics():
    random = np.random.default_rng(0)
    model = jaxrlhf.PPO("MlpPolicy", jaxrlhf.make_vec_env(CartPole, 2), **SMALL, normalize_observations=True)
    rows = random.normal(3.0, 2.0, (500, 4))
    for part in np.split(rows, 10):
        model.policy.normalization.see(part)
    np.testing.assert_allclose(model.policy.read(rows).mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(model.policy.read(rows).std(0), 1, atol=1e-3)
    assert model.policy.read(rows * 1e6).max() == 10


def test_target_kl_ends_an_iteration():
    def updates(**changes):
        return jaxrlhf.PPO("MlpPolicy", CartPole(), **SMALL | {"learning_rate": 0.05} | changes).learn(32).metrics

    assert updates()["train/n_updates"] == 2
    assert updates(target_kl=1e-4)["train/n_updates"] == 1


def test_the_older_form_as_its_users_write_it(trained, tmp_path, monkeypatch):
    """Both forms of step, from a class that no library knows."""
    monkeypatch.chdir(tmp_path)
    env = Older()
    trained.save("ppo_cartpole")
    model = jaxrlhf.PPO.load("ppo_cartpole")
    obs, total = env.reset(), 0.0
    for _ in range(200):
        action, _states = model.predict(obs, deterministic=True)
        obs, reward, done, _info = env.step(action)
        total += reward
        if done:
            break
    assert total > 150
    env = CartPole()
    obs, _info = env.reset(seed=0)
    for _ in range(50):
        action, _states = model.predict(obs)
        obs, _reward, terminated, truncated, _info = env.step(action)
    assert not (terminated or truncated)
    assert model.predict(env.reset())[0] in (0, 1)  # the pair itself
    envs = trained.get_env()
    obs = envs.reset()
    obs, rewards, dones, infos = envs.step(trained.predict(obs)[0])
    assert obs.shape == (8, 4) and rewards.shape == dones.shape == (8,) and len(infos) == 8


def test_callbacks_see_each_step_and_can_stop():
    seen = []

    class Stop(jaxrlhf.BaseCallback):
        def _on_training_start(self):
            seen.append(self.training_env.num_envs)

        def _on_step(self):
            seen.append(self.num_timesteps)
            assert self.locals["infos"] is not None and self.n_calls == len(seen) - 1
            return self.num_timesteps < 10

        def _on_training_end(self):
            seen.append("end")

    envs = jaxrlhf.make_vec_env(CartPole, 2)
    model = jaxrlhf.PPO("MlpPolicy", envs, **SMALL)
    model.learn(1000, callback=Stop())
    assert seen == [2, 2, 4, 6, 8, 10, "end"]
    model.learn(1000, callback=[lambda values, _: values["self"].num_timesteps < 20])
    assert model.num_timesteps == 20


def test_the_table_of_an_iteration(capsys):
    jaxrlhf.PPO("MlpPolicy", CartPole(), **SMALL, verbose=1).learn(64)
    lines = capsys.readouterr().out.splitlines()
    assert sum("| train/" in line for line in lines) == 2 and any("explained_variance" in line for line in lines)
    assert {line[0] + line[-1] for line in lines} == {"--", "||"} and len({*map(len, lines)}) <= 2


def test_learning_goes_on_where_environments_fail(capfd):
    makers = [CartPole, CartPole, lambda: Faulty("raises"), lambda: Faulty("nan")]
    model = jaxrlhf.PPO("MlpPolicy", jaxrlhf.VecEnv(makers), **SMALL)
    before = weights(model)
    model.learn(300)
    assert model.num_timesteps == 384 and all(np.isfinite(leaf).all() for leaf in weights(model))
    assert not all(np.array_equal(a, b) for a, b in zip(before, weights(model)))
    assert {line.split(":")[0] for line in capfd.readouterr().err.splitlines()} == {"environment 2", "environment 3"}


def test_input_errors(trained, tmp_path):
    trained.save(tmp_path / "model")
    (tmp_path / "text.zip").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "theirs.zip", "w") as archive:
        archive.writestr("policy.pth", "")
    about = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("model.json"))
    assert about["settings"]["n_steps"] == 32 and about["seed"] == 0
    scheduled = jaxrlhf.PPO("MlpPolicy", CartPole(), **SMALL, learning_rate=lambda left: 0.1 * left)
    scheduled.save(tmp_path / "scheduled")
    make = lambda **changes: jaxrlhf.PPO("MlpPolicy", CartPole(), **changes)  # noqa: E731
    for call, message in [
        (lambda: jaxrlhf.PPO("LMPolicy", CartPole()), "policy: must be MlpPolicy, not 'LMPolicy'$"),
        (lambda: make(n_step=3), "n_step: unknown setting; the settings are learning_rate, n_steps"),
        (lambda: make(n_steps=0), "n_steps: .*greater than or equal to 1, not 0"),
        (lambda: make(learning_rate="fast"), "learning_rate: must be a number .* not 'fast'"),
        (lambda: make(gamma=1.5), "gamma: .*less than or equal to 1, not 1.5"),
        (lambda: make(policy_kwargs={"activation_fn": "cos"}), "policy_kwargs.activation_fn: .*'tanh'.*, not 'cos'"),
        (lambda: make(device="tpu"), "device: must be"),
        (lambda: make().learn(0), "total_timesteps: must be at least 1"),
        (lambda: make(n_steps=1).learn(10), "n_steps: must be at least 2 with one environment, not 1"),
        (lambda: trained.predict(np.zeros(3)), r"predict: the observation must have shape \[4\].* not \[3\]"),
        (lambda: trained.predict("left"), "predict: the observation must have shape"),
        (lambda: trained.set_env(copies()["Box"]), r"its observation_space is Box\(shape \[2\], float32\), but"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "nothing"), "nothing.zip: no such file"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "text.zip"), "text.zip: this is not a file that PPO.save wrote"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "theirs"), "files of Stable-Baselines3 hold pickled code"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "model", policy_kwargs={"net_arch": [3]}), "must have"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "model").learn(10), "learn: the model has no environment"),
        (lambda: jaxrlhf.PPO.load(tmp_path / "scheduled", CartPole()).learn(9), "learning_rate: the function"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert jaxrlhf.PPO.load(tmp_path / "scheduled", CartPole(), learning_rate=0.1).learn(10).num_timesteps == 32
    with pytest.raises(Fault, match="below reward_threshold"):
        jaxrlhf.evaluate_policy(trained, CartPole(), 1, reward_threshold=1000)


def test_gymnasium_ids(tmp_path):
    pytest.importorskip("gymnasium")
    model = jaxrlhf.PPO("MlpPolicy", "Pendulum-v1", **SMALL | {"policy_kwargs": {"activation_fn": jax.nn.relu}})
    env = model.learn(64).get_env()
    assert env.step(model.predict(env.reset())[0])[0].shape == (1, 3)
    with pytest.raises(UserError, match="NoSuch-v1: Gymnasium cannot make it"):
        jaxrlhf.PPO("MlpPolicy", "NoSuch-v1")


def test_a_model_without_an_environment_gets_its_spaces_from_set_env():
    model = jaxrlhf.PPO("MlpPolicy", None, seed=0)
    with pytest.raises(UserError, match="learn: the model has no environment"):
        model.learn(1)
    model.set_env(CartPole())
    assert model.predict(np.zeros(4, np.float32))[0] in (0, 1)
