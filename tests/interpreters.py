"""Programs in interpreters of their own, which start in a moment: forks of one that has imported torch and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

# The given paths come before the installed packages, of which no ``.pth`` file is read: no editable install.
PATHS = """
import site, sys
def see(paths, packages):
    for path in paths: site.addsitedir(path)
    sys.path.append(packages)
"""
SERVER = f"""{PATHS}
import json, os, signal
before, packages = list(sys.path), sys.argv.pop()
sys.path.append(packages)
import torch
for line in sys.stdin:
    request = json.loads(line)
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for fd, path in enumerate(request["files"], 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
signal.alarm(request["timeout"])
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
sys.path[:] = before
see(request["paths"], packages)
exec(compile(request["program"], "<string>", "exec"), {{"__name__": "__main__", "sys": sys}})
"""


class Interpreters:
    """Calls run a program and wait for it; without `os.fork`, or when asked for, in a process made from nothing."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self,
        program: str,
        *paths: Path,
        cwd: Path,
        env: Mapping[str, str],
        fresh: bool = False,
        timeout: int = 600,
    ) -> subprocess.CompletedProcess[str]:
        given, packages = [str(path) for path in paths], sysconfig.get_paths()["purelib"]
        if fresh or not hasattr(os, "fork"):
            whole = f"{PATHS}\nsee({given!r}, {packages!r})\n{program}"
            return subprocess.run(
                [sys.executable, "-S", "-c", whole],
                cwd=cwd,
                env=env,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-S", "-c", SERVER, packages],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            request = {
                "program": program,
                "paths": given,
                "cwd": str(cwd),
                "env": dict(env),
                "files": files,
                "timeout": timeout,
            }
            print(json.dumps(request), file=self._server.stdin, flush=True)
            returncode = int(self._server.stdout.readline())
            written = [Path(file).read_text() for file in files]
        return subprocess.CompletedProcess([program], returncode, *written)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
