"""The command line: settings that reach the server, refusals, help, and the output of `inspect`."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from cobatch import __version__
from cobatch.server.cli import app
from cobatch.server.cli.inspect import shape_text
from cobatch.server.settings.schema import MODEL_FIELDS, SERVER_FIELDS, ServerSettings, Settings, flag_name
from tests.support.paths import ROOT


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Return the settings that reached the server, which is replaced and returns status 7 at once."""
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        return 7

    module = ModuleType("cobatch.server.serve")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "cobatch.server.serve", module)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "sum.onnx"
    path.write_bytes(onnx_model("batch"))
    return path


def onnx_model(batch: str | int, columns: str | int = 16) -> bytes:
    """Return a model: total[batch, 1] is the sum of x[batch, columns] over its columns, as float32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, columns])
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch, 1])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    node = helper.make_node("ReduceSum", ["x", "axes"], ["total"])
    graph = helper.make_graph([node], "sum", [x], [total], [axes])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def cobatch(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def refused(result: Result) -> str:
    """Return the only line on stderr."""
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("cobatch: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("cobatch: ").rstrip()


def test_every_setting_has_a_flag() -> None:
    text = cobatch("serve", "--help").stdout
    head, models, server = re.split(r"^(?:Model|Server) options:$", text, flags=re.MULTILINE)
    assert "  --check " in head
    for setting in SERVER_FIELDS:
        assert f"  {flag_name(setting)} " in server
    for setting in MODEL_FIELDS.keys() - {"path", "python"}:
        assert f"  {flag_name(setting)} " in models


def test_defaults_of_switches_are_values_that_variables_take(served: list[Settings], model: Path) -> None:
    text = " ".join(cobatch("serve", "--help").stdout.split())
    assert "which is faster (default: true)" in text
    assert "needs cobatch[otel] (default: false)" in text
    cobatch("serve", model, env={"COBATCH_FAST_PATH": "true", "COBATCH_TRACING": "false"})
    assert served[0].server == ServerSettings()


@pytest.mark.parametrize("command", [(), ("serve",), ("bench",), ("token",), ("token", "init")])
def test_h_is_help(command: tuple[str, ...]) -> None:
    assert cobatch(*command, "-h").stdout == cobatch(*command, "--help").stdout != ""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("cobatch s", ["serve", "simulate"]),
        ("cobatch serve --max-q", ["--max-queue-rows"]),
        ("cobatch token m", ["mint"]),
    ],
)
def test_the_shell_completes_commands_and_flags(words: str, completed: list[str]) -> None:
    env = {"_COBATCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, prog_name="cobatch", env=env)
    assert result.stdout.split() == completed


def test_serve_passes_settings_and_returns_the_servers_status(served: list[Settings], model: Path) -> None:
    result = cobatch("serve", model)
    assert (result.exit_code, result.output) == (7, "")
    assert served[0].server == ServerSettings()
    assert [one.name for one in served[0].models] == ["sum"]


def test_serve_takes_file_variables_and_flags(served: list[Settings], model: Path, tmp_path: Path) -> None:
    config = tmp_path / "cobatch.toml"
    config.write_text(
        "[server]\nport = 1\nlog_level = 'error'\n[[models]]\npath = 'sum.onnx'\nmax_batch_size = 8\n"
    )
    flags = ["--port", "3", "--name", "mine", "--no-fast-path"]
    cobatch("serve", "--config", config, *flags, env={"COBATCH_PORT": "2", "COBATCH_MAX_DELAY_MS": "0.5"})
    assert served[0].server == ServerSettings(port=3, log_level="error", fast_path=False)
    only = served[0].models[0]
    assert (only.name, only.max_batch_size, only.max_delay_ms) == ("mine", 8, 0.5)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--port", "x", "server.port: expected an integer from 0 to 65535, got 'x' (flag --port)"),
        ("--port", "-1", "server.port: expected an integer from 0 to 65535, got '-1' (flag --port)"),
        ("--config", "gone.toml", "config: cannot read gone.toml: No such file or directory (flag --config)"),
        ("--host", "0.0.0.0", "server.host: expected a loopback address"),
    ],
)
def test_refused_settings_are_one_line_and_status_2(
    served: list[Settings], model: Path, flag: str, value: str, expected: str
) -> None:
    result = cobatch("serve", model, flag, value)
    assert result.exit_code == 2
    assert refused(result).startswith(expected)
    assert not served


def test_serve_needs_a_model(served: list[Settings]) -> None:
    result = cobatch("serve")
    assert result.exit_code == 2
    assert refused(result).startswith("models: no model to serve; give MODEL")


def test_check_says_that_settings_are_valid_and_starts_nothing(served: list[Settings], model: Path) -> None:
    result = cobatch("serve", model, "--check", "--name", "mine")
    assert (result.exit_code, result.stdout) == (0, "cobatch: the settings are valid; models: mine\n")
    assert not served


def test_check_reports_every_error_of_every_source(served: list[Settings], tmp_path: Path) -> None:
    config = tmp_path / "cobatch.toml"
    config.write_text(
        """
        [server]
        prot = 1
        tls_cert = "cert.pem"
        [[models]]
        path = "gone.onnx"
        [auth]
        audience = "me"
        api_keys_file = "keys.toml"
        [[auth.issuers]]
        issuer = "a"
        key_files = ["one.pem"]
        [[auth.issuers]]
        issuer = "b"
        secret_file = "secret"
        algorithms = ["HS256"]
        [[auth.tenants]]
        burst = 3
        """
    )
    result = cobatch("serve", "--config", config, "--check", "--slots", "9", env={"COBATCH_PROT": "1"})
    assert result.exit_code == 2
    assert result.stdout == ""
    missing = "No such file or directory"
    assert result.stderr.replace(f"{tmp_path}/", "").splitlines() == [
        "cobatch: COBATCH_PROT: unknown environment variable; did you mean COBATCH_PORT?",
        "cobatch: models[*].slots: expected an integer from 2 to 8, got '9' (flag --slots)",
        "cobatch: server.prot: unknown key; did you mean port? (file cobatch.toml)",
        "cobatch: auth.tenants[0].burst: needs requests_per_s (file cobatch.toml)",
        f"cobatch: server.tls_cert: cannot use cert.pem: {missing} (file cobatch.toml)",
        "cobatch: models[0].path: expected a model file, got 'gone.onnx': no file there (file cobatch.toml)",
        f"cobatch: auth.issuers: cannot read one.pem: {missing} (file cobatch.toml)",
        f"cobatch: auth.issuers: cannot read secret: {missing} (file cobatch.toml)",
        f"cobatch: auth.api_keys_file: cannot read keys.toml: {missing} (file cobatch.toml)",
    ]
    assert not served


def test_check_reports_a_missing_library(
    served: list[Settings], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = cobatch("serve", model, "--check", "--tracing")
    assert result.exit_code == 2
    assert refused(result).startswith("server.tracing: needs OpenTelemetry's libraries")


def test_allow_anonymous_prints_a_warning(served: list[Settings], model: Path) -> None:
    result = cobatch("serve", model, "--allow-anonymous", "--host", "0.0.0.0")
    assert served[0].server.host == "0.0.0.0"
    assert result.stderr == (
        "cobatch: warning: --allow-anonymous: anyone who reaches 0.0.0.0 may call the models, "
        "without authentication\n"
    )
    assert "anyone on this machine" in cobatch("serve", model, "--allow-anonymous").stderr


def test_unknown_flags_are_refused(served: list[Settings], model: Path) -> None:
    result = cobatch("serve", model, "--max-batch", "3")
    assert result.exit_code == 2
    assert "--max-batch-size" in result.stderr


def test_version() -> None:
    assert cobatch("--version").stdout == f"cobatch {__version__}\n"


def test_version_is_the_distributions() -> None:
    try:
        installed = metadata.version("cobatch")
    except metadata.PackageNotFoundError:
        pytest.skip("cobatch is not installed, only on the path")
    assert installed == __version__


HEAVY = ("uvicorn", "starlette", "onnxruntime", "numpy", "rich", "cryptography")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["serve", "--help"], ["serve", "--port", "x"]]
)
def test_help_and_refusals_load_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import contextlib, sys; from cobatch.server.cli import main\n"
        f"sys.argv[1:] = {arguments}\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None): main()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_every_command_is_listed_and_can_be_imported() -> None:
    listed = re.findall(r"^  (\w+) {2,}\w", cobatch("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == [
        *("serve", "inspect", "build", "simulate", "profile", "explain", "trace", "bench", "token")
    ]
    for command in listed:
        assert cobatch(command, "--help").stdout.startswith(f"Usage: root {command} ")
    assert "No such command 'sevre'. Did you mean 'serve'" in cobatch("sevre").stderr


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--port", "x"]])
def test_the_module_and_the_script_are_the_same(arguments: list[str]) -> None:
    script = Path(sys.executable).with_name("cobatch")
    runs = [
        subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        for command in ([script], [sys.executable, "-m", "cobatch"])
    ]
    first, second = ((run.returncode, run.stdout, run.stderr) for run in runs)
    assert first == second
    assert first[0] == (0 if arguments == ["--help"] else 2)


@pytest.mark.parametrize("arguments", [["--version"], ["simulate", "--list"]])
def test_a_full_disk_behind_stdout_is_said(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "cobatch", *arguments]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (
        1,
        "cobatch: cannot write the output: No space left on device\n",
    )


@pytest.mark.parametrize("processes", ["1", "3"])
def test_a_limit_of_processes_that_leaves_no_thread_is_said(model: Path, processes: str) -> None:
    program = (
        "import sys, threading\n"
        'def start(self): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
        "from cobatch.server.cli import main\n"
        "main()\n"
    )
    arguments = ["serve", str(model), "--port", "0", "--processes", processes]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    said = "cobatch: no thread can be started: the limit of processes (pids) is too low\n"
    assert (run.returncode, run.stderr) == (1, said)


def test_inspect_shows_the_signature(model: Path) -> None:
    result = cobatch("inspect", model)
    assert result.exit_code == 0
    heading, batch, batching, _, x, total = result.stdout.splitlines()
    assert heading.split() == ["sum", "onnxruntime_onnx", str(model)]
    assert batch == "batch: axis 0 of every tensor, any number of rows"
    assert batching == "batching: on, proven at load"
    assert x.split() == ["input", "x", "FP32", "float32", "[batch,", "16]"]
    assert total.split() == ["output", "total", "FP32", "float32", "[batch,", "1]"]


def test_inspect_as_json(model: Path) -> None:
    assert json.loads(cobatch("inspect", model, "--json").stdout) == {
        "name": "sum",
        "path": str(model),
        "platform": "onnxruntime_onnx",
        "batch_axis": 0,
        "batch_size": None,
        "batching": "proven",
        "batching_note": "on, proven at load",
        "inputs": [{"name": "x", "datatype": "FP32", "dtype": "float32", "shape": [-1, 16]}],
        "outputs": [{"name": "total", "datatype": "FP32", "dtype": "float32", "shape": [-1, 1]}],
    }


def test_inspect_shows_a_fixed_batch_and_free_axes(tmp_path: Path) -> None:
    model = tmp_path / "fixed.onnx"
    model.write_bytes(onnx_model(4, "columns"))
    text = cobatch("inspect", model).stdout
    assert "axis 0 of every tensor, fixed at 4 rows; fewer are padded" in text
    assert "[4, ?]" in text
    assert json.loads(cobatch("inspect", model, "--json").stdout)["batch_size"] == 4


def test_inspect_shows_a_model_in_python() -> None:
    result = cobatch("inspect", f"{ROOT}/examples/python_models/function.py:count_letters", "--json")
    description = json.loads(result.stdout)
    assert (description["name"], description["platform"]) == ("count_letters", "python")
    assert description["inputs"] == [
        {"name": "text", "datatype": "BYTES", "dtype": "object", "shape": [-1, 1]}
    ]
    assert description["batching"] == "on"


def test_inspect_ignores_the_servers_variables(model: Path) -> None:
    assert cobatch("inspect", model, env={"COBATCH_PORT": "x"}).exit_code == 0


def test_inspect_says_in_one_line_why_a_model_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for path in (broken, tmp_path / "gone.onnx", tmp_path):
        result = cobatch("inspect", path)
        assert result.exit_code == 1
        assert path.name in refused(result)


def test_inspect_refuses_an_unknown_engine(model: Path) -> None:
    result = cobatch("inspect", model, "--engine", "abacus")
    assert result.exit_code == 1
    assert refused(result).startswith("models[*].engine: expected one of auto, onnxruntime, tensorrt")


@pytest.mark.parametrize(
    ("shape", "text"), [([-1], "[batch]"), ([-1, 16], "[batch, 16]"), ([8, -1, 3], "[8, ?, 3]")]
)
def test_shapes(shape: list[int], text: str) -> None:
    assert shape_text(shape) == text
