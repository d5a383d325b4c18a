import os
import shlex
import subprocess
import sys

import pytest

from alexnet_triton.cli import main
from alexnet_triton.cli.words import INIT_NAMES, READERS, VARIANT_NAMES
from alexnet_triton.model import INITS
from alexnet_triton.recipe.data.loader import readers
from alexnet_triton.variants import VARIANTS


def test_names_on_the_command_line_are_the_networks():
    assert set(VARIANT_NAMES) == set(VARIANTS)
    assert set(INIT_NAMES) == set(INITS)
    assert readers() == READERS


def test_info_prints_the_table(capsys):
    assert main(["info", "--variant", "paper", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 x 96 x 55 x 55" in out
    assert "60,965,224" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--variant", "vgg"], "invalid choice: 'vgg'"),
        (["info", "--batch", "0"], "must be at least 1, got 0"),
        (["info", "--batch", "many"], "must be a whole number, got 'many'"),
        (["autotune", "--batch", "1,,2"], "must be a whole number, got ''"),
        (["demo", "--lr", "-1"], "must be positive"),
        (["demo", "--lr", "high"], "must be a number, got 'high'"),
        (["autotune", "--budget", "long"], "must be a time, as in 180s or 5m, got 'long'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: COMMAND"),
    ],
)
def test_words_that_are_not_understood(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--image-size", "20"], "needs images of at least 67x67 pixels, got 20x20"),
        (["demo", "--data", "nowhere"], "there is no folder of images at 'nowhere'"),
        (["demo", "--image-size", "32"], "needs images of at least 67x67 pixels, got 32x32"),
        (["demo", "--out", "a file"], "'a file' is a file, and --out needs a folder"),
        (["demo", "--device", "gpu"], "gpu"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("alexnet-triton: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [((), "stopped"), (("halfway",), "halfway")])
def test_ctrl_c_is_one_sentence_and_exit_code_130(words, message, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt(*words)

    monkeypatch.setattr("alexnet_triton.info.layer_table", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == f"\nalexnet-triton: {message}\n"


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def test_module_is_the_same_command_line():
    for words in (["-m", "alexnet_triton", "--version"], ["-m", "alexnet_triton.bench", "--help"]):
        result = run(*words)
        assert result.returncode == 0, result.stderr
        assert "alexnet-triton" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m alexnet_triton info | head -1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert result.stdout.startswith("layer")
