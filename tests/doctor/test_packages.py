"""Distributions that have overwritten or lost each other's files."""

from __future__ import annotations

from phirt.doctor.packages import examine_packages, read_installed


def look():
    return list(examine_packages(read_installed()))


class TestOwners:
    def test_two_builds_of_one_runtime(self, site):
        site.install("onnxruntime", "1.31.1", "onnxruntime/__init__.py", "onnxruntime/a.so")
        site.install("onnxruntime-webgpu", "1.27.0", "onnxruntime/__init__.py", "onnxruntime/b.so")
        (found,) = look()
        assert (found.severity, found.area) == ("broken", "packages")
        assert "onnxruntime 1.31.1 and onnxruntime-webgpu 1.27.0 both installed" in found.found
        assert "uninstall" in found.command
        assert found.command.endswith("install onnxruntime-webgpu")

    def test_a_build_whose_name_tells_nothing(self, site):
        site.install("onnxruntime", "1.31.1", "onnxruntime/__init__.py")
        site.install("ort-nightly", "1.32.0", "onnxruntime/__init__.py")
        (found,) = look()
        assert "onnxruntime 1.31.1 and ort-nightly 1.32.0" in found.found

    def test_builds_that_share_a_library_and_no_package(self, site):
        site.install("mlx", "0.32.4", "mlx/core.so")
        site.install("mlx-cpu", "0.32.4", "mlx/lib/libmlx.so")
        assert [found.severity for found in look()] == ["ok"]
        site.install("mlx-cuda-13", "0.32.4", "mlx/lib/libmlx.so")
        (found,) = look()
        assert "mlx-cpu 0.32.4 and mlx-cuda-13 0.32.4" in found.found

    def test_three_owners_are_one_finding(self, site):
        for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"):
            site.install(name, "1", "onnxruntime/__init__.py", "onnxruntime/capi/a.py")
        (found,) = look()
        assert all(f"{name} 1" in found.found for name in ("onnxruntime-gpu", "onnxruntime"))
        assert found.command.endswith("install onnxruntime-directml")

    def test_plugins_stand_beside_the_runtime(self, site):
        site.install("onnxruntime", "1.31.1")
        site.install("onnxruntime-ep-openvino", "1.8.1")
        site.install("onnxruntime-qnn", "2.7.0")
        site.install("onnxruntime-genai", "0.18.0")
        (found,) = look()
        assert (found.severity, found.found[:15]) == ("ok", "4 distributions")

    def test_what_others_share_is_theirs(self, site):
        site.install("one", "1", "tests/__init__.py")
        site.install("two", "1", "tests/__init__.py")
        assert look() == []

    def test_the_command_mends_it(self, environment):
        files = ("onnxruntime/__init__.py", "onnxruntime/capi.py")
        environment.install("onnxruntime", "1.31.1", *files)
        environment.install("onnxruntime-webgpu", "1.27.0", *files, "onnxruntime/webgpu.py")
        (found,) = (each for each in environment.look() if each["area"] == "packages")
        environment.run(found["command"])
        assert not [each for each in environment.look() if each["area"] == "packages"]
        assert (environment.site / "onnxruntime" / "webgpu.py").exists()


class TestFiles:
    def test_what_an_uninstalled_build_took_along(self, site):
        site.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py", "onnxruntime/a.so")
        (site.path / "onnxruntime" / "a.so").unlink()
        (found,) = (each for each in look() if each.severity == "broken")
        assert "1 of its 2 files" in found.found
        assert "onnxruntime/a.so" in found.found
        assert found.command.endswith('--force-reinstall --no-deps "onnxruntime-gpu==1.31.1"')

    def test_a_file_of_another_size(self, site):
        site.install("openvino", "2026.4.1", "openvino/__init__.py")
        (site.path / "openvino" / "__init__.py").write_text("another")
        (found,) = (each for each in look() if each.severity == "broken")
        assert "openvino/__init__.py" in found.found

    def test_many_are_counted(self, site):
        files = [f"torch/{number}.py" for number in range(9)]
        site.install("torch", "2.13.0", *files)
        for file in files:
            (site.path / file).unlink()
        (found,) = (each for each in look() if each.severity == "broken")
        assert "torch/0.py, torch/1.py, torch/2.py and 6 more" in found.found

    def test_the_command_mends_it(self, environment):
        environment.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
        environment.install("onnxruntime", "1.31.1", "onnxruntime/__init__.py")
        environment.run("python -m pip uninstall -y onnxruntime")
        (found,) = (each for each in environment.look() if each["area"] == "packages")
        assert found["found"].startswith("onnxruntime-gpu 1.31.1: 1 of its 1 files")
        environment.run(found["command"])
        assert not [each for each in environment.look() if each["area"] == "packages"]
