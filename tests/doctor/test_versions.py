"""Requirements that are not met, by whom, and what meets them."""

from __future__ import annotations

import pytest

from phirt.doctor.packages import read_installed
from phirt.doctor.versions import examine_versions

EXTRAS = (
    'onnxruntime>=1.31; extra == "cpu"',
    'onnx>=1.20; extra == "cpu"',
    'openvino>=2026.4; extra == "openvino"',
    'mlx[cpu]>=0.32; extra == "mlx"',
    'torch>=2.9; extra == "torch"',
    'transformers>=5.23; extra == "torch"',
)


@pytest.fixture
def phirt(site):
    site.install("phirt", "1.0", requires=EXTRAS, extras=("cpu", "openvino", "mlx", "torch"))


def look():
    return [each for each in examine_versions(read_installed()) if each.severity != "ok"]


@pytest.mark.usefixtures("phirt")
class TestPhirt:
    def test_what_is_not_installed_is_not_needed(self, site):
        assert look() == []

    def test_all_is_met(self, site):
        site.install("onnxruntime", "1.31.1")
        site.install("onnx", "1.23.2")
        (found,) = examine_versions(read_installed())
        assert (found.severity, found.found) == (
            "ok",
            "2 requirements of phirt and its runtimes are met.",
        )

    def test_a_runtime_that_is_too_old(self, site):
        site.install("openvino", "2025.1.0")
        (found,) = look()
        assert found.severity == "warning"
        assert (
            found.found == "phirt[openvino] needs openvino>=2026.4; installed is openvino 2025.1.0."
        )
        assert found.command.endswith('pip install "openvino>=2026.4"')

    def test_part_of_an_extra_is_missing(self, site):
        site.install("onnxruntime", "1.31.1")
        (found,) = look()
        assert found.severity == "broken"
        assert found.found == "phirt[cpu] needs onnx>=1.20, which is not installed."
        assert found.command.endswith('pip install "onnx>=1.20"')

    def test_what_extras_share_is_no_sign_of_any(self, site):
        """Requirements are sorted by whoever built the wheel: converters may come first."""
        site.install(
            "phirt",
            "1.1",
            requires=[
                'gguf>=0.18; extra == "cuda"',
                'onnx>=1.20; extra == "cuda"',
                'onnxruntime-gpu>=1.26; extra == "cuda"',
            ],
            extras=["cuda"],
        )
        site.install("gguf", "0.18")
        site.install("onnx", "1.20")
        assert look() == []

    def test_an_extra_of_an_extra(self, site):
        """mlx[cpu] is mlx and a library of its own, of exactly its version."""
        site.install("mlx", "0.32.4", requires=['mlx-cpu==0.32.4; extra == "cpu"'])
        (found,) = look()
        assert found.found == "mlx[cpu] 0.32.4 needs mlx-cpu==0.32.4, which is not installed."
        site.install("mlx-cpu", "0.32.3", "mlx/lib/libmlx.so")
        (found,) = look()
        assert found.found.endswith("installed is mlx-cpu 0.32.3.")
        assert found.command.endswith('pip install "mlx-cpu==0.32.4"')

    def test_what_takes_transformers_back(self, site):
        site.install("torch", "2.13.0")
        site.install("transformers", "5.5.4")
        site.install("optimum-intel", "2.2.0", requires=["transformers<5.6,>=4.45"])
        (found,) = look()
        assert found.severity == "broken"
        assert "phirt[torch] needs transformers>=5.23" in found.found
        assert "optimum-intel 2.2.0 cannot be in one environment with it" in found.why
        assert "optimum-intel && " in found.command
        assert found.command.endswith('pip install "transformers>=5.23"')

    def test_what_would_take_it_back(self, site):
        site.install("torch", "2.13.0")
        site.install("transformers", "5.23.0")
        site.install("optimum-intel", "2.2.0", requires=["transformers<5.6"])
        (found,) = look()
        assert found.severity == "warning"
        assert found.found.startswith("optimum-intel 2.2.0 needs transformers<5.6; installed is")
        assert "optimum-intel" in found.command
        assert "transformers" not in found.command

    def test_what_our_own_update_mends_is_not_told_twice(self, site):
        site.install("torch", "2.13.0")
        site.install("transformers", "5.5.4")
        site.install("mlx-lm", "0.32.2", "mlx_lm/__init__.py", requires=["transformers>=5.7.0"])
        (found,) = look()
        assert found.found.startswith("phirt[torch] needs transformers>=5.23;")

    def test_a_prerelease_will_do(self, site):
        site.install("openvino", "2026.5.0.dev20261101")
        assert look() == []


class TestRuntimes:
    def test_what_a_runtime_needs(self, site):
        site.install("onnxruntime-genai", "0.18.0", requires=["onnxruntime>=1.31.0", "numpy"])
        site.install("numpy", "2.4")
        site.install("onnxruntime", "1.26.0")
        (found,) = look()
        assert found.found == (
            "onnxruntime-genai 0.18.0 needs onnxruntime>=1.31.0; installed is onnxruntime 1.26.0."
        )
        assert found.command.endswith('pip install "onnxruntime>=1.31.0"')

    def test_a_build_that_stands_in(self, site):
        site.install("onnxruntime-genai", "0.18.0", requires=["onnxruntime>=1.31.0"])
        site.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
        assert look() == []

    def test_a_build_that_stands_in_and_is_too_old(self, site):
        site.install("onnxruntime-genai", "0.18.0", requires=["onnxruntime>=1.31.0"])
        site.install("onnxruntime-webgpu", "1.27.0", "onnxruntime/__init__.py")
        (found,) = look()
        assert found.severity == "warning"
        assert "onnxruntime-webgpu stands in for onnxruntime" in found.why

    @pytest.mark.parametrize(
        ("plugin", "needs"),
        [
            ("onnxruntime-ep-openvino", "onnxruntime>=1.23.0"),
            ("onnxruntime-ep-webgpu", "onnxruntime>=1.24.4"),
        ],
    )
    def test_plugins_say_what_they_need_in_their_documents_only(self, site, plugin, needs):
        site.install(plugin, "1.0")
        (found,) = look()
        assert found.found == f"{plugin} 1.0 needs {needs}, which is not installed."
        site.install("onnxruntime", "1.20.0")
        (found,) = look()
        assert found.found.endswith("installed is onnxruntime 1.20.0.")
        site.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")

    def test_what_has_nothing_to_do_with_a_runtime(self, site):
        site.install("flask", "3.0", requires=["werkzeug>=3"])
        assert look() == []

    def test_what_openvino_does_not_miss(self, site):
        site.install("openvino", "2026.4.1", requires=["openvino-telemetry>=2023.2.1"])
        assert look() == []

    def test_a_requirement_that_cannot_be_read(self, site):
        site.install("openvino", "2026.4.1", requires=["numpy (>=1.2,,<)"])
        assert look() == []


class TestMending:
    """The command is run, in an environment that has the fault."""

    def test_what_a_plugin_needs_is_updated(self, environment):
        # A runtime that is surely not among what runs the tests.
        environment.install(
            "onnxruntime-ep-xyz", "1.0", "onnxruntime_ep_xyz/__init__.py", requires=["xyz-core>=2"]
        )
        environment.install("xyz-core", "1.0", "xyz_core/__init__.py")
        environment.offer("xyz-core", "2.1", "xyz_core/__init__.py")
        (found,) = environment.look()
        assert found["found"].endswith("installed is xyz-core 1.0.")
        environment.run(found["command"])
        assert environment.look() == []

    @pytest.fixture
    def phirt(self, environment):
        environment.install("phirt", "1.0", requires=EXTRAS[2:3], extras=["openvino"])

    @pytest.mark.usefixtures("phirt")
    @pytest.mark.parametrize("held", ["2026.4.1", "2025.1.0"])
    def test_what_takes_a_version_back_goes(self, environment, held):
        environment.offer("openvino", "2026.4.1", "openvino/__init__.py")
        environment.install("openvino", held, "openvino/__init__.py")
        environment.install("optimum-xyz", "1.0", "optimum_xyz/a.py", requires=["openvino<2026"])
        (found,) = environment.look()
        assert "optimum-xyz" in found["found"] + found["why"]
        environment.run(found["command"])
        assert environment.look() == []
