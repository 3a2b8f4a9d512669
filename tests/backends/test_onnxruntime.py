"""onnxruntime's adapter on the CPU: layouts, caches, limits. The suite holds the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

from phirt.backends.onnxruntime.adapter import OnnxRuntimeBackend, OrtModel
from phirt.build.convert import convert
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions, ModelInfo
from phirt.testing import write_tiny_checkpoint
from phirt.testing.subject import Oracle, random_ids, read_artifact
from tests.backends.onnxruntime_exports import write_export

_FLOAT16, _BFLOAT16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by architecture, each written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.exists() else write_tiny_checkpoint(folder, architecture)

    return get


@pytest.fixture(scope="module")
def genai_folders(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]
) -> Callable[[str], Path]:
    """phirt's own graphs of them, each written once and not to be changed."""
    root = tmp_path_factory.mktemp("genai")

    def get(architecture: str) -> Path:
        folder = root / architecture
        if not folder.exists():
            folder.mkdir()
            convert(checkpoints(architecture), folder, layout="onnx-genai", precision="fp32")
        return folder

    return get


def load(folder: Path, **extra: Any) -> OrtModel:
    backend = OnnxRuntimeBackend()
    artifact = read_folder(folder, formats=backend.formats).artifact
    return backend.load(artifact, "cpu", LoadOptions(extra=extra))


def edited(
    folder: Path, out: Path, edit: Callable[[onnx.ModelProto, dict[str, Any]], None]
) -> Path:
    """A copy of a genai folder whose graph and configuration were edited."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name not in {"phirt.json", "config.json"}:
            (out / path.name).write_bytes(path.read_bytes())
    model = onnx.load(out / "model.onnx", load_external_data=False)
    config = json.loads((out / "genai_config.json").read_text())
    edit(model, config)
    onnx.save(model, out / "model.onnx")
    (out / "genai_config.json").write_text(json.dumps(config))
    return out


def worst_logit(model: OrtModel, oracle: Oracle, length: int = 40) -> float:
    """The largest difference over a prefill, steps, going back, and a verify."""
    ids = random_ids(length, seed=length)
    expected = oracle.logits(ids)
    session = model.new_session(max_length=length, expected_length=8)
    rows = [session.prefill(ids[:20]).numpy()[0].copy()]
    rows += [session.decode(ids[index]).numpy()[0].copy() for index in range(20, length)]
    session.truncate(length - 7)
    rows += list(session.verify(ids[length - 7 :]).numpy())
    session.close()
    wanted = np.concatenate([expected[19:length], expected[length - 7 :]])
    return float(np.abs(np.array(rows) - wanted).max())


class TestExports:
    """Folders of Optimum and transformers.js: config.json and a graph in plain operators."""

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral"])
    def test_architectures(
        self, checkpoints: Callable[[str], Path], tmp_path: Path, architecture: str
    ) -> None:
        model = load(write_export(checkpoints(architecture), tmp_path))
        assert worst_logit(model, Oracle(checkpoints(architecture))) < 1e-3
        assert model.info.window == (16 if architecture in {"gemma3_text", "mistral"} else None)

    @pytest.mark.parametrize("kind", [{"position_ids": False}, {"merged": True}])
    def test_inputs(
        self, checkpoints: Callable[[str], Path], tmp_path: Path, kind: dict[str, Any]
    ) -> None:
        model = load(write_export(checkpoints("llama"), tmp_path, **kind))
        assert worst_logit(model, Oracle(checkpoints("llama"))) < 1e-3

    @pytest.mark.parametrize(("element", "tolerance"), [(_FLOAT16, 0.05), (_BFLOAT16, 0.4)])
    def test_caches_of_sixteen_bits(
        self, checkpoints: Callable[[str], Path], tmp_path: Path, element: int, tolerance: float
    ) -> None:
        model = load(write_export(checkpoints("llama"), tmp_path, element=element))
        assert worst_logit(model, Oracle(checkpoints("llama"))) < tolerance
        session = model.new_session(max_length=30, expected_length=30)
        session.prefill(random_ids(20))
        other = model.new_session(max_length=30, expected_length=30)
        other.import_kv(session.export_kv())
        assert np.array_equal(session.decode(5).numpy(), other.decode(5).numpy())

    def test_a_traced_longrope_model_ends_at_the_boundary(
        self, checkpoints: Callable[[str], Path], tmp_path: Path
    ) -> None:
        # The trace has the short factors and nothing that would choose the long ones.
        info = load(write_export(checkpoints("phi3"), tmp_path)).info
        assert (info.context_length, info.rope_boundary) == (32, None)

    def test_lacks(self, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
        model = load(write_export(checkpoints("llama"), tmp_path))
        assert set(model.capabilities.lacks) == {"batch", "topk"}
        with pytest.raises(NotImplementedError):
            model.new_pool(slots=2, capacity=8, expected_length=8)

    def test_without_a_cache(self, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
        folder = write_export(checkpoints("llama"), tmp_path)
        path = folder / "onnx" / "model.onnx"
        model = onnx.load(path)
        for value in [*model.graph.input]:
            if value.name.startswith("past"):
                value.name = "other." + value.name
        onnx.save(model, path)
        with pytest.raises(
            (UnsupportedModelError, ModelFormatError), match=r"with-past|cannot read"
        ):
            load(folder)


class TestModelBuilder:
    """What Model Builder's graphs differ in, put into graphs of phirt's."""

    def test_caches_that_are_not_shared(
        self, genai_folders: Callable[[str], Path], checkpoints: Any, tmp_path: Path
    ) -> None:
        def edit(model: onnx.ModelProto, config: dict[str, Any]) -> None:
            config["search"]["past_present_share_buffer"] = False

        model = load(edited(genai_folders("llama"), tmp_path / "edited", edit))
        assert not model.shares_buffer
        assert worst_logit(model, Oracle(checkpoints("llama"))) < 1e-3

    def test_a_cache_that_rolls_on_gets_room_for_everything(
        self, genai_folders: Callable[[str], Path], checkpoints: Any, tmp_path: Path
    ) -> None:
        def edit(model: onnx.ModelProto, config: dict[str, Any]) -> None:
            config["model"]["decoder"]["sliding_window"] = {"window_size": 16, "layers": [0]}
            for node in model.graph.node:
                attributes = {item.name: item.i for item in node.attribute}
                if attributes.get("local_window_size", -1) > 0:
                    node.attribute.append(onnx.helper.make_attribute("sliding_window_cache", 1))

        model = load(edited(genai_folders("gemma3_text"), tmp_path / "edited", edit))
        assert (model.least_capacity, model.info.window) == (16, 16)
        assert worst_logit(model, Oracle(checkpoints("gemma3_text")), 60) < 1e-3
        # The kernel refuses a buffer of less than a window, however short the sequence is.
        session = model.new_session(max_length=4, expected_length=4)
        session.prefill([1, 2])
        assert session.floor == 0

    def test_a_window_that_the_graph_does_not_know(
        self, genai_folders: Callable[[str], Path], tmp_path: Path
    ) -> None:
        def edit(model: onnx.ModelProto, config: dict[str, Any]) -> None:
            config["model"]["decoder"]["sliding_window"] = {"window_size": 16, "layers": []}
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "local_window_size":
                        attribute.i = -1

        info = load(edited(genai_folders("mistral"), tmp_path / "edited", edit)).info
        assert (info.context_length, info.window) == (16, 16)

    def test_the_boundary_is_the_graphs(
        self, genai_folders: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = edited(genai_folders("phi3"), tmp_path / "edited", lambda *_: None)
        assert not (folder / "config.json").exists()
        assert load(folder).info.rope_boundary == 32


class TestCaches:
    def test_a_cache_moves_between_layouts(
        self, genai_folders: Callable[[str], Path], checkpoints: Any, tmp_path: Path
    ) -> None:
        shared, growing = load(genai_folders("llama")), load(genai_folders("llama"))
        growing.shares_buffer = False
        ids, oracle = random_ids(30), Oracle(checkpoints("llama"))
        for source, target in ((shared, growing), (growing, shared)):
            session = source.new_session(max_length=30, expected_length=30)
            session.prefill(ids[:-1])
            other = target.new_session(max_length=30, expected_length=4)
            other.import_kv(session.export_kv())
            logits = other.decode(ids[-1]).numpy()
            assert np.abs(logits - oracle.logits(ids)[-1:]).max() < 1e-3

    def test_a_cache_of_another_shape(self, genai_folders: Callable[[str], Path]) -> None:
        model = load(genai_folders("llama"))
        session = model.new_session(max_length=30, expected_length=30)
        session.prefill([1, 2, 3])
        cache = session.export_kv()
        wrong = type(cache)(cache.layers[:1], cache.length, cache.weights_id, cache.regime)
        with pytest.raises(ValueError, match="needs 4 of"):
            model.new_session(max_length=30, expected_length=30).import_kv(wrong)

    def test_a_setting_that_does_not_exist(self, genai_folders: Callable[[str], Path]) -> None:
        """onnxruntime itself would take it, and do nothing."""
        with pytest.raises(ValueError, match="no setting"):
            load(genai_folders("llama"), spining=True)
        load(genai_folders("llama"), **{"session.intra_op.allow_spinning": "1"}).close()

    def test_runs_of_few_tokens(
        self, genai_folders: Callable[[str], Path], checkpoints: Any
    ) -> None:
        model = load(genai_folders("gemma3_text"), tokens_per_run=3)
        assert worst_logit(model, Oracle(checkpoints("gemma3_text"))) < 1e-3


class TestPool:
    def test_rows_are_exact(self, genai_folders: Callable[[str], Path]) -> None:
        """Whatever lies beside a row, and in however many runs: the same bits as alone."""
        model = load(genai_folders("gemma3_text"))
        pool = model.new_pool(slots=4, capacity=60, expected_length=20)
        texts = [random_ids(60, seed=seed) for seed in range(4)]
        rows = [pool.acquire() for _ in texts]
        alone = [model.new_session(max_length=60, expected_length=60) for _ in texts]
        for number, text in enumerate(texts):
            rows[number].prefill(text[: 10 + 7 * number])
            alone[number].prefill(text[: 10 + 7 * number])
        for taking_part in ([0, 1, 2, 3], [3, 1], [2], [0, 3, 2]):
            tokens = [texts[number][rows[number].length] for number in taking_part]
            logits = pool.decode([rows[number] for number in taking_part], tokens).numpy()
            for index, number in enumerate(taking_part):
                assert np.array_equal(logits[index], alone[number].decode(tokens[index]).numpy()[0])

    def test_a_freed_row_is_the_next(self, genai_folders: Callable[[str], Path]) -> None:
        pool = load(genai_folders("llama")).new_pool(slots=3, capacity=20, expected_length=20)
        first, second, third = (pool.acquire() for _ in range(3))
        second.close()
        again = pool.acquire()
        for session in (first, again, third):
            session.prefill([1, 2, 3])
        logits = pool.decode([third, again, first], [4, 4, 4]).numpy()
        assert np.array_equal(logits[0], logits[1])
        assert np.array_equal(logits[0], logits[2])


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_greedy_as_transformers(
    genai_folders: Callable[[str], Path],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    architecture: str,
) -> None:
    """The graph of phirt's and the export: a full forward of transformers after 24 steps."""
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(
        checkpoints(architecture), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for folder in (genai_folders(architecture), write_export(checkpoints(architecture), tmp_path)):
        model, ids = load(folder), random_ids(20)
        session = model.new_session(max_length=44, expected_length=44)
        logits = session.prefill(ids).numpy()
        for _ in range(24):
            with torch.no_grad():
                wanted = oracle(torch.tensor([ids])).logits[0, -1].numpy()
            assert np.abs(logits[0] - wanted).max() < 1e-3
            ids.append(int(wanted.argmax()))
            logits = session.decode(ids[-1]).numpy()


def test_what_it_says_of_itself(genai_folders: Callable[[str], Path]) -> None:
    model = load(genai_folders("llama"))
    assert isinstance(model.info, ModelInfo)
    assert model.concurrency == "parallel"
    assert set(model.placement().nodes) == {"CPUExecutionProvider"}
    assert model.capabilities.kv
    assert model.capabilities.batch


def processors(thread: int | None = None) -> list[int]:
    """Those that a thread may run on; of None, this process."""
    process: Any = psutil.Process(thread)  # Linux's and Windows's have the method
    return list(process.cpu_affinity())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="it is read from Linux's /proc")
@pytest.mark.skipif(os.cpu_count() == 1, reason="with one processor there is nothing to bind to")
class TestPinning:
    """Worker threads that are bound to processors, as the system tells."""

    def bound(self, folder: Path, **options: Any) -> list[int]:
        """How many processors each new thread may run on."""
        before = set(Path("/proc/self/task").iterdir())
        backend = OnnxRuntimeBackend()
        model = backend.load(read_artifact(backend, folder), "cpu", LoadOptions(**options))
        new = set(Path("/proc/self/task").iterdir()) - before
        found = [len(processors(int(task.name))) for task in new]
        model.close()
        return found

    def test_each_to_one(self, genai_folders: Callable[[str], Path]) -> None:
        found = self.bound(genai_folders("llama"), threads=3, pinning=True)
        assert found == [1, 1]

    def test_none(self, genai_folders: Callable[[str], Path]) -> None:
        every = len(processors())
        assert self.bound(genai_folders("llama"), threads=3, pinning=False) == [every, every]
        assert set(self.bound(genai_folders("llama"), pinning=False)) <= {every}

    def test_what_the_user_says_in_the_runtimes_words_goes_before(
        self, genai_folders: Callable[[str], Path]
    ) -> None:
        extra = {"session.intra_op_thread_affinities": "1"}
        assert self.bound(genai_folders("llama"), threads=2, pinning=True, extra=extra) == [1]


def test_a_system_that_binds_no_threads(
    genai_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
    backend = OnnxRuntimeBackend()
    artifact = read_artifact(backend, genai_folders("llama"))
    with pytest.raises(ValueError, match="this system binds no threads"):
        backend.load(artifact, "cpu", LoadOptions(threads=2, pinning=True))
