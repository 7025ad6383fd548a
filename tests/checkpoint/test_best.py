"""The best checkpoint stays beside the newest, and which one it is stands in every checkpoint."""

import jax.numpy as jnp
import pytest

from jaxrlhf.checkpoint.checkpoints import Best, Checkpoints, stored_best, stored_steps
from jaxrlhf.errors import UserError


def _like():
    return {"x": jnp.float32(0)}


def _steps(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _save(checkpoints, scores: dict) -> None:
    for step, score in scores.items():
        checkpoints.save(step, {"x": jnp.float32(step)}, score)


@pytest.mark.parametrize(
    ("lowest", "scores", "best", "kept"),
    [
        (False, {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.5, 5: 0.2}, Best(2, 0.9), [2, 4, 5]),
        (True, {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.5, 5: 0.2}, Best(1, 0.1), [1, 4, 5]),
        (False, {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.9}, Best(2, 0.9), [2, 3, 4]),  # the first of equal ones
        (False, {1: 0.1, 2: float("nan"), 3: float("inf"), 4: None, 5: -1.0}, Best(1, 0.1), [1, 4, 5]),
        (False, {1: 0.1, 2: 0.2, 3: 0.3}, Best(3, 0.3), [2, 3]),
        (False, {1: None, 2: None, 3: None}, None, [2, 3]),
    ],
)
def test_the_best_is_kept_and_known_again(tmp_path, lowest, scores, best, kept):
    with Checkpoints(tmp_path, 2, "reward/score", lowest) as checkpoints:
        _save(checkpoints, scores)
        assert checkpoints.best() == best
    assert _steps(tmp_path) == kept == stored_steps(tmp_path)
    assert stored_best(tmp_path, "reward/score", lowest) == (best and best.step)
    assert stored_best(tmp_path, "reward/score", not lowest) is stored_best(tmp_path, "reward/gold", lowest) is None
    with Checkpoints(tmp_path, 2, "reward/score", lowest) as again:
        again.restore_latest(_like(), print)
        assert again.best() == best
        _save(again, {7: None, 8: None})
        assert again.best() == best
        if best is not None:
            assert float(again.restore(best.step, _like())["x"]) == best.step
    assert _steps(tmp_path) == sorted({7, 8} | ({best.step} if best else set()))


def test_scores_of_something_else_are_forgotten(tmp_path):
    with Checkpoints(tmp_path, 1, "reward/score") as checkpoints:
        _save(checkpoints, {1: 9.0, 2: 1.0})
    for name, lowest in (("reward/gold", False), ("reward/score", True)):
        with Checkpoints(tmp_path, 1, name, lowest) as other:
            other.restore_latest(_like(), print)
            assert other.best() is None
    with Checkpoints(tmp_path, 1, "reward/gold") as other:
        other.restore_latest(_like(), print)
        _save(other, {3: 0.5})
        assert other.best() == Best(3, 0.5)
    assert _steps(tmp_path) == [3]


def test_a_fall_back_knows_only_what_was_known_then(tmp_path):
    with Checkpoints(tmp_path, 2, "s") as checkpoints:
        _save(checkpoints, {1: 0.5, 2: 0.1, 3: 0.9})
    (tmp_path / "3" / "record.json").unlink()
    with Checkpoints(tmp_path, 2, "s") as again:
        assert again.restore_latest(_like(), lambda text: None).step == 2
        assert again.best() is None, "what was the best until then went when step 3 was better"
        _save(again, {3: 0.9})  # and step 3 comes again
        assert again.best() == Best(3, 0.9)


def test_a_best_that_is_gone_or_damaged(tmp_path):
    with Checkpoints(tmp_path, 1, "s") as checkpoints:
        _save(checkpoints, {1: 0.5, 2: 0.1})
        (tmp_path / "1" / "record.json").unlink()
        with pytest.raises(UserError, match=r"1: this checkpoint is damaged: record\.json is missing; restore"):
            checkpoints.restore(checkpoints.best().step, _like())
    for path in (tmp_path / "1").rglob("*"):
        path.unlink() if path.is_file() else None
    (tmp_path / "1").rename(tmp_path / "elsewhere")
    with Checkpoints(tmp_path, 1, "s") as checkpoints:
        checkpoints.restore_latest(_like(), print)
        assert checkpoints.best() is None
