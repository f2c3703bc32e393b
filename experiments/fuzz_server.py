"""Runs a checkout's programs as forked processes, so that torch is imported only once.

    python -P experiments/fuzz_server.py CODE       # requests on stdin, answers on stdout

A request is a line of JSON: program (a module, "pretrain" or "images.convert"), flags, stdout and
stderr (paths), environment (to add), seconds, memory and file_size (limits, or null). The answer:
status (negative: the signal that ended it; null: it did not end in time). Imports nothing of this
repository, because CODE may be another version of it. Started and used by experiments.fuzz.
"""

import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback


def child(request, code):
    """What a forked process does: the program's `if __name__ == "__main__"`. Does not return."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    for limit, name in ((resource.RLIMIT_AS, "memory"), (resource.RLIMIT_FSIZE, "file_size")):
        if request[name]:
            resource.setrlimit(limit, (request[name], request[name]))
    status, module = 0, request["program"]
    sys.argv = [os.path.join(code, module), *request["flags"]]
    try:
        sys.modules.pop(module, None)  # or runpy warns that it was imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else stopped.code is not None
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def answer(request, code):
    """Run one request; return its exit status, or None after killing it at its time limit."""
    process, end = os.fork(), time.monotonic() + request["seconds"]
    if process == 0:
        child(request, code)
    status = 0, 0
    while status[0] == 0 and time.monotonic() < end:
        time.sleep(0.002)
        status = os.waitpid(process, os.WNOHANG)
    with contextlib.suppress(OSError):  # its loader processes too
        os.killpg(process, signal.SIGKILL)
    if status[0] == 0:
        os.waitpid(process, 0)
        return None
    return os.waitstatus_to_exitcode(status[1])


def main():
    """Import the scripts' modules, then answer requests until stdin ends."""
    code, answers = sys.argv[1], os.dup(1)
    os.dup2(2, 1)
    sys.path.insert(0, code)
    # torch._dynamo: what making an optimizer imports, for a second or more
    for name in ("train_tokenizer", "pretrain", "finetune_cls", "finetune_seg", "torch._dynamo"):
        importlib.import_module(name)
    for line in sys.stdin:
        os.write(answers, json.dumps(answer(json.loads(line), code)).encode() + b"\n")


if __name__ == "__main__":
    main()
