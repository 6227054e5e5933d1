"""Interruptions: real signals at this process and at another, and the clock."""

import multiprocessing
import os
import signal
import time

import pytest
from accelerate import Accelerator

from training import signals
from training.checkpoints import Checkpoints
from training.signals import GO_ON, SAVE, STOP, Interruptions


def test_signals_and_the_clock_ask_to_stop_and_to_save(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    interruptions = Interruptions(accelerator, checkpoints, save_minutes=1)
    assert interruptions.agree() == GO_ON
    checkpoints.saved_at -= 61
    assert interruptions.agree() == SAVE
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # passed on a second time: still one request
    assert interruptions.agree() == STOP and interruptions.name == "SIGUSR1"
    interruptions.close()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == handlers


def test_closing_terminal_is_ignored_where_nohup_says_so(tmp_path):
    accelerator, before = Accelerator(cpu=True), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interruptions = Interruptions(accelerator, Checkpoints(accelerator, tmp_path, 2), 0)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruptions.agree() == GO_ON and interruptions.name is None
        interruptions.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def ask_twice(experiment, say) -> None:
    accelerator = Accelerator(cpu=True)
    interruptions = Interruptions(accelerator, Checkpoints(accelerator, experiment, 2), 0)
    os.kill(os.getpid(), signal.SIGTERM)
    interruptions.asked_at -= 2 * signals.ONE_REQUEST_S
    say.send("asked")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    say.send("still here")


def test_second_signal_ends_the_process_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")  # a process in milliseconds; a new one imports torch for seconds
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=ask_twice, args=(tmp_path, theirs))
    process.start()
    theirs.close()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert ours.recv() == "asked"
    with pytest.raises(EOFError):
        ours.recv()
