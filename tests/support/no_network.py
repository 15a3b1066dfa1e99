"""Run commands in a network namespace without a network, and record what they want of sockets."""

import os
import shutil
import subprocess
import sys

# Writes every use of a socket by Python code into the file of the first argument.
_RECORD = """
import sys
log = open(sys.argv.pop(1), "a", buffering=1)
watched = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")
sys.addaudithook(lambda event, details: event in watched and print(event, details, file=log))
"""
_PROGRAM = "import runpy; runpy.run_module('ichprog', run_name='__main__')"
_LIBRARY = "from ichprog.cli import main; main()"  # without the shortcuts of a process that runs one command


def run_without_network(folder, *command, as_program=True):
    """Run a command of ichprog in a folder that is also its home; with a network if there is no such namespace.

    Args:
        folder: The folder.
        command: Arguments of the command.
        as_program: Whether to run the program `ichprog`, or the same functions in a Python program.

    Returns:
        The completed process, and one line for each use of a socket.
    """
    log = folder / "sockets.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ICHPROG_"))}
    prefix = namespace()
    environment |= {} if prefix else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    code = _RECORD + (_PROGRAM if as_program else _LIBRARY)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, log, *map(str, command)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, log.read_text().splitlines()


def namespace():
    """Return the command that runs another one without a network; empty if this machine has none."""
    for option in ("-rn", "-n") if shutil.which("unshare") else ():
        if subprocess.run(["unshare", option, "true"], capture_output=True, check=False).returncode == 0:
            return ["unshare", option]
    return []
