"""What the transformers backend needs, where it loads, and what of a folder it will not touch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phirt.backends.transformers import TransformersBackend, adapter
from phirt.backends.transformers.devices import check_device
from phirt.backends.transformers.model import TransformersModel, translate
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    ModelFormatError,
    OutOfMemoryError,
    SessionClosedError,
    UnsupportedModelError,
)
from phirt.models.folder import read_folder
from phirt.protocols import Accept, LoadOptions, Reject
from phirt.testing import write_tiny_checkpoint
from tests.backends.transformers_models import artifact_of, edit_config, load, oracle
from tests.installed import require

require("torch", "transformers")
torch = import_module("torch")
transformers = import_module("transformers")

pytestmark = pytest.mark.oracle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama of its own, for a test that spoils it."""
    return write_tiny_checkpoint(tmp_path / "model", "llama")


def _renamed(network: Any, name: str) -> tuple[Any, list[str]]:
    """A network that has another name for its cache, and the kinds of caches it is given."""
    forward, kinds = network.forward, []
    [own] = {"cache", "past_key_values"} & set(signature(forward).parameters)

    def renamed(**arguments: Any) -> Any:
        cache = arguments.pop(name)
        kinds.append(type(cache).__name__)
        return forward(**{own: cache}, **arguments)

    vars(renamed)["__signature__"] = Signature([Parameter(name, Parameter.KEYWORD_ONLY)])
    network.forward = renamed
    return network, kinds


class TestPlacement:
    def test_is_read_from_the_parameters(self, folder: Path) -> None:
        llama = load(folder)
        assert llama.placement().device == llama.placement().provider == "cpu"

    def test_weights_on_two_devices_are_refused(self, folder: Path) -> None:
        network = oracle(folder)
        network.lm_head.to("meta")
        held = read_folder(folder, formats=("safetensors",))
        size = sum(parameter.nbytes for parameter in network.parameters())
        share = network.lm_head.weight.nbytes / size
        with pytest.raises(DevicePlacementError, match=f"{share:.1%} of the weights .* on meta"):
            TransformersModel(torch, transformers, network, folder=held, device="cpu", threads=None)

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "metal"])
    def test_weights_on_the_cpu_are_on_no_other_device(
        self, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What torch offers is there, and the weights are not on it."""
        cpu = torch.device("cpu")
        monkeypatch.setattr(adapter, "check_device", lambda torch, device: cpu)
        message = f"'{device}' was asked for, but 100.0% of the weights .* on cpu"
        with pytest.raises(DevicePlacementError, match=message):
            TransformersBackend().load(artifact_of(folder), device, LoadOptions())

    def test_a_first_result_elsewhere(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = TransformersModel.forward

        def elsewhere(self: TransformersModel, *args: Any, **options: Any) -> Any:
            return forward(self, *args, **options).to("meta")

        monkeypatch.setattr(TransformersModel, "forward", elsewhere)
        with pytest.raises(DevicePlacementError, match=r"% of the first result .* on meta"):
            load(folder)

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "metal", "gpu"])
    def test_a_device_that_torch_does_not_find_is_an_error(
        self, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for kind in ("cuda", "xpu", "backends.mps"):
            monkeypatch.setattr(f"torch.{kind}.is_available", lambda: False)
        with pytest.raises(DeviceNotAvailableError, match=r"offers: cpu\."):
            TransformersBackend().load(artifact_of(folder), device, LoadOptions())

    @pytest.mark.parametrize("device", ["npu", "directml", "cpu:1"])
    def test_a_device_that_torch_has_no_name_for_is_rejected(
        self, folder: Path, device: str
    ) -> None:
        artifact = artifact_of(folder)
        assert isinstance(TransformersBackend().accepts(artifact, device), Reject)
        assert isinstance(TransformersBackend().accepts(artifact, "cpu"), Accept)

    def test_devices_are_listed_as_phirt_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def module(count: int) -> SimpleNamespace:
            return SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count)

        fake = SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda="13.0", hip=None, xpu=None),
            cuda=module(2),
            xpu=module(0),
            backends=SimpleNamespace(mps=module(1)),
            device=lambda *parts: parts,
        )
        monkeypatch.setitem(sys.modules, "torch", fake)
        names = [found.device for found in TransformersBackend().probe()]
        assert names == ["cpu", "cuda:0", "cuda:1", "metal"]
        assert check_device(fake, "cuda:1") == ("cuda", 1)
        assert check_device(fake, "metal") == ("mps",)
        with pytest.raises(DeviceNotAvailableError, match=r"finds 2 devices .* cuda:1, metal"):
            check_device(fake, "cuda:2")


class TestNativeErrors:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        ],
    )
    def test_failed_allocations_are_out_of_memory(self, error: Exception) -> None:
        assert isinstance(translate(error, "running 3 tokens"), OutOfMemoryError)

    def test_any_other_names_what_was_done_and_what_was_raised(self) -> None:
        error = translate(RuntimeError("expected scalar type\nat line 3"), "running 3 tokens")
        assert isinstance(error, BackendRuntimeError)
        assert str(error).endswith("while running 3 tokens: RuntimeError: expected scalar type")


class TestInstallation:
    def test_a_probe_imports_neither_torch_nor_transformers(self) -> None:
        """Where torch is built for the CPU alone; they take seconds to import."""
        if torch.version.cuda or torch.version.hip or torch.version.xpu:
            pytest.skip("this torch is built for an accelerator, which may be here")
        code = (
            "import sys; from phirt.backends.transformers import TransformersBackend as B; "
            "[found] = B().probe(); print(found.device, found.status, found.reason); "
            "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("cpu found transformers 5.")

    @pytest.mark.parametrize("package", ["torch", "transformers"])
    def test_a_missing_package_is_named_with_the_extra(
        self, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from importlib import metadata

        def version(name: str) -> str:
            if name == package:
                raise metadata.PackageNotFoundError(name)
            return "5.23.0"

        monkeypatch.setattr(metadata, "version", version)
        [found] = TransformersBackend().probe()
        assert found.status == "missing"
        with pytest.raises(BackendNotInstalledError, match=rf"'{package}'.*phirt\[torch\]"):
            load(folder)

    def test_an_old_transformers_is_named_with_the_command(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _: "5.22.1")
        [found] = TransformersBackend().probe()
        assert found.status == "broken"
        with pytest.raises(BackendBrokenError, match=r'pip install "transformers>=5.23"'):
            load(folder)

    def test_an_unknown_setting_is_refused(self, folder: Path) -> None:
        for extra in ({"attn_implementation": "someone/kernel"}, {"trust_remote_code": True}):
            with pytest.raises(ValueError, match="has no setting"):
                load(folder, extra=extra)

    def test_its_settings_are_honoured(self, folder: Path) -> None:
        extra = {"attn_implementation": "eager", "dtype": "bfloat16"}
        model: Any = load(folder, extra=extra)
        assert model.network.config._attn_implementation == "eager"
        assert model.network.dtype == torch.bfloat16


class TestTheFolderIsData:
    def test_m2_no_code_of_the_folder_runs(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        planted = folder / "ran"
        code = f"open({str(planted)!r}, 'w')\n"
        (folder / "custom_generate").mkdir()
        for name in ("modeling.py", "configuration.py", "custom_generate/generate.py"):
            (folder / name).write_text(code)
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": 319, "custom_generate": "custom_generate", "seed": "x"})
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "Planted",
                    "auto_map": {"AutoTokenizer": ["modeling.Planted", None]},
                }
            )
        )
        edit_config(
            folder,
            auto_map={
                "AutoConfig": "configuration.Planted",
                "AutoModelForCausalLM": "modeling.Planted",
            },
            attn_implementation="someone/kernel",
            _attn_implementation="someone/kernel",
            experts_implementation="someone/kernel",
            transformers_weights="planted.bin",
            fusion_config={"planted": True},
            use_kernels=True,
            output_hidden_states=True,
        )
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went online"))
        model: Any = load(folder)
        model.new_session(max_length=8, expected_length=8).prefill([1, 2])
        assert not planted.exists()
        assert not [name for name in sys.modules if name.startswith("transformers_modules")]
        assert model.network.config._attn_implementation == "sdpa"
        assert not model.network.config.output_hidden_states
        assert capfd.readouterr() == ("", "")

    def test_m3_a_pickle_beside_the_safetensors_is_not_opened(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
        load(folder).close()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"quantization_config": {"quant_method": "planted"}}, "quantized"),
            ({"architectures": ["LlamaForTokenClassification"]}, "no causal language model"),
            ({"is_encoder_decoder": True}, "encoder"),
        ],
    )
    def test_what_is_no_plain_decoder_is_rejected(
        self, folder: Path, change: dict[str, Any], reason: str
    ) -> None:
        artifact = artifact_of(folder)
        edit_config(folder, **change)
        verdict = TransformersBackend().accepts(artifact, "cpu")
        assert isinstance(verdict, Reject)
        assert reason in verdict.reason
        with pytest.raises(UnsupportedModelError, match=reason):
            TransformersBackend().load(artifact, "cpu", LoadOptions())

    def test_an_adapter_is_rejected(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
        with pytest.raises(UnsupportedModelError, match="PEFT adapter"):
            load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": 128},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 1000},
            {"vocab_size": 10**6},
            {"n_experts": 10**12},
            {"rope_scaling": {"rope_type": "planted"}},
        ],
    )
    def test_m12_a_configuration_that_the_weights_contradict(
        self, folder: Path, change: dict[str, Any]
    ) -> None:
        with pytest.raises(ModelFormatError, match=r"config\.json"):
            load(edit_config(folder, **change))

    def test_a_recurrent_architecture_is_refused(self, folder: Path) -> None:
        change = {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
        with pytest.raises(UnsupportedModelError, match="linear_attention"):
            load(edit_config(folder, **change))

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_a_cache_goes_by_the_name_that_the_network_has_for_it(
        self, folder: Path, name: str
    ) -> None:
        """transformers 5.24 renamed the argument of every model."""
        network, taken = _renamed(oracle(folder), name)
        held = read_folder(folder, formats=("safetensors",))
        model = TransformersModel(
            torch, transformers, network, folder=held, device="cpu", threads=None
        )
        session = model.new_session(max_length=4, expected_length=4)
        session.prefill([1, 2, 3])
        assert taken == ["DynamicCache", "Cache"]  # of the first try, and of the session
        whole = load(folder).new_session(max_length=4, expected_length=4).prefill([1, 2, 3, 4])
        assert abs(session.decode(4).numpy() - whole.numpy()).max() < 1e-4

    def test_a_network_that_takes_no_cache_is_refused(self, folder: Path) -> None:
        network, _ = _renamed(oracle(folder), "state")  # as RWKV's has it
        held = read_folder(folder, formats=("safetensors",))
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM takes no KV cache"):
            TransformersModel(torch, transformers, network, folder=held, device="cpu", threads=None)

    def test_an_unknown_architecture_is_refused(self, folder: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="knows no architecture 'planted'"):
            load(edit_config(folder, model_type="planted"))

    def test_transformers_logging_is_as_it_was(self, folder: Path) -> None:
        settings = transformers.utils.logging
        before = settings.get_verbosity(), settings.is_progress_bar_enabled()
        load(folder)
        assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before

    def test_a_failing_forward_is_a_typed_error(self, folder: Path) -> None:
        model: Any = load(folder)
        session = model.new_session(max_length=8, expected_length=8)
        del model.network.model.norm
        with pytest.raises(BackendRuntimeError, match="AttributeError"):
            session.prefill([1])
        with pytest.raises(SessionClosedError):
            session.prefill([1])
