"""A real Prometheus: the one that is installed, or Debian's package, unpacked without being installed."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

READY_S = 60.0


def tool(name: str) -> Path | None:
    """`prometheus` or `promtool`; fetched once. None if it is neither here nor to be had."""
    if (installed := shutil.which(name)) is not None:
        return Path(installed)
    cache = Path(os.environ.get("PD_SERVE_CACHE", Path.home() / ".cache" / "pd-serve")) / "prometheus"
    path = cache / "usr" / "bin" / name
    if not path.exists() and shutil.which("apt-get") and shutil.which("dpkg"):
        with tempfile.TemporaryDirectory() as folder:
            fetch = ["apt-get", "download", "prometheus"]
            fetched = subprocess.run(fetch, cwd=folder, capture_output=True, timeout=120, check=False)
            for package in Path(folder).glob("prometheus_*.deb"):
                cache.mkdir(parents=True, exist_ok=True)
                subprocess.run(["dpkg", "-x", package, cache], check=True, timeout=120)
            if fetched.returncode:
                return None
    return path if path.exists() else None


class Prometheus:
    """Scrapes every second as the shipped configuration says, but that it looks at `target`."""

    def __init__(self, program: Path, shipped: Path, target: str, folder: Path) -> None:
        text = shipped.read_text(encoding="utf-8")
        assert "127.0.0.1:8000" in text
        assert "scrape_interval: 5s" in text
        text = text.replace("127.0.0.1:8000", target).replace("scrape_interval: 5s", "scrape_interval: 1s")
        (folder / "prometheus.yml").write_text(text, encoding="utf-8")
        shutil.copy(shipped.with_name("alerts.yml"), folder)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its answer: a list of {"metric": labels, "value": [time, text]}."""
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30.0)
        if response.status_code == 503:
            raise httpx.ConnectError("it is not ready")
        answer = response.json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return list(answer["data"]["result"])

    def has_data(self, expression: str) -> bool:
        """Asked again for a while: after a scrape that took too long there is nothing until the next one."""
        for _ in range(20):
            if self.query(expression):
                return True
            time.sleep(0.5)
        return False

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/api/v1/{path}", timeout=30.0).json()["data"]

    def wait_for_scrapes(self, number: int) -> None:
        """Returns when so many have succeeded from now on."""
        deadline = time.monotonic() + READY_S
        begin = time.time()
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not scraped:\n{self.log.read_text()[-2000:]}"
            try:
                found = self.query(f"sum_over_time(up[{int(time.time() - begin) + 1}s])")
                if found and float(found[0]["value"][1]) >= number:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
