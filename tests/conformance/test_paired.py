"""Two runtimes as one model under the suite: what holds for each holds for the pair."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from phirt.backends.paired import PairedModel
from phirt.build.convert import convert
from phirt.dispatch.registry import get_backend
from phirt.protocols import Accept, Availability, Lack, LoadedModel, LoadOptions, Reject
from phirt.testing import BackendConformance
from phirt.testing.subject import empty_folder, read_artifact
from phirt.types import Artifact
from tests.installed import require

require("onnxruntime", "openvino")


class _Pair:
    """A backend of two, so that the suite can load it."""

    name: ClassVar[str] = "paired"
    formats: ClassVar[tuple[str, ...]] = ()
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    prefill: ClassVar[str]
    decode: ClassVar[str]

    def probe(self) -> list[Availability]:
        return get_backend(self.decode).probe()

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        return get_backend(self.decode).accepts(artifact, device)

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> LoadedModel:
        first, second = get_backend(self.prefill), get_backend(self.decode)
        decode = second.load(artifact, device, options)
        try:
            beside = read_artifact(first, artifact.path / "prefill")
            # From two tokens on, so that every prompt is handed over.
            return PairedModel(first.load(beside, device, options), decode, prefill_from=2)
        except BaseException:
            decode.close()
            raise


class OpenVinoThenOnnxruntime(_Pair):
    formats: ClassVar[tuple[str, ...]] = ("onnx-genai",)
    prefill: ClassVar[str] = "openvino"
    decode: ClassVar[str] = "onnxruntime"


class ReferenceThenOpenVino(_Pair):
    formats: ClassVar[tuple[str, ...]] = ("openvino",)
    prefill: ClassVar[str] = "reference"
    decode: ClassVar[str] = "openvino"


class _PairConformance(BackendConformance):
    pair: ClassVar[type[_Pair]]
    rejected: ClassVar = {"phimoe": Lack("not yet", "phirt converts dense decoders only")}

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout=self.pair.formats[0], precision="fp32")
        beside = out / "prefill"
        if self.pair.prefill == "reference":
            shutil.copytree(checkpoint, beside)
        else:
            convert(checkpoint, empty_folder(beside), layout="openvino", precision="fp32")
        return out


class TestOpenVinoThenOnnxruntime(_PairConformance):
    backend = pair = OpenVinoThenOnnxruntime
    kv_partners = ("reference", "onnxruntime")


class TestReferenceThenOpenVino(_PairConformance):
    backend = pair = ReferenceThenOpenVino
    architectures = ("llama", "phi3")
