"""A pytest plugin: tests marked ``gpu`` run in a child process that can be replaced.

After a CUDA error (an illegal address, a trap) every later CUDA call of the process fails too, so
one wrong kernel would fail the rest of the run. Here the test that poisons, kills or hangs its
process fails alone: the next one gets a new process. The summary names the first failing problem
of each list.

The child is a pytest of its own, which collects the files that hold such tests, once: conftests are
read by the first collection of a session alone. With pytest-xdist every worker has one child.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

MARKER = "gpu"
SECONDS_PER_TEST = 600.0  # a kernel that waits for ever ends its process, not the run
CHILD = "VIDEO_ATTN_TEST_CHILD"  # a child tells itself by it, and starts none
HERE = Path(__file__).resolve()


class GpuProcesses:
    """The parent's side: hands tests over, logs the reports that come back."""

    def __init__(self, config: pytest.Config, seconds: float = SECONDS_PER_TEST) -> None:
        self._config, self._seconds = config, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: multiprocessing.connection.Connection | None = None
        self._starting = False
        self._files: list[str] = []
        self._outcomes: dict[str, list[tuple[str, bool]]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        marked = (item for item in session.items if item.get_closest_marker(MARKER))
        self._files = list(dict.fromkeys(str(item.path) for item in marked))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if item.get_closest_marker(MARKER) is None or item.get_closest_marker("skip"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        following = "" if nextitem is None else nextitem.nodeid
        for report in self._run(item, following):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # What an earlier test of this process left set up for its neighbours.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def _run(self, item: pytest.Item, following: str) -> list[pytest.TestReport]:
        if self._process is None:
            self._start()
        process, connection = self._process, self._connection
        assert process is not None and connection is not None
        try:
            if self._starting:
                connection.send(self._files)
                connection.recv()
                self._starting = False
            connection.send((item.nodeid, following))
            if not connection.poll(self._seconds):
                self._stop()
                return [_failure(item, f"the test did not end within {self._seconds:g} seconds")]
            data, poison = connection.recv()
        except (EOFError, OSError):
            code = process.wait()
            self._stop()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return [_failure(item, f"the process of this test died: {how}")]
        if poison:
            self._stop()
        if isinstance(data, str):
            return [_failure(item, data)]
        make = self._config.hook.pytest_report_from_serializable
        return [make(config=self._config, data=each) for each in data]

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        command = [
            sys.executable, str(HERE), str(theirs.fileno()), str(self._config.rootpath),
            str(self._config.inipath or ""),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()],
            env={**os.environ, CHILD: "1", "PYTEST_ADDOPTS": ""},
            stdout=subprocess.DEVNULL, cwd=self._config.rootpath,
        )  # fmt: skip
        self._starting = True
        theirs.close()

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def pytest_sessionfinish(self) -> None:
        self._stop()

    # -- the first failing problem of each list ---------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        function, bracket, problem = report.nodeid.partition("[")
        if bracket and (report.when == "call" or report.failed):
            self._outcomes.setdefault(function, []).append((problem[:-1], report.failed))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = list(self.first_failures())
        if lines:
            terminalreporter.section("first failing problem of each list")
            for line in lines:
                terminalreporter.write_line(line)

    def first_failures(self) -> Iterator[str]:
        for function, outcomes in self._outcomes.items():
            wrong = [problem for problem, failed in outcomes if failed]
            if wrong:
                yield f"{function}: {len(wrong)} of {len(outcomes)}, first {wrong[0]}"


def _failure(item: pytest.Item, message: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid, location=item.location, keywords={}, outcome="failed",
        longrepr=message, when="call", duration=0.0,
    )  # fmt: skip


class Child:
    """The child's side: runs what it is asked to, and says when its process is no good any more."""

    def __init__(self, connection: multiprocessing.connection.Connection) -> None:
        self._connection = connection
        self._poison: str | None = None
        self._trouble = ""

    def pytest_addhooks(self, pluginmanager: pytest.PytestPluginManager) -> None:
        pluginmanager.add_hookspecs(Hooks)

    def pytest_collection(self) -> bool:
        return True

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {x.nodeid: x for x in session.perform_collect(self._connection.recv())}
        self._connection.send("ready")
        while True:
            try:
                wanted, following = self._connection.recv()
            except EOFError:
                return True
            if wanted not in items:  # an import that works in the parent alone
                self._connection.send((self._trouble or "the child did not collect it", None))
                continue
            item = items[wanted]
            session._setupstate.teardown_exact(item)  # the one that followed may have run elsewhere
            reports = runtestprotocol(item, log=False, nextitem=items.get(following))
            to_data = session.config.hook.pytest_report_to_serializable
            data = [to_data(config=session.config, report=each) for each in reports]
            self._connection.send((data, self._poison))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._trouble = f"the child cannot collect {report.nodeid}: {report.longreprtext}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        """A test that leaves a poisoned process behind has failed, whatever it says itself."""
        report = yield
        if call.when == "call" and not report.skipped:
            self._poison = item.config.hook.pytest_process_poison()
            if self._poison and report.passed:
                report.outcome, report.longrepr = "failed", self._poison
            elif self._poison:
                report.sections.append(("the process cannot go on", self._poison))
        return report


class Hooks:
    @pytest.hookspec(firstresult=True)
    def pytest_process_poison(self) -> str | None:
        """Why this process can run no further test, or None."""


class CudaPoison:
    @pytest.hookimpl(trylast=True)
    def pytest_process_poison(self) -> str | None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return None
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None


def main() -> int:
    descriptor, root, ini = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.path.remove(str(HERE.parent))  # pytest decides what is importable
    connection = multiprocessing.connection.Connection(descriptor)
    options = ["--rootdir", root, "-m", "", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += ["-c", ini] if ini else []
    return int(pytest.main(options, plugins=[Child(connection), CudaPoison()]))


if __name__ == "__main__":
    raise SystemExit(main())
