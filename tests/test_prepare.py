import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_triton.cli import main
from alexnet_triton.recipe.data import chunks, journal, prepare
from alexnet_triton.recipe.data.images import read_image
from alexnet_triton.recipe.data.packed import open_packed
from alexnet_triton.recipe.data.sets import DataError, LabelledImages

FILES = {"checksums.npy", "dataset.json", "images.bin", "labels.npy", "names.txt", "offsets.npy"}
SIZE, SLOT = 8, 192


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Chunks of few images, and one thread for the little work that these are."""
    monkeypatch.setattr(prepare, "CHUNK", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(folder, counts, seed=0, sides=(8, 20)):
    """Class folders of random images of random sizes: `counts` by class."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*generator.integers(*sides, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def source(tmp_path):
    return draw(tmp_path / "source", {"cat": 9, "dog": 6, "eel": 3})


def pack(source, destination, **options):
    return prepare.prepare(source, destination, SIZE, **{"workers": 0, **options})


def contents(folder):
    """All files under a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left(folder):
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


class Stopped(Exception):
    pass


def stop_after(count, monkeypatch):
    """Stop the next call when so many chunks are made."""
    make, made = chunks.make, []

    def counted(*task):
        if len(made) == count:
            raise Stopped
        made.append(make(*task))
        return made[-1]

    monkeypatch.setattr(chunks, "make", counted)
    return made


def go_on(source, tmp_path, monkeypatch):
    """Which chunks are made when it goes on to its end."""
    with monkeypatch.context() as patch:
        made = stop_after(5, patch)
        pack(source, tmp_path / "packed")
    return [number for number, one in enumerate(made) if one is not None]


# --- what is made -----------------------------------------------------------------------------------------------------


def test_a_folder_is_packed_as_it_would_be_read(source, tmp_path):
    (data,) = pack(source, tmp_path / "packed")
    assert left(tmp_path) == ["packed", "source"]
    assert set(contents(tmp_path / "packed")) == FILES
    assert data.classes == ("cat", "dog", "eel")
    assert torch.bincount(data.labels).tolist() == [9, 6, 3]
    names = [data.file_name(index) for index in range(18)]
    assert names == sorted(names)
    images = data.read(torch.arange(18))
    for name, label, image in zip(names, data.labels, images, strict=True):
        assert name.startswith(data.classes[label])
        assert torch.equal(image, read_image(source / name, SIZE))
    expected = LabelledImages("", images, data.labels, data.classes).statistics()
    assert all(map(torch.equal, data.statistics(), expected))


def test_photographs_have_their_colours(tmp_path):
    from sklearn.datasets import load_sample_images  # not by processes that look for a function here

    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "source" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "source" / name / "photograph.png")
    (data,) = prepare.prepare(tmp_path / "source", tmp_path / "packed", workers=0)
    pixels = data.read(torch.arange(2)).double().div(255).permute(1, 0, 2, 3).flatten(1)
    mean, std, eigenvalues, eigenvectors = (tensor.double() for tensor in data.statistics())
    assert (mean - pixels.mean(1)).abs().max() < 1e-6
    assert (std - pixels.std(1, correction=0)).abs().max() < 1e-6
    covariance = eigenvectors @ eigenvalues.diag() @ eigenvectors.t()
    assert (covariance - pixels.cov(correction=0)).abs().max() < 1e-6
    assert eigenvalues.diff().max() < 0


def test_any_number_of_processes_makes_the_same_bytes(source, tmp_path):
    for workers in (0, 1, 3):
        pack(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


def test_train_and_val_are_both_packed_with_the_classes_of_train(tmp_path):
    draw(tmp_path / "source" / "train", {"cat": 5, "dog": 4, "eel": 5})
    draw(tmp_path / "source" / "val", {"dog": 2, "eel": 1}, seed=1)
    train, val = pack(tmp_path / "source", tmp_path / "packed")
    assert left(tmp_path / "packed") == ["train", "val"]
    assert train.classes == val.classes == ("cat", "dog", "eel")
    assert val.labels.tolist() == [1, 1, 2]
    assert torch.equal(val.read(torch.tensor([2]))[0], read_image(tmp_path / "source" / "val" / "eel" / "0.png", SIZE))
    refused(tmp_path / "packed", tmp_path / "again", "packed' is packed already, and a folder")
    draw(tmp_path / "source" / "val" / "fox", {"": 1})
    with pytest.raises(DataError, match="class 'fox' of 'val' is none of the 3 classes"):
        pack(tmp_path / "source", tmp_path / "other")
    assert left(tmp_path) == ["packed", "source"]


def test_the_command_says_what_it_does(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bad in ("cat/8.png", *(f"dog/{index}.png" for index in range(5))):
        (source / bad).write_bytes(b"")
    words = ["prepare", "source", "deep/packed", "--size", "8", "--workers", "1", "--skip-bad"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "'source': 18 images of 3 classes\n0.0 MB of disk at 8x8 pixels, " in out
    assert "18 images in 00:0" in out
    assert "images/s\n" in out
    assert "deep/packed': 12 images of 3 classes\n  mean 0.5" in out
    assert "  6 bad images passed over:\n    cat/8.png (of no format that Pillow reads)\n    dog/0.png" in out
    assert "    dog/3.png (of no format that Pillow reads)\n    and 1 more, which dataset.json names\n" in out
    assert main(words) == 0
    assert "deep/packed' is complete: nothing is left to do" in capsys.readouterr().out


# --- what cannot be made ----------------------------------------------------------------------------------------------


def refused(source, destination, message, kind=DataError, **options):
    with pytest.raises(kind, match=message) as caught:
        pack(source, destination, **options)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_packed(source, tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "packed", "there is no folder of images at .*nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "packed", "holds 0 class folders")
    refused(source, source / "packed", "lies in .*source', where it would become a class")
    refused(source, source, "lies in .*source'")
    (source / "fox").mkdir()
    refused(source, tmp_path / "packed", "fox' holds 0 images")
    (source / "fox").rmdir()
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        prepare.prepare(source, tmp_path / "packed", 0)
    assert left(tmp_path) == ["empty", "source"]
    pack(source, tmp_path / "packed")
    refused(tmp_path / "packed", tmp_path / "again", "packed' is packed already, and a folder")


def test_what_is_there_stays_untouched(source, tmp_path):
    packed = tmp_path / "packed"
    pack(source, packed)
    before = contents(packed)
    pack(source, packed)
    with pytest.raises(DataError, match="packed' is there already, and is not made of these files in this size"):
        prepare.prepare(source, packed, 9, workers=0)
    Image.new("RGB", (9, 9)).save(source / "dog" / "0.png")
    refused(source, packed, "is there already, and is not made of these files")
    assert contents(packed) == before
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file", "file' is there already")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    refused(source, tmp_path / "folder", "folder' is there already")
    assert (tmp_path / "folder" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    assert left(tmp_path) == ["file", "folder", "packed", "source"]


def test_an_empty_folder_may_be_the_destination(source, tmp_path):
    (tmp_path / "packed").mkdir()
    pack(source, tmp_path / "packed")
    assert set(contents(tmp_path / "packed")) == FILES


def test_a_damaged_dataset_is_not_taken_for_a_complete_one(source, tmp_path):
    pack(source, tmp_path / "packed")
    (tmp_path / "packed" / "labels.npy").unlink()
    refused(source, tmp_path / "packed", "packed' is damaged: labels.npy is missing")


def test_a_disk_with_too_little_room_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=18 * SLOT))
    refused(source, tmp_path / "packed", "has 0.0 MB free, and 0.0 MB are needed: free some, name another", OSError)
    assert left(tmp_path) == ["source"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=18 * SLOT + 18 * 60))
    pack(source, tmp_path / "packed")
    assert sum(map(len, contents(tmp_path / "packed").values())) < 18 * SLOT + 18 * 60 + 2000


def test_a_second_call_at_the_same_time_is_refused(source, tmp_path, monkeypatch):
    make = chunks.make

    def second(*task):
        refused(source, tmp_path / "packed", "another process is making .*packed': wait for it")
        return make(*task)

    monkeypatch.setattr(chunks, "make", second)
    pack(source, tmp_path / "packed")
    assert left(tmp_path) == ["packed", "source"]


# --- bad images -------------------------------------------------------------------------------------------------------


def test_a_bad_image_stops_with_its_path_and_a_mended_one_goes_on(source, tmp_path, monkeypatch):
    whole = (source / "dog" / "1.png").read_bytes()
    (source / "dog" / "1.png").write_bytes(whole[:60])
    refused(source, tmp_path / "packed", r"source/dog/1.png' is no image, .*: mend it, or pass over .* by --skip-bad")
    assert left(tmp_path) == ["packed.partial", "source"]
    (source / "dog" / "1.png").write_bytes(whole)
    assert go_on(source, tmp_path, monkeypatch) == [2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_passed_over_when_asked_and_counted(workers, source, tmp_path):
    good = {name: read_image(source / name, SIZE) for name in ("dog/1.png", "eel/2.png")}
    for name in ("cat/0.png", "dog/0.png", "dog/5.png"):
        (source / name).write_text("no image")
    refused(source, tmp_path / "packed", "cat/0.png' is no image", workers=workers)
    (data,) = pack(source, tmp_path / "packed", workers=workers, skip_bad=True)
    reason = "of no format that Pillow reads"
    assert data.skipped == [("cat/0.png", reason), ("dog/0.png", reason), ("dog/5.png", reason)]
    assert torch.bincount(data.labels).tolist() == [8, 4, 3]
    read = {data.file_name(index): image for index, image in enumerate(data.read(torch.arange(15)))}
    assert all(torch.equal(read[name], image) for name, image in good.items())
    assert (tmp_path / "packed" / "images.bin").stat().st_size == 18 * SLOT


def test_what_was_passed_over_is_not_passed_over_unasked(source, tmp_path, monkeypatch):
    (source / "cat" / "0.png").write_text("no image")
    (source / "eel" / "0.png").write_text("no image")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            pack(source, tmp_path / "packed", skip_bad=True)
    refused(source, tmp_path / "packed", "cat/0.png' is no image")
    (data,) = pack(source, tmp_path / "packed", skip_bad=True)
    assert len(data) == 16


def test_a_class_whose_images_are_all_bad_is_an_error(source, tmp_path):
    for index in range(3):
        (source / "eel" / f"{index}.png").write_text("no image")
    refused(source, tmp_path / "packed", "all images of class 'eel' of .*source' are bad", skip_bad=True)
    assert not (tmp_path / "packed").exists()


def die(*_):
    os._exit(1)


def test_a_process_that_dies_names_the_files_it_had(source, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_make_alone", die)
    message = "a process died twice of the files 'cat/0.png' to 'cat/3.png' of .*source': one of them"
    refused(source, tmp_path / "packed", message, RuntimeError, workers=1)


# --- stopped and gone on with -----------------------------------------------------------------------------------------


@pytest.fixture
def undisturbed(source, tmp_path):
    pack(source, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


@pytest.fixture
def stopped(source, tmp_path, undisturbed, monkeypatch):
    """A preparation that was stopped when 3 of its 5 chunks were made."""
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            pack(source, tmp_path / "packed")
    return tmp_path / "packed.partial"


def test_what_is_done_is_not_done_again(source, tmp_path, stopped, undisturbed, monkeypatch):
    assert go_on(source, tmp_path, monkeypatch) == [3, 4]
    assert contents(tmp_path / "packed") == undisturbed


def test_chunks_that_do_not_have_their_checksums_are_made_again(source, tmp_path, stopped, undisturbed, monkeypatch):
    images = stopped / "images.bin"
    content = bytearray(images.read_bytes())
    content[5 * SLOT] ^= 1
    images.write_bytes(content[: 8 * SLOT + 100])  # in the third chunk
    assert go_on(source, tmp_path, monkeypatch) == [1, 2, 3, 4]
    assert contents(tmp_path / "packed") == undisturbed


def test_a_chunk_whose_files_have_changed_is_made_again(source, tmp_path, stopped, monkeypatch):
    Image.new("RGB", (9, 9), "red").save(source / "cat" / "5.png")
    assert go_on(source, tmp_path, monkeypatch) == [1, 3, 4]
    (data,) = pack(source, tmp_path / "packed")
    assert data.read(torch.tensor([5]))[0, :, 4, 4].tolist() == [255, 0, 0]


def test_what_does_not_belong_behind_the_images_is_cut_off(source, tmp_path, stopped, undisturbed, monkeypatch):
    with (stopped / "images.bin").open("ab") as file:
        file.write(b"more")
    assert go_on(source, tmp_path, monkeypatch) == [3, 4]
    assert contents(tmp_path / "packed") == undisturbed


def test_a_journal_cut_anywhere_costs_the_chunks_whose_lines_are_cut(
    source, tmp_path, stopped, undisturbed, monkeypatch
):
    whole = (stopped / "journal.txt").read_bytes()
    lines = np.cumsum([len(line) + 1 for line in whole.split(b"\n")])[:4]
    shutil.move(stopped, tmp_path / "kept")
    for cut in (0, 5, *range(lines[0], len(whole), 61), len(whole) - 1):
        shutil.copytree(tmp_path / "kept", stopped)
        (stopped / "journal.txt").write_bytes(whole[:cut])
        kept = max(0, int((lines - 1 <= cut).sum()) - 1)
        assert go_on(source, tmp_path, monkeypatch) == list(range(kept, 5)), cut
        assert contents(tmp_path / "packed") == undisturbed
        shutil.rmtree(tmp_path / "packed")


def test_a_journal_goes_on_after_a_line_that_was_cut(tmp_path):
    made = journal.Made("a stamp", np.arange(3, dtype=np.uint32), chunks.ColourSums.none(), {1: "cut short"})
    with journal.Journal(tmp_path / "journal", "header") as one:
        one.add(7, made)
        one.add(8, made)
    content = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(content[:-9])
    with journal.Journal(tmp_path / "journal", "header") as one:
        assert list(one.made) == [7]
        one.add(9, made)
    with journal.Journal(tmp_path / "journal", "header") as one:
        assert list(one.made) == [7, 9]
        assert one.made[9].reasons == {1: "cut short"}
        assert one.made[9].checksums.tolist() == [0, 1, 2]


def test_what_is_left_of_another_command_is_not_gone_on_with(source, tmp_path, stopped):
    before = contents(stopped)
    message = "packed.partial' is left of another command, and it is of other images, or of another size: remove it"
    with pytest.raises(DataError, match=message):
        prepare.prepare(source, tmp_path / "packed", 9, workers=0)
    (source / "dog" / "0.png").rename(source / "dog" / "zero.png")
    refused(source, tmp_path / "packed", message)
    assert contents(stopped) == before
    shutil.rmtree(stopped)
    stopped.mkdir()
    (stopped / "mine").write_text("mine")
    refused(source, tmp_path / "packed", "packed.partial' is there already")
    assert (stopped / "mine").read_text() == "mine"


DISK = {"mkdir", "truncate", "write", "flush", "fsync", "tofile", "replace", "unlink"}
"""Functions written in C that change what is on the disk."""


def run_until_killed(function, calls):
    """Run a function in a process that is killed when it makes so many of these calls; whether it came to its end."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        assert status in (0, signal.SIGKILL)
        return status == 0
    left = [calls]

    def count(frame, event, argument):
        if event == "c_call" and argument.__name__ in DISK:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(60)
    torch.set_num_threads(1)
    sys.setprofile(count)
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_and_gone_on_with_it_is_as_if_undisturbed(seed, source, tmp_path, undisturbed):
    moments = np.random.default_rng(seed)
    kills = 0
    while not run_until_killed(lambda: pack(source, tmp_path / "packed"), moments.integers(1, 30)):
        kills += 1
        assert not (tmp_path / "packed").exists() or contents(tmp_path / "packed") == undisturbed
    assert kills > 1
    assert contents(tmp_path / "packed") == undisturbed
    assert "packed.partial" not in left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_at_each_moment_of_what_is_left_it_goes_on(source, tmp_path, stopped, undisturbed):
    shutil.move(stopped, tmp_path / "kept")
    moment, whole = 0, False
    while not whole:
        moment += 1
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        shutil.rmtree(stopped, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", stopped)
        whole = run_until_killed(lambda: pack(source, tmp_path / "packed"), moment)
        pack(source, tmp_path / "packed")
        assert contents(tmp_path / "packed") == undisturbed
        assert left(tmp_path) == ["kept", "packed", "source", "undisturbed"]
    assert moment > 25


# --- the command, its processes, and signals --------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    words = ["prepare", str(source), str(tmp_path / "packed"), "--size", "8", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "_answer", interrupted)
        assert main(words) == 130
    assert "stopped; the same command goes on with '" in capsys.readouterr().err
    assert main(words) == 0


def start(*words):
    command = [sys.executable, "-m", "alexnet_triton", "prepare", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored behind a shell's `&`
    )


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def processes_of(session):
    """Those of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux says which processes run")
def test_the_command_is_stopped_and_killed_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.undo()  # the command's chunks are not small
    # Images of which a chunk takes some tenths of a second, so that there is work left when the signals come.
    source, packed = draw(tmp_path / "source", {"cat": 384, "dog": 512}, sides=(180, 220)), tmp_path / "packed"
    pack(source, tmp_path / "undisturbed")

    def done():
        partial = tmp_path / "packed.partial" / "journal.txt"
        return partial.read_bytes().count(b"\n") if partial.exists() else 0

    for _ in range(5):  # once more where the machine was so busy that all was done before the signals came
        process = start(source, packed, "--size", SIZE, "--workers", 2)
        wait_for(lambda process=process: len(processes_of(process.pid)) >= 3 or packed.exists())
        wait_for(lambda: done() >= 1 or packed.exists())
        for _ in range(2):  # as one presses Ctrl-C, impatiently
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.01)
        process.communicate(timeout=60)
        wait_for(lambda process=process: not processes_of(process.pid))
        if not packed.exists():
            break
        shutil.rmtree(packed)
    assert process.returncode
    assert not packed.exists()

    process = start(source, packed, "--size", SIZE, "--workers", 2)
    before = done()
    wait_for(lambda: done() > before or packed.exists())
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not processes_of(process.pid))

    pack(source, packed)
    assert contents(packed) == contents(tmp_path / "undisturbed")
    assert len(open_packed(packed)) == 896
