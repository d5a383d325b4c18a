"""Which config a launch gets, and the files that say so."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings

import pytest
import torch
import triton

from alexnet_triton import configs
from alexnet_triton.configs import cache
from alexnet_triton.kernels import config, launch
from alexnet_triton.kernels.config import (
    ConvProblem,
    LinearProblem,
    NormPoolProblem,
    WeightGradientProblem,
)
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.tuning.works import works
from alexnet_triton.variants import VARIANTS

HALF = torch.bfloat16
CONV = ConvProblem(128, 13, 13, 384, 256, 3, 3, 1, True, HALF, False)
PROBLEMS = [
    CONV,
    WeightGradientProblem(128, 14, 14, 384, 256, 3, 3, 1, HALF, False),
    LinearProblem(128, 4096, 9216, "data gradient", True, HALF, False),
    NormPoolProblem(128, 29, 29, 96, (3, 3), (2, 2), 5, False, HALF),
]
CARD = "NVIDIA Test 80GB"
TARGET = TARGETS["sm_90"]._replace(card=CARD)
ONE = config.ConvConfig(64, 32, 0, 64, 4, 2)
OTHER = config.ConvConfig(64, 64, 0, 64, 4, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's cache lies in a folder of the test's own, and nobody has looked anything up."""
    monkeypatch.setenv("ALEXNET_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_reported", set())
    before = config.look_up_with(configs.lookup)
    configs.forget()
    yield tmp_path
    config.look_up_with(before)
    configs.forget()


def entry(chosen=ONE, **facts):
    return cache.entry_of(chosen, "measured", ConvProblem, triton.__version__)._replace(**facts)


def keep(*batches, chosen=ONE, **facts):
    found = {batch: entry(chosen, **facts) for batch in batches}
    cache.merge(cache.cache_path(), {CARD: {cache.problem_key(CONV): found}})
    configs.forget()


def ship(monkeypatch, *batches, chosen=OTHER):
    shipped = {cache.problem_key(CONV): {batch: entry(chosen) for batch in batches}}
    monkeypatch.setattr(configs, "shipped", cached(lambda card: shipped))


def cached(function):
    function.cache_clear = lambda: None
    return function


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def start(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def forked(function, *arguments):
    """The exit code of a process that runs a function."""
    process = start(function, *arguments)
    process.join(60)
    return process.exitcode


# --- which one ----------------------------------------------------------------------------------------------


def test_without_any_file_the_rule_decides():
    for problem in PROBLEMS:
        assert config.choose(TARGET, problem) == problem.default(TARGET)


@pytest.mark.parametrize("images", [1, 4, 16, 128])
def test_a_small_batch_gets_narrow_tiles_before_the_card_stands_idle(images):
    problem = CONV._replace(images=images)
    rule = problem.default(TARGET)
    programs = (
        -(-images * 169 // rule.block_npq) * -(-384 // (rule.block_k + rule.extra_k)) * getattr(rule, "splits", 1)
    )
    assert rule.block_k == 32 or 2 * programs > TARGET.multiprocessors


def test_a_tuned_config_is_taken_for_its_very_shape_and_card():
    keep(128)
    assert config.choose(TARGET, CONV) == ONE
    for other in (CONV._replace(filters=192), CONV._replace(bordered=False), CONV._replace(dtype=torch.float16)):
        assert config.choose(TARGET, other) == other.default(TARGET)
    assert config.choose(TARGET._replace(card="NVIDIA Other"), CONV) == CONV.default(TARGET)


def test_the_users_entry_comes_before_the_shipped_one_and_a_batch_before_its_neighbour(monkeypatch):
    ship(monkeypatch, 64, 128)
    keep(128)
    assert config.choose(TARGET, CONV) == ONE  # the user's, exactly
    assert config.choose(TARGET, CONV._replace(images=64)) == OTHER  # shipped, exactly: before the user's neighbour
    assert config.choose(TARGET, CONV._replace(images=200)) == ONE  # of two equally near, the user's
    assert config.choose(TARGET, CONV._replace(images=40)) == OTHER  # the nearest


def test_a_batch_too_far_from_any_other_takes_the_rules():
    keep(16)
    assert config.choose(TARGET, CONV._replace(images=64)) == ONE
    for images in (3, 65):
        problem = CONV._replace(images=images)
        assert config.choose(TARGET, problem) == problem.default(TARGET)
    empty = CONV._replace(images=0)
    assert config.choose(TARGET, empty) == empty.default(TARGET)


@pytest.mark.parametrize("facts", [{"triton": "0.1"}, {"kernel": "of other code"}])
def test_what_was_tuned_with_another_triton_or_other_kernels_does_not_count(facts):
    keep(128, **facts)
    assert config.choose(TARGET, CONV) == CONV.default(TARGET)


def test_a_shipped_entry_counts_for_every_triton_but_for_its_kernels_alone(monkeypatch):
    for facts, expected in (({"triton": "0.1"}, OTHER), ({"kernel": "of other code"}, CONV.default(TARGET))):
        shipped = {cache.problem_key(CONV): {128: entry(OTHER, **facts)}}
        monkeypatch.setattr(configs, "shipped", cached(lambda card, shipped=shipped: shipped))
        configs.forget()
        assert config.choose(TARGET, CONV) == expected


def test_a_config_is_looked_up_once_in_a_process(monkeypatch):
    keep(128)
    asked = []
    config.look_up_with(lambda *what: (asked.append(what), configs.lookup(*what))[1])
    for _ in range(3):
        assert config.choose(TARGET, CONV) == ONE
    assert len(asked) == 1


def test_the_interpreter_has_no_tuned_configs(monkeypatch):
    monkeypatch.setattr(cache, "problem_key", lambda problem: pytest.fail("a file was asked"))
    config.choose(launch.target_of(torch.device("cpu")), CONV)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("card", "target"), [("H100", "sm_90"), ("H200", "sm_90"), ("A100", "sm_80")])
def test_every_shape_ships_for_these_cards_at_four_batches(card, target, variant):
    for batch in (1, 16, 128, 1024):
        for work in works(variant, torch.bfloat16, batch, TARGETS[target]):
            shipped = configs.shipped(card)[cache.problem_key(work.problem)][batch]
            config = cache.config_of(shipped, type(work.problem))
            configs.check_fits(work.problem, config, TARGETS[target])


def test_shipped_files_are_found_by_a_word_of_the_cards_name_and_fit_these_kernels():
    folder = os.path.dirname(configs.__file__)
    names = [name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")]
    for name in names:
        found = configs.shipped(f"NVIDIA {name.upper()} 80GB HBM3")
        assert found
        for problem, batches in found.items():
            op = next(op for op, word in cache.OPS.items() if problem.startswith(f"{word} "))
            for one in batches.values():
                cache.config_of(one, op)
                assert one.kernel == cache.kernel_hash(cache.OPS[op]), f"{name}: {problem} is of other kernels"
    assert configs.shipped("Apple M9") == {}


def test_what_is_in_force_is_counted(monkeypatch):
    keep(1, 128)
    keep(16, kernel="of other code")
    keep(32, triton="0.1")
    ship(monkeypatch, 64)
    found = configs.in_force(CARD)
    assert found["tuned"] == {"file": str(cache.cache_path()), "entries": 4, "counting": 2}
    assert found["shipped"] == {"entries": 1, "counting": 1}
    assert configs.in_force("NVIDIA Other")["tuned"]["entries"] == 0


# --- files --------------------------------------------------------------------------------------------------


def test_entries_survive_a_file():
    for problem in PROBLEMS:
        chosen = problem.default(TARGET)
        one = cache.entry_of(chosen, "modelled", type(problem), "3.8.0", seconds=1e-4, date="2026-01-01")
        cards = {"a": {cache.problem_key(problem): {1: one, 128: one}}}
        assert cache.parse(cache.text_of(cards)) == cards
        assert cache.config_of(one, type(problem)) == chosen


def test_a_key_names_everything_but_the_batch():
    for problem in PROBLEMS:
        assert cache.problem_key(problem) == cache.problem_key(problem._replace(images=5))
        for name in problem._fields[1:]:
            changed = problem._replace(**{name: "changed"})
            assert cache.problem_key(changed) != cache.problem_key(problem), name


def test_the_hash_follows_the_code_and_not_its_comments(tmp_path, monkeypatch):
    digests = []
    for text in ("a = 1  # one\n", "a = 1\n\n# two\n", "a = 2\n"):
        path = tmp_path / "kernel.py"
        path.write_text(text)
        found = type("Spec", (), {"origin": str(path)})
        monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name, found=found: found)
        digests.append(cache.kernel_hash.__wrapped__("conv"))
    assert digests[0] == digests[1] != digests[2]


GOOD = cache.text_of({CARD: {cache.problem_key(CONV): {128: entry()}}})
BROKEN = {
    "empty": "",
    "a brace": "{",
    "nothing": "null",
    "truncated": GOOD[: len(GOOD) // 2],
    "not JSON": "configs",
    "a list": "[]",
    "a later version": GOOD.replace('"version": 1', '"version": 2'),
    "an earlier version": GOOD.replace('"version": 1', '"version": 0'),
    "a version that is only equal": GOOD.replace('"version": 1', '"version": true'),
    "cards of a wrong type": '{"version": 1, "cards": []}',
    "problems of a wrong type": '{"version": 1, "cards": {"a": 3}}',
    "batches of a wrong type": '{"version": 1, "cards": {"a": {"b": []}}}',
    "a batch that is no number": GOOD.replace('"128"', '"many"'),
    "an entry of a wrong type": '{"version": 1, "cards": {"a": {"b": {"1": null}}}}',
    "an entry without a source": GOOD.replace('"source": "measured", ', ""),
    "a source that is none": GOOD.replace('"measured"', '"guessed"'),
    "a config that is no mapping": GOOD.replace("384", "1").replace('"config": {', '"config": [{').replace("2}", "2}]"),
    "a time that is no number": GOOD.replace('"source"', '"seconds": "fast", "source"'),
    "a time that is NaN": GOOD.replace('"source"', '"seconds": NaN, "source"'),
    "an endless time": GOOD.replace('"source"', '"seconds": 1e999, "source"'),
    "a negative time": GOOD.replace('"source"', '"default_seconds": -1, "source"'),
    "a batch in other digits": GOOD.replace('"128"', '"0128"'),
    "a batch of too many digits": GOOD.replace('"128"', f'"{"1" * 5000}"'),
    "a number of too many digits": GOOD.replace('"version": 1', f'"version": {"1" * 5000}'),
    "a batch twice": GOOD.replace('    "128"', '    "128": {}, "128"'),
    "a card twice": GOOD.replace(f'  "{CARD}"', f'  "{CARD}": {{}}, "{CARD}"', 1),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_reported_once_and_ignored(name):
    assert BROKEN[name] != GOOD
    cache.cache_path().write_text(BROKEN[name])
    with pytest.warns(UserWarning, match=r"tuned configs in .*configs.json are ignored: "):
        assert config.choose(TARGET, CONV) == CONV.default(TARGET)
    configs.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.choose(TARGET, CONV) == CONV.default(TARGET)


def test_bytes_that_are_no_text_and_a_folder_in_the_files_place_are_ignored_too(folder):
    path = cache.cache_path()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="are ignored"):
        assert cache.read(path) == {}
    with pytest.warns(UserWarning, match="it is no file"):
        assert cache.read(folder) == {}
    with pytest.raises(OSError, match="is no file"):
        cache.merge(folder, {})


def test_what_would_be_read_for_ever_is_not(folder):
    os.mkfifo(folder / "pipe")
    with (folder / "large").open("wb") as file:
        file.truncate(50 * 2**20)
    (folder / "round").symlink_to("round")
    for name, why in (("pipe", "it is no file"), ("large", "52,428,800 bytes"), ("round", "symbolic links|Too many")):
        with pytest.warns(UserWarning, match=why):
            assert cache.read(folder / name) == {}


def unreadable():
    """In a process that is not root's, which reads everything."""
    if os.geteuid() == 0:
        os.setuid(65534)
    path = cache.cache_path()
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.warns(UserWarning, match="are ignored: .*Permission denied"):
        assert cache.read(path) == {}
    keep(16)
    assert list(cache.read(path)[CARD][cache.problem_key(CONV)]) == [16]
    assert path.with_name("configs.json.broken").exists()


@needs_fork
def test_a_file_that_may_not_be_read_is_ignored_and_replaced(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are open to their owner alone
        os.chmod(folder, 0o777)
        monkeypatch.setenv("ALEXNET_TRITON_CACHE", folder)
        assert forked(unreadable) == 0


@pytest.mark.parametrize("name", ["truncated", "a later version"])
def test_a_broken_file_is_kept_beside_the_one_that_replaces_it(name):
    path = cache.cache_path()
    path.write_text(BROKEN[name])
    with pytest.warns(UserWarning, match="are ignored"):
        keep(128)
    assert config.choose(TARGET, CONV) == ONE
    assert path.with_name("configs.json.broken").read_text() == BROKEN[name]


def test_a_link_stays_one_and_what_a_kill_left_is_swept(folder):
    path = cache.cache_path()
    (folder / "elsewhere").mkdir()
    path.symlink_to(folder / "elsewhere" / "mine.json")
    (folder / "elsewhere" / ".mine.json.left").write_text("half")
    keep(128)
    assert path.is_symlink()
    assert sorted(os.listdir(folder / "elsewhere")) == ["mine.json", "mine.json.lock"]
    assert config.choose(TARGET, CONV) == ONE


def test_whoever_has_no_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("ALEXNET_TRITON_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert config.choose(TARGET, CONV) == CONV.default(TARGET)


def test_a_file_that_was_measured_on_a_card_can_ship_as_it_is(tmp_path, monkeypatch):
    keep(128)
    os.rename(cache.cache_path(), tmp_path / "test.json")
    monkeypatch.setattr(configs, "files", lambda package: tmp_path)
    configs.forget()
    assert config.choose(TARGET._replace(card="NVIDIA Test PCIe"), CONV) == ONE


def test_a_broken_shipped_file_is_reported_and_ignored(tmp_path, monkeypatch):
    (tmp_path / "test.json").write_text("{")
    monkeypatch.setattr(configs, "files", lambda package: tmp_path)
    with pytest.warns(UserWarning, match="test.json are ignored"):
        assert config.choose(TARGET, CONV) == CONV.default(TARGET)


@pytest.mark.parametrize(
    "change",
    [
        {"block_npq": 48},
        {"block_npq": "64"},
        {"stages": 0},
        {"warps": True},
        {"extra_k": -1},
        {"unknown": 1},
        {"block_k": 0},
        {"block_k": float("nan")},
        {"block_k": 64.0},
        {"block_k": None},
        {"block_k": [64]},
        {"block_k": 10**30},
        {"warps": 64},
        {"stages": 33},
        {"block_npq": 2**14, "block_k": 2**14},
        {"block_npq": 256, "block_k": 128, "stages": 5},
        {"loop": "shifted", "block_crs": 512, "stages": 1},  # of runs of 768 columns
    ],
    ids=str,
)
def test_a_config_that_no_kernel_can_take_is_ignored_and_said(change):
    wrong = entry()._replace(config={**dataclasses.asdict(ONE), **change})
    cache.merge(cache.cache_path(), {CARD: {cache.problem_key(CONV): {128: wrong}}})
    with pytest.warns(UserWarning, match="a tuned config is ignored"):
        assert config.choose(TARGET, CONV) == CONV.default(TARGET)


def test_a_wrong_config_does_not_hide_the_shipped_one(monkeypatch):
    ship(monkeypatch, 128)
    keep(128, config={**dataclasses.asdict(ONE), "stages": 0})
    with pytest.warns(UserWarning, match="a tuned config is ignored"):
        assert config.choose(TARGET, CONV) == OTHER


def test_a_word_of_a_config_is_one_that_kernels_know():
    given = {**dataclasses.asdict(ONE), "loop": "gathered"}
    assert cache.config_of(entry(config=given), ConvProblem)
    for wrong in ("gathred", 1, None, ["gathered"]):
        with pytest.raises(ValueError, match="loop of a config is one of gathered, shifted"):
            cache.config_of(entry(config={**given, "loop": wrong}), ConvProblem)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_the_rules_configs_fit_every_card_and_survive_what_is_asked_of_a_files(problem):
    for target in TARGETS.values():
        for images in (1, 128, 1024):
            own = problem._replace(images=images)
            rule = own.default(target)
            configs.check_fits(own, rule, target)
            assert cache.config_of(cache.entry_of(rule, "modelled", type(own), ""), type(own)) == rule


def test_a_cache_that_cannot_be_read_or_written(folder):
    if os.geteuid() == 0:  # root reads everything: a file where a folder is needed refuses root too
        (folder / "file").write_text("")
        path = folder / "file" / "configs.json"
    else:
        path = folder / "closed" / "configs.json"
        path.parent.mkdir(mode=0o500)
    with pytest.raises(OSError, match="file|closed"):
        cache.merge(path, {CARD: {"a": {1: entry()}}})


def test_merging_keeps_what_was_there_and_replaces_the_same_batch():
    keep(1, 128)
    keep(128, chosen=OTHER)
    found = cache.read(cache.cache_path())[CARD][cache.problem_key(CONV)]
    assert {images: cache.config_of(one, ConvProblem) for images, one in found.items()} == {1: ONE, 128: OTHER}


def merge_one_by_one(path, name, count):
    for number in range(count):
        cache.merge(path, {"card": {f"{name} {number}": {1: entry()}}})


@needs_fork
def test_eight_processes_that_tune_at_once_lose_none_of_their_entries():
    path = cache.cache_path()
    processes = [start(merge_one_by_one, path, name, 20) for name in range(8)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(cache.parse(path.read_text())["card"]) == 160


def killed_in(name, path):
    """A process that is killed when it calls a function of `os`, in the middle of a merge."""
    setattr(os, name, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
    merge_one_by_one(path, "new", 1)


@needs_fork
@pytest.mark.parametrize("name", ["chmod", "fsync", "replace"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_as_it_was(name):
    path = cache.cache_path()
    merge_one_by_one(path, "old", 3)
    before = path.read_bytes()
    assert forked(killed_in, name, path) == -signal.SIGKILL
    assert path.read_bytes() == before
    merge_one_by_one(path, "new", 1)
    assert len(cache.read(path)["card"]) == 4
    assert sorted(os.listdir(path.parent)) == ["configs.json", "configs.json.lock"]


@needs_fork
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one():
    path = cache.cache_path()
    for moment in (0.0, 0.01, 0.03, 0.1):
        process = start(merge_one_by_one, path, f"kill{moment}", 10_000)
        time.sleep(moment)
        process.kill()
        process.join(30)
        if path.exists():
            cache.parse(path.read_text())
    keep(128)  # and the lock of the dead hinders nobody
    assert config.choose(TARGET, CONV) == ONE


def test_the_cache_lies_where_the_variable_says_else_in_the_users_folder(monkeypatch, tmp_path):
    assert cache.cache_path() == tmp_path / "configs.json"
    monkeypatch.delenv("ALEXNET_TRITON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform == "linux":
        assert str(cache.cache_path()) == "/somewhere/alexnet_triton/configs.json"


def test_a_file_is_json_that_people_can_read():
    keep(1, 128)
    text = cache.cache_path().read_text()
    assert json.loads(text)["version"] == 1
    assert sum('"config"' in line for line in text.splitlines()) == 2
