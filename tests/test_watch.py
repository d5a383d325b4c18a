"""The watch of a run's processes: each of them a thread here, with a line of its own."""

import functools
import os
import re
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from alexnet_triton.parallel.processes import hub, watch
from alexnet_triton.parallel.processes.watch import ProcessLost, Terminated, Watch

LIMIT = 30
"""Seconds after which a test is taken to hang."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Signs of life come often; and no thread ends the process."""
    monkeypatch.setattr(hub, "PERIOD", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: None)


class Meeting:
    """Where the processes of a test meet: a store in memory."""

    def __init__(self, size, **told):
        self.size, self.store = size, dist.HashStore()
        self.told = {"host": "127.0.0.1", "seconds": 20, "silence": 20, "grace": 20, **told}

    def watch(self, rank):
        return Watch(self.store, rank, self.size, **self.told)

    def run(self, *processes, ranks=None):
        """What functions give or raise, which are called with a watch each, of ranks in order or those given."""
        begun, results = threading.Barrier(len(processes)), [None] * len(processes)

        def one(index, rank, process):
            try:
                with self.watch(rank) as line:
                    line.begun = begun
                    results[index] = process(line)
            except BaseException as error:
                results[index] = error

        places = zip(ranks or range(len(processes)), processes, strict=True)
        threads = [
            threading.Thread(target=one, args=(index, *place), daemon=True) for index, place in enumerate(places)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in threads), "a process hangs"
        return results


def begins(line):
    """Not to hear of an end before all have heard of the beginning."""
    line.meet("cpu")
    line.begun.wait(LIMIT)


def stays(line):
    """Until another is lost, which is the reason to leave by where communication breaks."""
    begins(line)
    return str(line.leave(RuntimeError("Connection closed by peer")))


def leaves_by(error):
    def leaves(line):
        begins(line)
        return line.leave(error)

    return leaves


def hangs_up(line):
    """As the kernel does for a process that is killed."""
    begins(line)
    line._link.socket.shutdown(socket.SHUT_RDWR)


def test_none_goes_on_before_all_have_come_nor_ends_before_all_have():
    before, after = [], []

    def takes_part(line):
        before.append(line.rank)
        line.meet("cpu")
        assert len(before) == 3
        time.sleep(0.05 * line.rank)
        after.append(line.rank)
        line.end()
        assert len(after) == 3

    assert Meeting(3).run(*[takes_part] * 3) == [None] * 3


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_process_that_hangs_up_is_named_in_all_others(who):
    told = Meeting(3).run(*[hangs_up if rank == who else stays for rank in range(3)])
    for rank in {0, 1, 2} - {who}:
        expected = rf"rank {who} of 3 \(process {os.getpid()} on .+\) has ended without a word, killed or by a crash; "
        assert re.fullmatch(expected + "start the run again with --resume, .* checkpoint", told[rank])


def test_what_a_process_failed_with_is_said_in_all_others_by_its_first_line():
    error = ValueError("image 'a.png' cannot be read\nat all")
    first, second, third = Meeting(3).run(stays, leaves_by(error), stays)
    assert second is error
    assert first == third
    assert first.endswith("has failed, and the others end with it: image 'a.png' cannot be read")
    assert first.startswith("rank 1 of 3 (")


def test_a_broken_connection_without_a_reason_is_this_process_s_own(monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    error = RuntimeError("shapes do not fit")

    def goes_on(line):
        begins(line)
        with pytest.raises(ProcessLost, match="rank 0 of 2 .* has failed, .*: shapes do not fit"):
            line.end()

    assert Meeting(2).run(leaves_by(error), goes_on) == [error, None]


def test_an_error_of_a_process_s_own_is_not_taken_for_another_s():
    """Though the other has failed too, of which it has heard."""

    def both(line):
        begins(line)
        with line._news:
            line._news.wait_for(lambda: line._lost)
        own = ValueError("mine")
        return line.leave(own) is own

    assert Meeting(2).run(both, leaves_by(ValueError("yours")))[0] is True


def test_one_that_is_silent_is_given_up_and_its_line_may_be_open_still():
    meeting = Meeting(2, silence=1)

    def is_stopped(line):
        line._link.send = lambda *message: None if message[0] == "alive" else hub.Link.send(line._link, *message)
        begins(line)
        return str(line.leave(RuntimeError()))

    first, _ = meeting.run(stays, is_stopped)
    assert first.startswith("rank 1 of 2 (")
    assert "has given no sign of life for 1 s: it hangs, was stopped, or its machine is gone; start" in first


def test_a_hub_that_is_silent_is_rank_0_s_end(monkeypatch):
    started = threading.Event()

    def is_stopped(line):
        begins(line)
        monkeypatch.setattr(line._hub, "_turn", lambda now: started.wait(LIMIT))
        return None if started.wait(LIMIT) else "never noticed"

    def notices(line):
        begins(line)
        try:
            return str(line.leave(RuntimeError("broken")))
        finally:
            started.set()

    first, second = Meeting(2, silence=1).run(is_stopped, notices)
    assert first is None
    assert second.startswith("rank 0 of 2 (")
    assert "has given no sign of life for 1 s" in second


def test_a_process_that_was_stopped_with_all_the_others_takes_none_for_lost(monkeypatch):
    """As where a laptop sleeps: the clock leaps, and nothing was heard meanwhile."""
    leap, clock = [0.0], time.monotonic
    monkeypatch.setattr(hub.time, "monotonic", lambda: clock() + leap[0])

    def sleeps(line):
        begins(line)
        if line.rank == 0:
            leap[0] = 1000.0
        time.sleep(0.3)
        line.end()

    assert Meeting(2, silence=5).run(sleeps, sleeps) == [None, None]


def test_all_are_refused_where_one_cannot_take_part():
    def complains(line):
        line.meet("cpu", "2 processes are on this machine, and 1 GPU")

    first, second = Meeting(2).run(begins, complains)
    assert str(second) == "2 processes are on this machine, and 1 GPU"
    assert isinstance(first, ProcessLost)
    assert str(first).endswith("cannot take part: 2 processes are on this machine, and 1 GPU")
    assert first.rank == 1


def test_processes_on_devices_of_two_types_are_refused():
    for error in Meeting(2).run(begins, lambda line: line.meet("cuda")):
        assert str(error).startswith("rank 1 of 2 (")
        assert str(error).endswith("computes on cuda, and rank 0 on cpu: give all the same --device")


def test_processes_that_do_not_come_are_counted_and_named():
    for error in Meeting(4, seconds=0.3).run(begins, begins):
        assert re.match(
            r"[12] of 4 processes have come in 0.3 s, and not rank (1, )?2, 3: start as many as", str(error)
        )
        assert error.to_be_said == (error.here == 0)


def test_two_processes_of_one_rank_are_refused():
    errors = Meeting(3).run(*[lambda line: line.meet("cpu")] * 3, ranks=(0, 1, 1))
    assert all("rank 1 of 3" in str(e) and "is there twice: give each process a RANK" in str(e) for e in errors)


def test_one_that_comes_when_all_are_there_does_not_harm_them():
    """As where two runs were given one port."""
    meeting = Meeting(2)

    def goes_on(line):
        begins(line)
        if line.rank == 0:
            with meeting.watch(1) as other, pytest.raises(ProcessLost, match="rank 1 of 2 is there already: give each"):
                other.meet("cpu")
        line.end()

    assert meeting.run(goes_on, goes_on) == [None, None]


def test_a_hub_of_an_earlier_start_is_not_taken_for_this_one_s():
    """torchrun keeps its store when it starts processes again."""
    meeting, came = Meeting(2), []
    get = meeting.store.get

    class Remembers:
        """A store whose first answer is that of the earlier start."""

        set = meeting.store.set

        def get(self, key):
            came.append(key)
            return b'[1, "old", "process 1 on a"]' if len(came) == 1 else get(key)

    meeting.store = Remembers()

    def takes_part(line):
        begins(line)
        line.end()
        return line.token != "old"

    assert meeting.run(takes_part, takes_part) == [True, True]
    assert len(came) > 2


def test_rank_0_that_cannot_be_reached_is_said():
    meeting = Meeting(2, seconds=0.3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    meeting.store.set(watch.KEY, f'[{port}, "", "process 1 on a"]')
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 cannot reach rank 0 at '127.0.0.1' \(.*refused.*\): see what"):
        meeting.watch(1)
    assert not [thread for thread in threading.enumerate() if thread.name in ("Watch", "Hub")]


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b'["done"]\n["done"]\n', b"5\n", b'{"hello": 1}\n', b'["hello", "guess", 1]\n']
)
def test_other_programs_that_speak_to_the_hub_are_not_heard(words):
    def is_visited(line):
        with socket.create_connection(("127.0.0.1", line._hub.port)) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
            begins(line)
            line.end()

    def goes_along(line):
        begins(line)
        line.end()

    assert Meeting(2).run(is_visited, goes_along) == [None, None]


def test_the_hub_listens_where_others_know_its_machine():
    """A machine's own name may mean a loopback address there."""
    for host, addresses in (("127.0.0.1", {"127.0.0.1"}), (socket.gethostname(), {"::", "0.0.0.0"})):
        with hub._server(host) as server:
            assert server.getsockname()[0] in addresses


def test_a_process_that_was_asked_to_stop_waits_for_one_that_still_writes():
    written = []

    def writes(line):
        begins(line)
        time.sleep(0.3)
        written.append(True)
        return line.leave(stop)

    def stops(line):
        begins(line)
        return line.leave(stop), bool(written)

    stop = KeyboardInterrupt("stopped")
    assert Meeting(2).run(writes, stops) == [stop, (stop, True)]


def test_one_that_alone_was_asked_to_stop_tells_the_others_in_the_end():
    stop = KeyboardInterrupt("stopped")
    first, second = Meeting(2, grace=0.2).run(stays, leaves_by(stop))
    assert second is stop
    assert first.endswith("has failed, and the others end with it: stopped")


def test_those_that_are_all_terminated_end_without_a_word(monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    first, second = Terminated(143), Terminated(143)
    assert Meeting(2).run(leaves_by(first), leaves_by(second)) == [first, second]


def test_one_that_is_terminated_since_another_has_died_names_it():
    errors = Meeting(3).run(leaves_by(Terminated(143)), hangs_up, leaves_by(Terminated(143)))
    assert str(errors[0]) == str(errors[2])
    assert "rank 1 of 3 (" in str(errors[0])


@pytest.mark.parametrize(("who", "said"), [(1, [0]), (0, [1, 2]), (2, [0])])
def test_a_process_that_does_not_come_to_its_end_is_ended_and_rank_0_speaks_for_all(who, said, monkeypatch, capfd):
    codes, ended = [], [threading.Event() for _ in range(3)]

    def end(code):
        codes.append(code)
        ended[lines[threading.current_thread()]].set()

    def waits(line):
        """In a call that nothing reaches."""
        lines[line._thread] = line.rank
        begins(line)
        assert ended[line.rank].wait(LIMIT)

    lines = {}
    monkeypatch.setattr(os, "_exit", end)
    results = Meeting(3, grace=0.2).run(*[hangs_up if rank == who else waits for rank in range(3)])
    assert results == [None] * 3
    assert set(codes) == {watch.ABANDONED}
    spoken = set(capfd.readouterr().err.splitlines())
    assert len(spoken) == 1
    assert spoken.pop().startswith(f"alexnet-triton: rank {who} of 3 (")
    assert [rank for rank in range(3) if rank != who and ProcessLost("", who, rank).to_be_said] == said


def test_one_that_fails_and_cannot_leave_is_ended_with_its_own_words(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())

    def fails(line):
        begins(line)
        line.leave(ValueError("image 'a.png' cannot be read"))
        assert ended.wait(LIMIT)

    Meeting(2, grace=0.2).run(stays, fails)
    assert "alexnet-triton: image 'a.png' cannot be read\n" in capfd.readouterr().err


def test_sigterm_leads_out_and_the_signal_is_given_back(request):
    before = lambda number, frame: None  # noqa: E731
    request.addfinalizer(functools.partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, before)))
    with Meeting(1).watch(0) as line:
        line.meet("cpu")
        with pytest.raises(Terminated) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
        assert line.leave(KeyboardInterrupt()).args == ()
        signal.raise_signal(signal.SIGTERM)  # on its way out already
    assert signal.getsignal(signal.SIGTERM) is before
