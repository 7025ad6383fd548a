"""What a report says at its top: figures before and after, and warnings about a run."""

from typing import Any

LAST = 5  # steps that a warning looks at, so that one odd step raises none


def warnings(run: dict[str, Any]) -> list[str]:
    """One sentence for each fault that the curves of a run show, with what usually helps."""
    ppo = run["stages"].get("ppo", {}).get("metrics", {})
    found = [text for check in (_kl, _gold, _entropy, _value, _length, _updates) for text in check(ppo)]
    for stage, of_stage in run["stages"].items():
        skipped = sum(of_stage["metrics"].get("optimizer/skipped", {}).get("y", ()))
        if skipped:
            found.append(f"{stage}: steps were skipped because the loss or gradient was not finite.")
    if run["unread"]:
        found.append(f"{run['unread']} lines of the logs cannot be read and are left out.")
    return found


def _end(metrics: dict[str, Any], name: str) -> float | None:
    """The mean of a metric's last values; None if there are too few to judge."""
    values = metrics.get(name, {}).get("y", [])
    return sum(values[-LAST:]) / LAST if len(values) >= 2 * LAST else None


def _start(metrics: dict[str, Any], name: str) -> float | None:
    values = metrics.get(name, {}).get("y", [])
    return sum(values[:LAST]) / LAST if len(values) >= 2 * LAST else None


def _kl(ppo: dict[str, Any]) -> list[str]:
    kl, length = _end(ppo, "kl/k1"), _end(ppo, "length/mean")
    if kl is None or not length or kl / length < 1.5:
        return []
    return [
        f"KL runs away: {kl:.3g} nats per completion, {kl / length:.2g} per token. The policy writes what the "
        "reference hardly ever would; raise ppo.kl.coef or lower the learning rate."
    ]


def _gold(ppo: dict[str, Any]) -> list[str]:
    """The reward rises while the gold score falls: over-optimisation."""
    gold, reward = ppo.get("reward/gold", {}).get("y", []), ppo.get("reward/score", {}).get("y", [])
    if len(gold) < 4 * LAST or len(gold) != len(reward):
        return []
    windows = [sum(gold[i : i + LAST]) / LAST for i in range(0, len(gold) - LAST + 1)]
    peak = max(range(len(windows)), key=windows.__getitem__)
    fall, spread = windows[peak] - windows[-1], max(windows) - min(windows)
    if fall <= 0.3 * spread or fall <= 0.05 or sum(reward[peak : peak + LAST]) >= sum(reward[-LAST:]):
        return []
    return [
        f"The reward still rises, but the gold score has fallen from {windows[peak]:.3g} to {windows[-1]:.3g}: the "
        "policy exploits the reward model. Stop earlier, or raise ppo.kl.coef."
    ]


def _entropy(ppo: dict[str, Any]) -> list[str]:
    start, end = _start(ppo, "policy/entropy"), _end(ppo, "policy/entropy")
    if start is None or end is None or end >= 0.05 * start:
        return []
    return [f"Entropy collapsed from {start:.3g} to {end:.3g} nats per token: completions hardly vary any more."]


def _value(ppo: dict[str, Any]) -> list[str]:
    fit = _end(ppo, "value/explained_variance")
    if fit is None or fit >= 0:
        return []
    return [f"The value model explains none of the returns (explained variance {fit:.2g}): advantages are noise."]


def _length(ppo: dict[str, Any]) -> list[str]:
    ended = _end(ppo, "length/eos_share")
    if ended is None or ended >= 0.5:
        return []
    return [f"Only {ended:.0%} of the completions end before the limit; raise ppo.sampling.max_new_tokens."]


def _updates(ppo: dict[str, Any]) -> list[str]:
    paused = sum(x > 0 for x in ppo.get("health/paused", {}).get("y", []))
    again = [name for name, curve in ppo.items() if name.startswith("compiles/") and max(curve["y"]) > 1]
    found = [f"{paused} iterations made no update: KL or length was above its limit (health)."] if paused else []
    names = ", ".join(name.removeprefix("compiles/") for name in again)
    return found + ([f"Compiled more than once: {names}. Shapes or settings changed during the run."] if again else [])
