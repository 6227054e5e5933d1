"""A process that has imported everything and forks a run for every request, which saves seconds of imports each.

Requests and answers are lines of JSON on stdin and stdout. A run is what `python script.py ...` would be: a process
with its own session, its own exit, and all that its end entails. With several processes, the first one only starts
and watches the others, as a launcher does.
"""

import atexit
import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("pretrain_mae", "finetune_classifier", "finetune_segmentation")
GRACE_S = 5  # between asking the processes beside a failed one to end, and ending them


def serve() -> dict:
    """Answer requests until stdin closes; returns in a forked child, with what it is to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    os._exit(0)


def detach(output: str) -> None:
    """Leave the zygote's session and its pipes; what the run prints goes into a file."""
    os.setsid()
    for name, flags, targets in ((os.devnull, os.O_RDONLY, [0]), (output, os.O_WRONLY | os.O_CREAT, [1, 2])):
        descriptor = os.open(name, flags | os.O_APPEND, 0o644)
        for target in targets:
            os.dup2(descriptor, target)
        os.close(descriptor)


def launch(count: int, port: int) -> None:
    """Start `count` processes and watch them; returns in each of them."""
    ranks = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return
        ranks.add(pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in ranks])
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
            signal.alarm(GRACE_S)
    os._exit(int(failed))


def prepare(request: dict) -> None:
    """Become the process that the request describes."""
    detach(request["output"])
    os.environ |= request["environment"]
    if request["num_processes"] > 1:
        launch(request["num_processes"], request["port"])


def run(request: dict) -> None:
    script = importlib.import_module(request["script"])
    injections = importlib.import_module("faults.injections")
    for name, options in request["faults"]:
        getattr(injections, name)(**options)
    sys.argv = [f"{request['script']}.py", *request["arguments"]]
    script.main(script.parse_args(request["arguments"]))


def run_and_exit(request: dict) -> None:
    """Run, and end as Python does, but for taking down all modules, which takes a fork seconds of copied pages."""
    code = 1
    try:
        run(request)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs heed one that is ignored, as where nohup started the tests
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if len(sys.argv) > 1:  # a real launcher started this one process, for the request in a file
        run(json.loads(Path(sys.argv[1]).read_text()))
    else:
        for module in (*SCRIPTS, "faults.injections"):
            importlib.import_module(module)
        print(json.dumps("ready"), flush=True)
        mine = serve()
        prepare(mine)
        run_and_exit(mine)
