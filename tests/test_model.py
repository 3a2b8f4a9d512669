"""The face of the library, over a real runtime and a tiny random model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import phirt

CHAT = [{"role": "user", "content": "hello World"}]


class TestGenerate:
    def test_text_chat_and_ids_are_three_kinds_of_prompt(self, tiny_model):
        text = tiny_model.chat_template.render(CHAT, add_generation_prompt=True)
        ids = tiny_model.tokenizer.encode(text, add_special_tokens=False)
        by_chat = tiny_model.generate(CHAT, max_new_tokens=8)
        by_ids = tiny_model.generate(ids, max_new_tokens=8)
        assert by_chat.token_ids == by_ids.token_ids
        assert by_chat.usage.prompt_tokens == len(ids)

    def test_greedy_without_settings(self, tiny_model):
        first = tiny_model.generate("hello", max_new_tokens=12)
        assert first.token_ids == tiny_model.generate("hello", max_new_tokens=12).token_ids
        assert first.usage.completion_tokens == len(first.token_ids)
        assert first.usage.cached_tokens == 0

    def test_it_is_the_same_as_its_stream(self, tiny_model):
        options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
        with tiny_model.stream("hello", **options) as stream:
            tokens = list(stream)
        result = tiny_model.generate("hello", **options)
        assert [token.id for token in tokens] == result.token_ids
        assert "".join(token.text for token in tokens) == result.text

    def test_ids_may_be_numpys(self, tiny_model):
        ids = tiny_model.tokenizer.encode("hello")
        expected = tiny_model.generate(ids, max_new_tokens=3).token_ids
        assert tiny_model.generate(list(np.array(ids)), max_new_tokens=3).token_ids == expected

    def test_params_and_single_overrides(self, tiny_model):
        params = phirt.GenerationParams(max_new_tokens=5, temperature=0.0)
        assert len(tiny_model.generate("hello", params=params).token_ids) == 5
        assert len(tiny_model.generate("hello", params=params, max_new_tokens=3).token_ids) == 3
        assert params.max_new_tokens == 5

    def test_params_that_change_between_two_tokens(self, tiny_model):
        with tiny_model.stream("hello", max_new_tokens=6) as stream:
            next(stream)
            stream.params = stream.params.merge(suppress_tokens=list(range(1, 262)))
            rest = [token.id for token in stream]
        assert all(token == 0 or token >= 262 for token in rest)

    def test_a_growing_cache_changes_nothing(self, tiny_model):
        """More than one bucket of 256 tokens: the cache moves, the tokens stay."""
        ids = tiny_model.tokenizer.encode("hello World ") * 20
        bounded = tiny_model.generate(ids, max_new_tokens=600, ignore_eos=True)
        with tiny_model.stream(ids, ignore_eos=True) as stream:
            growing = [token.id for token, _ in zip(stream, range(600), strict=False)]
        assert growing == bounded.token_ids

    def test_chunks_of_the_prompt_change_nothing(self, tiny_model):
        ids = tiny_model.tokenizer.encode("the World of hello ") * 60
        assert len(ids) > 600
        whole = tiny_model.score(ids)
        generated = tiny_model.generate([*ids], max_new_tokens=1, logprobs=0)
        extended = tiny_model.score([*ids, *generated.token_ids])
        assert extended[:-1] == pytest.approx(whole, abs=1e-3)
        assert generated.logprobs[0].logprob == pytest.approx(extended[-1], abs=1e-3)


class TestScore:
    def test_it_agrees_with_the_logprobs_of_a_generation(self, tiny_model):
        ids = tiny_model.tokenizer.encode("hello World")
        result = tiny_model.generate(ids, max_new_tokens=10, logprobs=0, ignore_eos=True)
        scores = tiny_model.score([*ids, *result.token_ids])[len(ids) - 1 :]
        assert scores == pytest.approx([entry.logprob for entry in result.logprobs], abs=1e-3)


class TestBadInput:
    """Rows L6 and L7: refused before the runtime is called."""

    @pytest.fixture(autouse=True)
    def _the_runtime_is_not_called(self, tiny_model, monkeypatch):
        def called(**_):
            pytest.fail("the runtime was called")

        monkeypatch.setattr(tiny_model._loaded, "new_session", called)

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": -1},
            {"temperature": float("nan")},
            {"top_p": 2},
            {"max_new_tokens": -1},
            {"max_new_tokens": 2**63},
            {"logit_bias": {10**6: 1.0}},
            {"stop_token_ids": [10**6]},
            {"suppress_tokens": [-1]},
        ],
        ids=str,
    )
    def test_parameters(self, tiny_model, params):
        with pytest.raises(ValueError, match=next(iter(params))):
            tiny_model.generate("hello", **params)

    @pytest.mark.parametrize("token", [-1, 300, 2**40])
    def test_token_ids(self, tiny_model, token):
        with pytest.raises(ValueError, match=f"{token}"):
            tiny_model.generate([1, token], max_new_tokens=1)

    def test_an_unknown_parameter(self, tiny_model):
        with pytest.raises(TypeError, match="'temperature'"):
            tiny_model.generate("hello", temprature=1.0)

    @pytest.mark.parametrize(
        ("prompt", "found"),
        [
            (None, "not NoneType"),
            (3, "not int"),
            (b"bytes", "not bytes"),
            (1.5, "not float"),
            ([1, "two"], "not list of int and str"),
            ([1, 2.5], "not list of float and int"),
            ([{"role": "user"}, 1], "not list of dict and int"),
        ],
    )
    def test_prompts(self, tiny_model, prompt, found):
        with pytest.raises(TypeError, match=found):
            tiny_model.generate(prompt)

    def test_params_of_another_type(self, tiny_model):
        with pytest.raises(TypeError, match="not dict"):
            tiny_model.generate("hello", params={"temperature": 1.0})

    @pytest.mark.parametrize("prompt", ["", []])
    def test_empty_prompts(self, tiny_model, prompt):
        with pytest.raises(ValueError, match="empty"):
            tiny_model.generate(prompt)

    def test_a_prompt_longer_than_the_context(self, tiny_model):
        """Row L7."""
        with pytest.raises(phirt.ContextLengthError, match=r"3000.*2048") as caught:
            tiny_model.generate([1] * 3000)
        assert caught.value.available == 2048
        assert caught.value.required == 3001

    def test_a_chat_to_a_model_without_a_template(self, tiny_model, monkeypatch):
        monkeypatch.setattr(tiny_model, "_template", None)
        with pytest.raises(phirt.UnsupportedModelError, match="no chat template"):
            tiny_model.generate(CHAT)


class TestLoad:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"device": "cuda"}, phirt.DeviceNotAvailableError, "'cuda' is not available"),
            ({"device": "nonsense:"}, ValueError, "not a device name"),
            ({"backend": "onnxruntim"}, phirt.UnknownBackendError, "Did you mean 'onnxruntime'"),
            ({"precision": "int3"}, ValueError, "'int3' is not one of"),
            ({"threads": 0}, ValueError, "threads=0"),
            ({"threads": 2**40}, ValueError, "from 1 to"),
            ({"threads": 1.5}, TypeError, "1.5"),
            ({"spinning": "no"}, TypeError, "'no'"),
            ({"pinning": 1}, TypeError, "pinning must be True, False or None"),
        ],
    )
    def test_settings_that_cannot_be(self, tiny_model, options, error, message):
        with pytest.raises(error, match=message):
            phirt.load(tiny_model.path, **options)

    @pytest.mark.parametrize("options", [{"device": "cuda"}, {"backend": "none"}])
    def test_what_cannot_work_is_refused_before_a_model_is_fetched(self, options, monkeypatch):
        monkeypatch.setattr("phirt.forms.locate", lambda *_, **__: pytest.fail("fetched"))
        with pytest.raises(phirt.PhirtError):
            phirt.load(**options)

    def test_a_folder_in_another_precision(self, tiny_model):
        with pytest.raises(ValueError, match="built with"):
            phirt.load(tiny_model.path, precision="int8")

    def test_nothing_of_that_name(self, tmp_path):
        with pytest.raises(phirt.ModelNotFoundError, match="no file or folder"):
            phirt.load(tmp_path / "none.gguf")

    @pytest.mark.parametrize("name", ["", "a" * 300, "/" + "a" * 5000, "~no-such-user/m.gguf"])
    def test_what_cannot_be_a_path(self, name):
        with pytest.raises(phirt.ModelNotFoundError):
            phirt.load(name)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO in a folder")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        if sys.platform != "win32":  # for the type checker, which knows no marks
            os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(phirt.UnsupportedModelError, match="is not a"):
            phirt.load(tmp_path / "pipe.gguf")

    def test_a_file_that_may_not_be_read(self, tiny_gguf, monkeypatch):
        really_open = Path.open

        def refuse(path, *args, **options):
            if path == tiny_gguf:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return really_open(path, *args, **options)

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(phirt.ModelFormatError, match="cannot be read"):
            phirt.load(tiny_gguf)

    @pytest.mark.parametrize("stem", ["con.v2", "...", "日本"])
    def test_a_file_of_any_name(self, tiny_gguf, tmp_path, stem):
        file = tmp_path / f"{stem}.gguf"
        file.write_bytes(tiny_gguf.read_bytes())
        with phirt.load(file) as model:
            assert model.name == stem

    def test_an_unknown_name_suggests_the_nearest(self):
        with pytest.raises(phirt.ModelNotFoundError, match="smollm2-135m-instruct"):
            phirt.load("smolm2-135m-instruct")

    def test_a_file_of_another_kind(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"x")
        with pytest.raises(phirt.UnsupportedModelError, match=r"\.gguf"):
            phirt.load(file)

    def test_something_that_names_no_model(self):
        with pytest.raises(TypeError, match="not int"):
            phirt.load(5)  # type: ignore[arg-type]  # on purpose

    @pytest.mark.parametrize(
        ("field", "name"),
        [("vocab_size", "logits"), ("head_size", "key"), ("num_key_value_heads", "key")],
    )
    def test_a_configuration_that_is_not_of_this_graph(self, tiny_model, tmp_path, field, name):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_model.path, folder)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        part = config["model"] if field == "vocab_size" else config["model"]["decoder"]
        part[field] *= 2
        path.write_text(json.dumps(config), encoding="utf-8")
        (folder / "phirt.json").unlink()  # which knows the size of every file
        with pytest.raises(phirt.ModelFormatError, match=rf"{name} has the shape.*graph"):
            phirt.load(folder)

    def test_the_tokenizers_end_token_ends_a_generation(self, tiny_model, tmp_path):
        """Stop ids are the union of all sources: here the folder names none but this."""
        folder = tmp_path / "copy"
        shutil.copytree(tiny_model.path, folder)
        ids = tiny_model.tokenizer.encode("hello")
        third = tiny_model.generate(ids, max_new_tokens=3, ignore_eos=True).token_ids[2]
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["eos_token"] = tiny_model.tokenizer.id_to_token(third)
        path.write_text(json.dumps(config), encoding="utf-8")
        (folder / "phirt.json").unlink()
        with phirt.load(folder) as model:
            result = model.generate(ids, max_new_tokens=20)
        assert result.token_ids[-1] == third
        assert result.finish_reason == "stop"

    def test_what_it_says_of_itself(self, tiny_model):
        assert tiny_model.name == "tiny-llama"
        assert (tiny_model.backend, tiny_model.device) == ("onnxruntime", "cpu")
        assert tiny_model.precision == "fp32"
        assert tiny_model.context_length == 2048
        assert set(tiny_model.placement.nodes) == {"CPUExecutionProvider"}
        assert "fp32" in repr(tiny_model)

    def test_threads_and_spinning(self, tiny_model):
        with phirt.load(tiny_model.path, threads=1, spinning=False) as model:
            single = model.generate("hello", max_new_tokens=8).token_ids
        assert single == tiny_model.generate("hello", max_new_tokens=8).token_ids

    def test_the_second_load_converts_nothing(self, tiny_gguf, monkeypatch, tmp_path):
        monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
        stages = []
        phirt.load(tiny_gguf, progress=lambda p: stages.append(p.stage)).close()
        assert "convert" in stages
        stages.clear()
        phirt.load(tiny_gguf, progress=lambda p: stages.append(p.stage)).close()
        assert "convert" not in stages

    def test_a_closed_model(self, tiny_model):
        model = phirt.load(tiny_model.path)
        with model.stream("hello", max_new_tokens=5) as stream:
            next(stream)
            model.close()
            model.close()
            # A stream that has begun keeps the weights until it ends.
            assert len(list(stream)) == 4
        with pytest.raises(phirt.SessionClosedError, match="closed"):
            model.generate("hello")


@pytest.mark.model
def test_the_default_model_answers(smollm2):
    result = smollm2.generate([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in result.text
    assert result.finish_reason == "stop"


@pytest.mark.model
def test_the_default_models_scores_make_sense(smollm2):
    sense = smollm2.score("The capital of France is Paris.")
    nonsense = smollm2.score("Paris of the is France capital.")
    assert np.mean(sense) > np.mean(nonsense)
