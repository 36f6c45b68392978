"""Parts of a self-test that go wrong, each in a way of its own."""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path


def passes(context):
    print("words on stdout")
    context.check(True, "never seen")
    context.note(f"after {', '.join(context.settings.passed) or 'nothing'}")


def fails(context):
    context.check(False, "one and one are three")
    context.check(True, "never seen")


def raises(context):
    context.check(True, "never seen")
    raise ZeroDivisionError("by nought")


def crashes(context):
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def is_killed(context):
    context.check(True, "never seen")
    context.save(complete=False)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def writes_garbage(context):
    print("\x00 garbage \xff")
    sys.stdout.flush()
    Path(context.settings.result).write_bytes(b"\xff{not json")
    os._exit(0)


def skips(context):
    context.skip("there is no such tool")


def shares(context):
    mine = context.mine(list(range(5)))
    context.data["items"] = mine
    context.data["sum"] = sum(mine)
    context.check(True, "never seen")
    print(json.dumps(mine))


def kills_the_runner(context):
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()  # until this process dies with its parent


def stops_the_runner(context):
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
