"""The warnings at the top of a report: alarms that a run raised, and steps that made no update."""

from typing import Any

from jaxrlhf.config.alarms import ADVICE, SHIPPED


def warnings(run: dict[str, Any]) -> list[str]:
    """Returns one line for each fault that the logs of a run show, with what usually helps."""
    found = [text for name, stage in run["stages"].items() for text in _of_stage(name, stage)]
    if run["unread"]:
        found.append(f"{run['unread']} lines of the logs cannot be read and are left out.")
    return found


def _of_stage(name: str, stage: dict[str, Any]) -> list[str]:
    curves = stage["metrics"]
    found = [_alarm(name, stage["step"], alarm) for alarm in stage["alarms"]]
    if sum(curves.get("optimizer/skipped", {}).get("y", ())):
        found.append(f"{name}: steps were skipped because the loss or gradient was not finite.")
    if paused := sum(value > 0 for value in curves.get("health/paused", {}).get("y", ())):
        found.append(f"{name}: {paused} iterations made no update: KL or length was above its limit (health).")
    again = [metric for metric, curve in curves.items() if metric.startswith("compiles/") and max(curve["y"]) > 1]
    if again and name == "ppo":  # the other stages compile once for each length of their batches
        names = ", ".join(metric.removeprefix("compiles/") for metric in again)
        found.append(f"{name}: compiled more than once: {names}. Shapes or settings changed during the run.")
    return found


def _alarm(stage: str, step: int, alarm: dict[str, Any]) -> str:
    """Describes an alarm of a run. The text has the metric and limit only for alarms that jaxrlhf ships."""
    name, times = alarm["name"], alarm["times"]
    end = "still holds" if alarm["last"] == step else f"ended after step {alarm['last']}"
    again = f", {times} times" if times > 1 else ""
    text = f"{stage}: alarm {name} began at step {alarm['first']} and {end}{again}"
    shipped = SHIPPED.get(name)
    if shipped is not None:
        text += f" ({shipped.metric}, {' '.join(map(str, shipped.limit)).replace('_', ' ')})"
    return f"{text}: {ADVICE[name]}." if name in ADVICE else f"{text}."
