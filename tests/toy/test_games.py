"""The text games: rules, exact players, best scores, demonstrations, and episodes that follow from seed and actions."""

from importlib import import_module
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrlhf.environments.check import find_problems
from jaxrlhf.errors import UserError
from jaxrlhf.toy import builtin
from jaxrlhf.toy.games import connect_four, grid_world, number_guessing, table_booking, twenty_questions
from jaxrlhf.toy.games.board_game import WON, BoardGame
from jaxrlhf.toy.games.connect_four import ConnectFour
from jaxrlhf.toy.games.game import Game, play_episode
from jaxrlhf.toy.games.number_guessing import NumberGuessing
from jaxrlhf.toy.games.tic_tac_toe import TicTacToe
from jaxrlhf.toy.games.translation_feedback import TranslationFeedback
from jaxrlhf.toy.games.twenty_questions import SUBJECTS, TwentyQuestions

# Game -> the lowest and the highest share of demonstrations that succeed.
GAMES = {name: (0.02 if name == "connect_four" else 0.1, 0.35) for name in builtin.GAMES}


def act(env, action):
    """Steps, and returns (text, reward, whether the episode is over, info)."""
    (message,), reward, terminated, truncated, info = env.step(action)
    assert message["role"] == "user" and truncated is False
    return message["content"], reward, terminated, info


PLAYERS = ("demonstrator", "stubborn_action", "random_action")


def module_of(name):
    return import_module(f"jaxrlhf.toy.games.{name}")


def class_of(name):
    (found,) = [
        value
        for value in vars(module_of(name)).values()
        if isinstance(value, type) and issubclass(value, Game) and value.__module__ == f"jaxrlhf.toy.games.{name}"
    ]
    return found


def a_legal_move(env, rng):
    return sorted(env.moves(env.position[0] | env.position[1]))[rng.integers(2) - 1]


@pytest.mark.parametrize("name", GAMES)
def test_each_game_keeps_the_contract(name):
    assert find_problems(class_of(name)()) == ([], [])


@pytest.mark.parametrize("name", GAMES)
def test_demonstrations_use_known_words_and_leave_room(name):
    rows, words = builtin.load(name, "train", 120), set(builtin.vocabulary(name)[0])
    for message in chain.from_iterable(row["messages"] for row in rows):
        assert set(message["content"].split()) <= words
        assert message["content"] == " ".join(message["content"].split())
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
    low, high = GAMES[name]
    assert low < np.mean([row["success"] for row in rows]) < high


@pytest.mark.parametrize("name", GAMES)
def test_an_episode_follows_from_seed_and_actions(name):
    env, other = class_of(name)(), class_of(name)()
    episodes = []
    for played in (env, other, env):
        rng = np.random.default_rng(5)
        module = module_of(name)
        default = next(iter(vars(module).get(name) for name in PLAYERS if name in vars(module)), None)
        choose = a_legal_move if isinstance(played, BoardGame) else default
        episodes.append(play_episode(played, lambda env, choose=choose, rng=rng: choose(env, rng), seed=11))
    assert episodes[0] == episodes[1] == episodes[2]
    assert "success" in episodes[0][2]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("?")


# ---------------------------------------------------------------- number guessing


@pytest.mark.parametrize(("numbers", "guesses"), [(20, 5), (7, 3), (100, 7), (1, 1)])
def test_bisection_finds_every_number_and_one_guess_less_does_not(numbers, guesses):
    def share(allowed):
        env, found = NumberGuessing(numbers, allowed), []
        for secret in range(1, numbers + 1):
            env.reset(seed=0)
            env.secret, done = secret, False
            while not done:
                _, reward, done, info = act(env, number_guessing.best_action(env))
            assert reward == float(info["success"])
            found.append(info["success"])
        return np.mean(found)

    assert share(guesses) == 1
    assert guesses == 1 or share(guesses - 1) < 1


def test_an_action_that_is_no_number_costs_a_guess():
    env = NumberGuessing(10, 2)
    env.reset(seed=0)
    assert act(env, "seven")[:3] == ("say a number", 0.0, False)
    assert act(env, "9" * 5000)[:3] == ("say a number", 0.0, True)


# ---------------------------------------------------------------- twenty questions


def test_eight_questions_suffice_and_are_needed():
    assert twenty_questions.fewest_questions() == 8
    for secret in range(len(SUBJECTS)):
        env, done = TwentyQuestions(8), False
        env.reset(seed=0)
        env.secret = secret
        while not done:
            _, reward, done, info = act(env, twenty_questions.best_action(env))
        assert info["success"] and reward == 1


def test_the_search_for_the_fewest_questions_equals_plain_recursion():
    def plain(possible):
        if len(possible) <= 1:
            return len(possible)
        asked = [(possible & has, possible - has) for has in twenty_questions.PROPERTIES.values()]
        asked = [parts for parts in asked if all(parts)]
        asked += [(frozenset(), possible - {one}) for one in possible]
        return 1 + min(max(plain(yes), plain(no)) for yes, no in asked)

    random = np.random.default_rng(0)
    for _ in range(12):
        possible = frozenset(random.permutation(len(SUBJECTS))[:5].tolist())
        assert twenty_questions.fewest_questions(possible) == plain(possible)
    farm = frozenset(SUBJECTS.index(f"a {word}") for word in ("sheep", "goat", "cow", "pig"))
    assert twenty_questions.fewest_questions(farm) == plain(farm)


def test_questions_are_read_with_and_without_the_mark():
    env = TwentyQuestions()
    env.reset(seed=0)
    env.secret = SUBJECTS.index("a dog")
    assert act(env, "is it an animal")[0] == "yes"
    assert act(env, "is it a bird ?")[0] == "no"
    assert act(env, "what is it ?")[0] == "i do not understand"
    assert act(env, "is it a dog")[:3] == ("yes that is it", 1.0, True)


# ---------------------------------------------------------------- grid world


def test_the_shortest_path_is_walked_and_walls_hold():
    for seed in range(30):
        env = grid_world.GridWorld(size=6, walls=0.3)
        env.reset(seed=seed)
        assert env.walls and len(env.distances()) + len(env.walls) == 36  # no free cell is cut off
        blocked = [move for move in grid_world.MOVES if move not in env.free()]
        if blocked:
            before = env.at
            assert act(env, blocked[0])[0].startswith("no way") and env.at == before
            env.left += 1
        assert env.steps == 12
        steps, done = env.shortest, False
        for _ in range(steps):
            assert not done
            _, reward, done, info = act(env, env.best_action())
        assert done and reward == 1 and info["success"]


# ---------------------------------------------------------------- board games


def value_by_plain_minimax(game, own, other, known):
    """Value of a position for the player who moves: 1, 0 or -1. Plain recursion over all games."""
    if (own, other) not in known:
        if game.won(other):
            known[own, other] = -1
        else:
            moves = game.moves(own | other).values()
            known[own, other] = max(
                (-value_by_plain_minimax(game, other, own | cell, known) for cell in moves), default=0
            )
    return known[own, other]


def test_every_best_move_of_tic_tac_toe_keeps_the_value_of_plain_minimax():
    game, known = TicTacToe(), {}
    assert value_by_plain_minimax(game, 0, 0, known) == 0
    assert len(known) == 5478  # the number of positions that play can reach
    for (own, other), value in known.items():
        if not game.won(other) and (own | other) != 511:
            game.position = (own, other)
            moves = game.moves(own | other)
            assert all(known[other, own | moves[action]] == -value for action in game.best_actions())


@pytest.mark.parametrize("first", ["agent", "opponent"])
def test_minimax_never_loses_tic_tac_toe(first):
    """All games: every sequence of the agent's actions against every move that minimax may draw."""
    outcomes, seen = set(), set()

    def play(position, mine):
        game.position = position
        own, other = position
        if (position, mine) in seen:
            return
        seen.add((position, mine))
        if game.won(other):
            outcomes.add("opponent" if mine else "agent")
            return
        moves = game.moves(own | other)
        if not moves:
            outcomes.add("draw")
        for action in moves if mine else game.best_actions():
            play((other, own | moves[action]), not mine)

    game = TicTacToe("minimax")
    play((0, 0), first == "agent")
    assert outcomes == {"draw", "opponent"}


def test_a_function_plays_and_sees_the_board_from_its_own_side():
    seen = []

    def lowest(text):
        seen.append(text)
        return next(word for word in text.split() if word.isdigit())

    env = TicTacToe(lowest, first="agent")
    assert env.reset(seed=0)[0][0]["content"] == "you are x board 1 2 3 / 4 5 6 / 7 8 9"
    assert act(env, "5")[0] == "you are x board o 2 3 / 4 x 6 / 7 8 9"
    assert seen == ["you are o board 1 2 3 / 4 x 6 / 7 8 9"]
    assert act(env, "3")[0] == "you are x board o o x / 4 x 6 / 7 8 9"
    text, reward, done, info = act(env, "7")
    assert (text, reward, done) == ("you win o o x / 4 x 6 / x 8 9", 1.0, True)
    assert info == {"success": True, "outcome": "win"}

    env = TicTacToe(lambda text: "nonsense", first="opponent")
    env.reset(seed=0)
    assert env.outcome == "win"


def test_illegal_moves_lose():
    env = TicTacToe("random", first="opponent")
    env.reset(seed=2)
    taken = next(str(cell + 1) for cell in range(9) if env.position[1] >> cell & 1)
    assert act(env, taken)[1:] == (-1.0, True, {"success": False, "outcome": "illegal"})


def test_lines_of_connect_four_are_those_of_the_grid():
    grid = {(c, r): 1 << c * 7 + r for c in range(7) for r in range(6)}
    lines = set()
    for (c, r), (dc, dr) in ((cell, step) for cell in grid for step in ((1, 0), (0, 1), (1, 1), (1, -1))):
        cells = [(c + i * dc, r + i * dr) for i in range(4)]
        if all(cell in grid for cell in cells):
            lines.add(sum(grid[cell] for cell in cells))
    assert set(connect_four.LINES) == lines and len(lines) == 69
    env, random = ConnectFour(), np.random.default_rng(0)
    for _ in range(300):
        cells = sum(bit for bit in grid.values() if random.random() < 0.45)
        assert env.won(cells) == any(cells & line == line for line in lines)


def test_alpha_beta_of_connect_four_equals_plain_minimax_to_its_depth():
    def plain(game, own, other, depth):
        if game.won(other):
            return (own | other).bit_count() - WON
        moves = game.moves(own | other)
        if not moves or depth == 0:
            return game.heuristic(own, other) if moves else 0
        return max(-plain(game, other, own | cell, depth - 1) for cell in moves.values())

    env, random = ConnectFour(depth=3), np.random.default_rng(1)
    for _ in range(6):
        own = other = 0
        for _ in range(int(random.integers(4, 24))):
            moves = list(env.moves(own | other).values())
            after = own | moves[random.integers(len(moves))]
            if env.won(after):
                break
            own, other = other, after
        env.position = (own, other)
        values = {a: -plain(env, other, own | cell, 2) for a, cell in env.moves(own | other).items()}
        assert set(env.best_actions()) == {a for a, value in values.items() if value == max(values.values())}


def test_connect_four_wins_and_blocks():
    env = ConnectFour(depth=2)
    column = connect_four.BOTTOMS[0]
    env.position = (0b111 * column, connect_four.BOTTOMS[3] * 0b11 | connect_four.BOTTOMS[5])
    assert env.best_actions() == ("1",)  # wins
    env.position = env.position[::-1]
    assert env.best_actions() == ("1",)  # prevents it
    env.reset(seed=0)
    assert env.text(0).split("board ")[1].count(".") == 42 - (env.mark == 1)


def test_deeper_minimax_beats_random_moves():
    env = ConnectFour("random", depth=3)
    wins = [play_episode(env, lambda env: env.best_actions()[0], seed)[2]["success"] for seed in range(5)]
    assert all(wins)


# ---------------------------------------------------------------- table booking, translation


def test_a_booking_that_listens_always_succeeds_and_one_that_misses_corrections_does_not():
    def share(policy):
        return np.mean([play_episode(table_booking.TableBooking(), policy, seed)[1] for seed in range(80)])

    def misses(env):
        unknown = [slot for slot in table_booking.SLOTS if slot not in env.said]
        if unknown:
            return table_booking.best_action(env)
        return "book " + " ".join(env.heard[slot] for slot in table_booking.SLOTS)

    assert share(table_booking.best_action) == 1
    assert 0.3 < share(misses) < 0.9


def test_the_customer_leaves_after_needless_questions():
    env = table_booking.TableBooking(changes=0, patience=1)
    env.reset(seed=0)
    env.said, env.goal = {}, dict.fromkeys(table_booking.SLOTS, "x")
    assert act(env, "which day ?")[:3] == ("x please", 0.0, False)
    assert act(env, "which day")[:3] == ("i said that", 0.0, False)
    assert act(env, "what ?")[:3] == ("i go elsewhere", 0.0, True)


def test_feedback_names_the_right_words_of_a_row():
    env = TranslationFeedback()
    row = {"prompt": "the big dog =>", "reference": "lo kano grano"}
    assert env.reset(options=row)[0][0]["content"] == "translate the big dog"
    assert act(env, "lo grano kano vide")[:3] == ("wrong 3 words lo ? ?", 0.0, False)
    assert act(env, "lo kano")[1:3] == (pytest.approx(2 / 3), True)
    env.reset(options=row)
    assert act(env, "lo kano grano")[1:] == (1.0, True, {"success": True})
    env.reset(options=row | {"reference": "Lo Kano grano"})
    assert act(env, "lo Kano grano")[1] == 1.0
    with pytest.raises(UserError, match="needs the text reference; its columns are: prompt, answer"):
        env.reset(options={"prompt": "the big dog", "answer": "lo kano grano"})


def played_well(env):
    """Returns the action of the best player; for translation, a wrong first one."""
    if isinstance(env, TranslationFeedback):
        return " ".join(["?" if env.left == 2 else word for word in env.reference])
    if isinstance(env, BoardGame):
        return env.best_actions()[0]
    return env.best_action() if hasattr(env, "best_action") else import_module(type(env).__module__).best_action(env)


@pytest.mark.parametrize("name", GAMES)
def test_the_best_player_has_room_in_the_config_of_the_page(name):
    page = (Path(__file__).parents[2] / "docs" / "environments" / f"{name.replace('_', '-')}.md").read_text()
    ppo = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])["ppo"]
    environment, turn = ppo["environment"], ppo["sampling"]["max_new_tokens"]
    limit = environment.get("max_episode_tokens", 2 * environment["max_turns"] * turn)  # the default
    for seed in range(5 if name == "connect_four" else 40):
        env = class_of(name)(**environment.get("arguments", {}))
        first, *messages = play_episode(env, played_well, seed)[0]
        assert first["role"] == "user" and messages[-1]["role"] == "user"
        # A turn ends with <eos>. An observation has two words of the template. The last one is not read.
        lengths = [len(message["content"].split()) for message in messages]
        turns, observations = lengths[::2], lengths[1:-1:2]
        assert len(turns) <= environment["max_turns"] and max(turns) + 1 <= turn
        assert sum(n + 1 for n in turns) + sum(n + 2 for n in observations) <= limit


def test_every_pair_of_games_has_other_demonstrations():
    first = {name: builtin.load(name, "test", 1)[0]["messages"] for name in GAMES}
    assert all(first[a] != first[b] for a, b in combinations(first, 2))
