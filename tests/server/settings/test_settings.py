"""Settings: the order of their sources, and every refusal."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.server.inference.engines import engine_options, places
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import (
    MODEL_FIELDS,
    SERVER_FIELDS,
    ModelSettings,
    ServerSettings,
    Settings,
    env_name,
    flag_name,
)
from cobatch.server.settings.values import SettingsError, is_loopback


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the path of an empty file: settings do not read models."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"")
    return path


def from_file(folder: Path, text: str, environ: Mapping[str, str] | None = None, **flags: object) -> Settings:
    config = folder / "cobatch.toml"
    config.write_text(text)
    return load_settings(config, environ or {}, flags)


def refusal(folder: Path, text: str, environ: Mapping[str, str] | None = None, **flags: object) -> str:
    """Return the first line that these settings are refused with, without the folder's name."""
    return refusals(folder, text, environ, **flags)[0]


def refusals(folder: Path, text: str, environ: Mapping[str, str] | None = None, **flags: object) -> list[str]:
    """Return all of them."""
    with pytest.raises(SettingsError) as caught:
        from_file(folder, text, environ, **flags)
    assert str(caught.value).split("\n") == list(caught.value.messages)
    return [message.replace(f"{folder}/", "") for message in caught.value.messages]


MODELS = '[[models]]\npath = "tiny.onnx"\n'


def test_a_model_alone_is_enough(model: Path) -> None:
    settings = load_settings(None, {}, {"model": model})
    assert settings.server == ServerSettings()
    assert settings.models == (ModelSettings(path=str(model)),)
    assert settings.models[0].name == "tiny"


def test_queue_rows_follow_the_batch_size() -> None:
    assert ModelSettings(path="a").max_queue_rows == 1024
    assert ModelSettings(path="a", max_batch_size=128).max_queue_rows == 2048
    assert ModelSettings(path="a", max_queue_rows=8).max_queue_rows == 8


def test_flags_win_over_variables_over_file_over_defaults(model: Path, tmp_path: Path) -> None:
    text = "[server]\nport = 1\nkeep_alive_s = 1\nlog_level = 'error'\n" + MODELS + "max_batch_size = 1\n"
    environ = {"COBATCH_PORT": "2", "COBATCH_KEEP_ALIVE_S": "2", "COBATCH_MAX_BATCH_SIZE": "2", "PATH": "x"}
    settings = from_file(tmp_path, text, environ, port="3", host=None)
    assert settings.server == ServerSettings(port=3, keep_alive_s=2.0, log_level="error")
    assert settings.models[0].max_batch_size == 2


def test_a_flag_about_models_holds_for_every_model(model: Path, tmp_path: Path) -> None:
    text = MODELS + MODELS + "name = 'other'\nmax_delay_ms = 3\n"
    settings = from_file(tmp_path, text, max_delay_ms="1.5")
    assert [one.max_delay_ms for one in settings.models] == [1.5, 1.5]
    assert [one.name for one in settings.models] == ["tiny", "other"]


def test_a_model_given_replaces_the_files_list(model: Path, tmp_path: Path) -> None:
    text = MODELS + MODELS + "name = 'other'\n"
    settings = from_file(tmp_path, text, model=model, name="mine")
    assert [one.name for one in settings.models] == ["mine"]
    settings = from_file(tmp_path, text, {"COBATCH_MODEL": str(model)})
    assert [one.name for one in settings.models] == ["tiny"]


def test_paths_in_a_file_are_relative_to_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert Path(from_file(tmp_path, MODELS).models[0].path).samefile(model)
    absolute = f'[[models]]\npath = "{model}"\n'
    assert Path(from_file(elsewhere, absolute).models[0].path).samefile(model)
    assert Path(load_settings(None, {}, {"model": "../tiny.onnx"}).models[0].path).samefile(model)


def test_a_model_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is that of the configuration file, or the working directory."""
    (tmp_path / "app.py").touch()
    text = "[[models]]\npython = 'app.py:Model'\n[[models]]\npython = 'pkg.app:Other'\nname = 'mine'\n"
    models = from_file(tmp_path, text, run_in="thread").models
    assert [(one.name, one.python_path, one.run_in) for one in models] == [
        ("Model", str(tmp_path), "thread"),
        ("mine", str(tmp_path), "thread"),
    ]
    monkeypatch.chdir(tmp_path)
    (model,) = load_settings(None, {}, {"model": "app.py:Model"}).models
    assert (model.name, model.python, model.python_path, model.path) == ("Model", "app.py:Model", ".", "")
    (model,) = load_settings(None, {"COBATCH_MODEL": "app:Model"}, {"python_path": "src"}).models
    assert (model.name, model.python_path) == ("Model", "src")


def test_pipelines(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("class Ocr:\n    async def handle(self, page: bytes) -> str: ...\n")
    text = "[[pipelines]]\npython = 'app.py:Ocr'\nprocesses = 2\n"
    text += "[[pipelines]]\npython = 'pkg.app:One'\nname = 'b'\n"
    (tmp_path / "c.toml").write_text(text)
    settings = load_settings(tmp_path / "c.toml", {}, {})
    assert [(one.name, one.python_path, one.processes) for one in settings.pipelines] == [
        ("Ocr", str(tmp_path), 2),
        ("b", str(tmp_path), None),
    ]
    assert settings.names == ["Ocr", "b"]
    assert settings.models == ()


def test_a_class_with_handle_is_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(
        "class Ocr:\n    def handle(self, page: bytes) -> str: ...\n"
        "class Model:\n    def predict(self, batch): ...\n    def handle(self): ...\n"
    )
    settings = load_settings(None, {}, {"model": "app.py:Ocr", "deadline_ms": 5})
    assert [(one.name, one.deadline_ms) for one in settings.pipelines] == [("Ocr", 5.0)]
    assert settings.models == ()
    settings = load_settings(None, {}, {"model": "app.py:Model"})
    assert [one.name for one in settings.models] == ["Model"]
    (tmp_path / "app.py").write_text("class Ocr(\n")  # whatever loads it says why it cannot be read
    assert [one.name for one in load_settings(None, {}, {"model": "app.py:Ocr"}).models] == ["Ocr"]


def test_pipelines_that_are_refused(model: Path, tmp_path: Path) -> None:
    text = (
        f"[[models]]\npath = '{model}'\nname = 'a'\n[[pipelines]]\npython = 'x:a'\n"
        "[[pipelines]]\npython = 'none.py:b'\n[[pipelines]]\nconcurrency = 0\n"
        "[[pipelines]]\npython = 'x:c'\n[[pipelines]]\npython = 'y:c'\n"
    )
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SettingsError) as raised:
        load_settings(tmp_path / "c.toml", {}, {})
    for expected in (
        "pipelines[0].name: 'a' is already a model's name",
        "pipelines[1].python: expected FILE.py:NAME, got 'none.py:b': no file",
        "pipelines[2].concurrency: expected",
        "pipelines[2].python: missing; expected its class or function",
        "pipelines[4].name: 'c' is already another pipeline's name",
    ):
        assert any(message.startswith(expected) for message in raised.value.messages), raised.value.messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "python = 'app.py'",
            "models[0].python: expected FILE.py:NAME or MODULE:NAME, got the text 'app.py'",
        ),
        ("python = 'app.py:a'", "models[0].python: expected FILE.py:NAME, got 'app.py:a': no file '"),
        ("python = 'app:a'\npath = 'tiny.onnx'", "models[0].python: not together with path (file"),
        ("python = 'app:a'\nreload = true\nrun_in = 'thread'", "models[0].reload: not together with run_in"),
        ("python = 'app:a'\nengine = 'tensorrt'", "models[0].engine: not together with python (file"),
    ],
)
def test_a_model_in_python_that_is_refused(model: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        from_file(tmp_path, f"[[models]]\n{text}\n")


def test_the_file_may_be_named_by_a_variable(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "cobatch.toml"
    config.write_text(MODELS)
    assert load_settings(None, {"COBATCH_CONFIG": str(config)}, {}).models[0].name == "tiny"
    with pytest.raises(SettingsError, match=r"cannot read nowhere\.toml.*variable COBATCH_CONFIG"):
        load_settings(None, {"COBATCH_CONFIG": "nowhere.toml"}, {})
    assert load_settings(config, {"COBATCH_CONFIG": "nowhere.toml"}, {}).models[0].name == "tiny"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = 1", "port: unknown key; it belongs in [server] (file cobatch.toml)"),
        ("max_delay_ms = 1", "max_delay_ms: unknown key; it belongs in [[models]] (file cobatch.toml)"),
        ("[sever]", "sever: unknown key; did you mean server? (file cobatch.toml)"),
        ("[zzz]", "zzz: unknown key (file cobatch.toml)"),
        ("[server]\nprot = 1", "server.prot: unknown key; did you mean port? (file cobatch.toml)"),
        ("server = 1", "server: expected a table, got 1 (file cobatch.toml)"),
        ("[server]\nport = '1'", "server.port: expected an integer from 0 to 65535, got the text '1' (file"),
        ("[server]\nport = true", "server.port: expected an integer from 0 to 65535, got true (file"),
        ("[server]\nport = 1.0", "server.port: expected an integer from 0 to 65535, got 1.0 (file"),
        ("[server]\nport = []", "server.port: expected an integer from 0 to 65535, got an array (file"),
        ("[server]\nport = {}", "server.port: expected an integer from 0 to 65535, got a table (file"),
        ("[server]\nkeep_alive_s = nan", "server.keep_alive_s: expected a number from 0 to 86400, got nan"),
        (
            "[server]\nreceive_timeout_s = 0",
            "server.receive_timeout_s: expected a number above 0 and at most 86400, got 0 (file",
        ),
        ("[server]\nfast_path = 1", "server.fast_path: expected true or false, got 1 (file"),
        ("[server]\nhost = ''", "server.host: expected text that is not empty, got the text '' (file"),
        (
            "[server]\nlog_level = 'loud'",
            "server.log_level: expected one of debug, error, info, warning, got the text 'loud' (file",
        ),
        ("[models]", "models: expected an array of tables, written [[models]], got a table (file"),
        ("models = [1]", "models[0]: expected a table, got 1 (file cobatch.toml)"),
        (
            "[[models]]",
            "models[0].path: missing; expected the model's file, ONNX or a TensorRT plan; or else python",
        ),
        (MODELS + "[[models]]\npaht = ''", "models[1].paht: unknown key; did you mean path? (file"),
        (
            MODELS + MODELS + "max_batch_size = -1",
            "models[1].max_batch_size: expected an integer from 0 to 65536, got -1 (file cobatch.toml)",
        ),
        (
            MODELS + "max_batch_size = 0\nbatching = 'on'",
            'models[0].max_batch_size: 0 turns batching off, but batching is "on" (file cobatch.toml)',
        ),
        (
            MODELS + "batching = 'off'\n[[models.pad]]\ninput = 'x'",
            "models[0].batching: not together with pad, which is for rows that share a batch (file",
        ),
        (
            MODELS + "max_batch_size = 0\n[[models.pad]]\ninput = 'x'",
            "models[0].max_batch_size: not together with pad, which is for rows that share a batch (file",
        ),
        (MODELS + "threads = 0", "models[0].threads: expected an integer from 1 to 1024, got 0 (file"),
        (
            MODELS + "name = 'a/b'",
            "models[0].name: expected 1 to 128 letters, digits, '.', '_', '-', the first a letter or digit",
        ),
        (
            MODELS + "[[models]]\npath = 'gone.onnx'",
            "models[1].path: expected a model file, got 'gone.onnx': no file there (file cobatch.toml)",
        ),
        (MODELS + MODELS, "models[1].name: 'tiny' is already models[0]'s name (file cobatch.toml)"),
        ("", "models: no model to serve; give MODEL, or [[models]] in a --config file"),
        ("port = ", "config: cobatch.toml is not TOML: Invalid value (at end of document) (flag --config)"),
    ],
)
def test_a_file_is_refused_by_key_and_expectation(
    model: Path, tmp_path: Path, text: str, expected: str
) -> None:
    assert refusal(tmp_path, text).startswith(expected)


def test_a_folder_is_refused_as_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    message = refusal(tmp_path, "[[models]]\npath = 'tiny'")
    assert message == "models[0].path: expected a model file, got 'tiny': a folder (file cobatch.toml)"


def test_a_mistake_is_refused_even_where_it_would_be_overridden(model: Path, tmp_path: Path) -> None:
    assert "got -1 (file" in refusal(tmp_path, "[server]\nport = -1\n" + MODELS, port="1")
    assert "(environment variable COBATCH_PORT)" in refusal(tmp_path, MODELS, {"COBATCH_PORT": "x"}, port="1")


def test_refusals_name_the_variable_or_the_flag(model: Path, tmp_path: Path) -> None:
    environ = {"COBATCH_MAX_BATCH_SIZE": "many"}
    wanted = "models[*].max_batch_size: expected an integer from 0 to 65536, got 'many'"
    assert refusal(tmp_path, MODELS, environ) == f"{wanted} (environment variable COBATCH_MAX_BATCH_SIZE)"
    assert refusal(tmp_path, MODELS, max_batch_size="many") == f"{wanted} (flag --max-batch-size)"
    missing = refusal(tmp_path, MODELS, model="gone.onnx")
    assert missing == (
        "models[0].path: expected a model file, got 'gone.onnx': no file there (argument MODEL)"
    )
    assert refusal(tmp_path, MODELS, model=str(tmp_path / "cobatch.toml")) == (
        "models[0].path: expected a model file, got 'cobatch.toml'; did you mean --config? (argument MODEL)"
    )
    assert refusal(tmp_path, MODELS, prot=1) == "--prot: unknown flag; did you mean port?"


def test_every_mistake_is_reported(model: Path, tmp_path: Path) -> None:
    text = """
        [sever]
        [server]
        prot = 1
        host = "0.0.0.0"
        keep_alive_s = -1
        tls_key = "key.pem"
        trusted_proxies = "10.0.0.0/8,here"
        [[models]]
        path = "gone.onnx"
        thraeds = 3
        [[models]]
        name = "other"
        [[models]]
        path = "tiny.onnx"
        devices = [-1]
        [[models.pad]]
        axis = 32
        [auth]
        leeway_s = 301
        [[auth.issuers]]
        issuer = "https://a.test"
        algorithm = "RS256"
    """
    environ = {"COBATCH_PROT": "1", "COBATCH_LOG_LEVEL": "loud"}
    found = refusals(tmp_path, text, environ, port="x", allow_anonymous=True, slots="1")
    assert [line.partition(":")[0] for line in found] == [
        *("server.log_level", "COBATCH_PROT", "server.port", "models[*].slots"),
        *("sever", "server.prot", "server.keep_alive_s", "models[0].thraeds", "models[1].path"),
        *("models[2].devices", "models[2].pad[0].axis", "models[2].pad[0].input"),
        *("auth.leeway_s", "auth.issuers[0].algorithm"),
        *("server.allow_anonymous", "server.tls_key", "server.trusted_proxies", "models[0].path"),
    ]


def test_a_mistake_causes_no_other_refusals(model: Path, tmp_path: Path) -> None:
    """A refused value is not also missing, in conflict or of the wrong name."""
    for text in (
        "[models]",
        "[[models]]\npath = 1",
        MODELS + "[server]\nhost = ''",
        MODELS + "[auth]\naudience = 'a'\n[[auth.issuers]]\nissuer = ''",
        MODELS + "[[models.pad]]\ninput = 1",
        "[[models]]\npath = 'g.onnx'\n[auth]\napi_keys_file = 'k'\nmodels = [{model = 'g', scopes = ['s']}]",
        "port = ",
    ):
        assert len(refusals(tmp_path, text)) == 1, text
    assert len(refusals(tmp_path, MODELS + "[[models]]\npath = 'other.onnx'\n", name="mine")) == 2


def test_unknown_variables_are_refused(model: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, MODELS, {"COBATCH_PROT": "1"})
    assert message == "COBATCH_PROT: unknown environment variable; did you mean COBATCH_PORT?"


def test_variables_that_kubernetes_sets_are_explained(model: Path, tmp_path: Path) -> None:
    for variable in ("COBATCH_PORT", "COBATCH_SERVICE_HOST", "COBATCH_PORT_8000_TCP_ADDR"):
        message = refusal(tmp_path, MODELS, {variable: "tcp://10.0.0.1:8000"})
        assert "enableServiceLinks: false" in message


def test_one_name_cannot_be_given_to_several_models(model: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, MODELS + MODELS + "name = 'other'\n", name="mine")
    assert message == "models[*].name: names one model, but there are 2 (flag --name)"


def test_execution_providers(model: Path, tmp_path: Path) -> None:
    options = "[models.provider_options.CUDAExecutionProvider]\ndevice_id = 1\nuse_tf32 = false\n"
    (cuda,) = from_file(tmp_path, MODELS + "providers = ['CUDAExecutionProvider']\n" + options).models
    place = places(cuda)[0]
    given = {"CUDAExecutionProvider": {"device_id": 1, "use_tf32": False}}
    assert engine_options(cuda, place).providers == given
    (two,) = from_file(tmp_path, MODELS, providers="AExecutionProvider,BExecutionProvider").models
    assert list(engine_options(two, place).providers) == ["AExecutionProvider", "BExecutionProvider"]
    for text, why in [
        (options, "provider_options: 'CUDAExecutionProvider' is not among the providers (file"),
        ("providers = ['A']\nengine = 'tensorrt'", "providers: only ONNX Runtime has execution providers"),
        ("providers = ['A']\ndevices = [1]", "devices: not together with providers; set device_id in"),
        ("providers = ['A']\nprovider_options.A = 1", "provider_options: expected a table for each provider"),
    ]:
        assert refusal(tmp_path, MODELS + text).startswith(f"models[0].{why}")


def test_gpus_are_refused_for_onnx_runtime_on_the_cpu(model: Path, tmp_path: Path) -> None:
    why = "ONNX Runtime runs 'tiny' on the CPU; set engine = 'tensorrt' to use GPUs, or instances"
    assert refusal(tmp_path, MODELS, devices="0,1").startswith(f"models[*].devices: {why}")
    chosen = MODELS + "engine = 'onnxruntime'\ndevices = [1]\n"
    assert refusal(tmp_path, chosen).startswith(f"models[0].devices: {why}")
    assert from_file(tmp_path, MODELS, devices="0").models[0].devices == (0,)
    assert from_file(tmp_path, MODELS, devices="0,1", engine="tensorrt").models[0].devices == (0, 1)


def test_a_file_name_unfit_for_urls_needs_a_name(tmp_path: Path) -> None:
    (tmp_path / "my model.onnx").write_bytes(b"")
    text = "[[models]]\npath = 'my model.onnx'\n"
    message = refusal(tmp_path, text)
    assert message.startswith("models[0].name: expected 1 to 128 letters")
    assert message.endswith("got the text 'my model' (the file's name; set name)")
    assert from_file(tmp_path, text, name="mine").models[0].name == "mine"


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^config: cannot read .*: Is a directory \(flag --config\)$"):
        load_settings(tmp_path, {}, {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"ab\xff")
    with pytest.raises(SettingsError, match=r"binary\.toml is not UTF-8: byte 2 \(flag --config\)$"):
        load_settings(binary, {}, {})


def test_other_hosts_need_allow_anonymous(model: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, "[server]\nhost = '0.0.0.0'\n" + MODELS)
    assert message.startswith("server.host: expected a loopback address (127.0.0.0/8, ::1 or localhost), ")
    assert "got '0.0.0.0' (file cobatch.toml)" in message
    assert message.endswith("--allow-anonymous permits that")
    open_to_all = from_file(tmp_path, MODELS, {"COBATCH_ALLOW_ANONYMOUS": "true"}, host="0.0.0.0")
    assert open_to_all.server.host == "0.0.0.0"
    assert refusal(tmp_path, "[server]\nallow_anonymous = true\n" + MODELS, host="::", allow_anonymous=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.9", "::1", "localhost", "LOCALHOST"])
def test_loopback_hosts(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.168.1.1", "128.0.0.1", "example.org", "localhost.example.org", "127.1", "0"],
)
def test_other_hosts(host: str) -> None:
    assert not is_loopback(host)


def test_the_variable_of_other_commands_is_ignored(model: Path) -> None:
    flags = {"model": model}
    assert load_settings(None, {"COBATCH_TOKEN": "t"}, flags) == load_settings(None, {}, flags)


def test_server_and_model_settings_have_different_names() -> None:
    assert not SERVER_FIELDS.keys() & MODEL_FIELDS.keys()
    assert env_name("max_batch_size") == "COBATCH_MAX_BATCH_SIZE"
    assert flag_name("max_batch_size") == "--max-batch-size"


def test_settings_are_immutable() -> None:
    with pytest.raises(AttributeError):
        ServerSettings().port = 1  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"prot": 1}, ServerSettings)


servers = st.builds(
    ServerSettings,
    port=st.integers(0, 65535),
    keep_alive_s=st.floats(0, 86_400),
    receive_timeout_s=st.floats(0, 86_400, exclude_min=True),
    max_body_bytes=st.integers(1, 2**31 - 1),
    log_level=st.sampled_from(["debug", "info", "warning", "error"]),
    access_log=st.sampled_from(["off", "text", "json"]),
    trace_sample=st.floats(0, 1),
    trace_endpoint=st.sampled_from([None, "http://collector:4318"]),
    fast_path=st.booleans(),
)


@given(server=servers)
def test_file_variables_and_flags_give_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, server: ServerSettings
) -> None:
    folder = tmp_path_factory.mktemp("ways")
    model = folder / "tiny.onnx"
    model.write_bytes(b"")
    values = msgspec.structs.asdict(server)
    text = {key: as_text(value) for key, value in values.items() if value is not None}
    quoted = {key: f"'{text[key]}'" if isinstance(values[key], str) else text[key] for key in text}
    table = "".join(f"{key} = {value}\n" for key, value in quoted.items())
    by_file = from_file(folder, "[server]\n" + table, model=model)
    by_variable = load_settings(None, {env_name(key): value for key, value in text.items()}, {"model": model})
    by_flag = load_settings(None, {}, {**text, "model": model})
    assert by_file.server == by_variable.server == by_flag.server == server


def as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    st.lists,
    max_leaves=4,
)


@given(setting=st.sampled_from(sorted(SERVER_FIELDS | MODEL_FIELDS)), value=anything)
def test_any_flag_value_is_accepted_or_refused_by_name(setting: str, value: object) -> None:
    try:
        settings = load_settings(None, {}, {"model": __file__, setting: value})
    except SettingsError as error:
        refused = str(error)
    else:
        refused = ""
        holder = settings.server if setting in SERVER_FIELDS else settings.models[0]
        taken = getattr(holder, setting)
        assert not isinstance(taken, float) or math.isfinite(taken)
    assert not refused or flag_name(setting) in refused
