"""What transformers' code can fetch or import by a name, all of it listed, and that no file of a checkpoint reaches it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from helpers.families import write_family

from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.config_bounds import FILES
from srcfast.models.foreign_code import BOUNDS, FOREIGN_FILES
from srcfast.models.scorer import load_scorer

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
REPOSITORY = "someone/something"
# Parts of transformers that srcfast never calls, and programs.
ASIDE = r"convert_|modular_|^(cli|commands|testing_utils|exporters|pipelines|trainer|safetensors_conversion|sagemaker|benchmark)"
KINDS = ("configuration", "feature_extraction", "image_processing", "processing", "tokenization", "video_processing")
AUTO = {"models/auto/auto_factory.py", *(f"models/auto/{kind}_auto.py" for kind in KINDS)}
# By function: the files of transformers 5.17 to 5.24 that call it, and what keeps a checkpoint's files from reaching it.
CALLERS: dict[str, tuple[set[str], str]] = {
    "get_class_from_dynamic_module": ({*AUTO, "dynamic_module_utils.py"}, "trust_remote_code=False"),
    "resolve_trust_remote_code": ({*AUTO, "generation/utils.py"}, "trust_remote_code=False"),
    "get_cached_module_file": ({"dynamic_module_utils.py", "generation/utils.py"}, "trust_remote_code=False"),
    "load_custom_generate": ({"generation/utils.py"}, "the field custom_generate is refused"),
    "import_module": (
        {
            *(*AUTO, "__init__.py", "dynamic_module_utils.py", "integrations/hub_kernels.py"),
            *("utils/generic.py", "utils/import_utils.py"),
        },
        "within transformers alone, or use_kernels and kernel_config, which are refused",
    ),
    "get_kernel": (
        {
            *(f"integrations/{name}.py" for name in ("eetq", "fbgemm_fp8", "gguf/kernels", "metal_quantization", "mxfp4")),
            *("integrations/hub_kernels.py", "integrations/msa_attention.py", "utils/import_utils.py"),
            *(f"models/{name}/modeling_{name}.py" for name in ("mra", "rwkv", "yoso", "sam3_video")),
            "quantizers/quantizer_mxfp4.py",
        },
        "quantised checkpoints and other attention are refused; the models name repositories themselves",
    ),
    "lazy_load_kernel": (
        {f"integrations/{name}.py" for name in ("deepgemm", "finegrained_fp8", "nvfp4", "sonicmoe")},
        "quantised checkpoints and other implementations of experts are refused",
    ),
    "load_and_register_attn_kernel": ({"modeling_flash_attention_utils.py"}, "_attn_implementation is bounded"),
    "create_model": (
        {f"models/{name}/modeling_{name}.py" for name in ("timm_backbone", "timm_wrapper")},
        "backbone, architecture, pretrained and checkpoint_path are bounded",
    ),
    "hf_hub_download": (
        {
            *(f"models/oneformer/image_processing_{name}.py" for name in ("oneformer", "pil_oneformer")),
            *(f"models/pix2struct/image_processing_{name}.py" for name in ("pix2struct", "pil_pix2struct")),
            *("models/perception_lm/modeling_perception_lm.py", "models/voxtral/processing_voxtral.py", "utils/hub.py"),
        },
        "the two image processors are refused; examples in docstrings; a directory is no repository",
    ),
    "snapshot_download": ({"utils/hub.py"}, "a directory is no repository"),
    "list_repo_files": ({"tokenization_utils_base.py"}, "a directory is no repository"),
    "list_repo_tree": ({"tokenization_utils_base.py", "utils/hub.py"}, "a directory is no repository"),
    "list_repo_templates": ({"processing_utils.py", "tokenization_utils_base.py"}, "a directory is no repository"),
    "model_info": ({"modelcard.py", "tokenization_utils_tokenizers.py"}, "a directory is no repository"),
    "get": (
        {f"{name}.py" for name in ("audio_utils", "image_utils", "video_utils", "utils/attention_visualizer", "utils/hub")},
        "srcfast hands images over, no addresses",
    ),
    "urlopen": ({"integrations/integration_utils.py", "models/qwen2_audio/modeling_qwen2_audio.py"}, "loggers, a docstring"),
    "load_state_dict_from_url": (set(), ""),
}  # fmt: skip


def test_what_transformers_can_fetch_is_listed() -> None:
    """A newer transformers that fetches elsewhere fails here: look at who reaches it, and bound the field."""
    root = Path(transformers.__file__).parent
    calls = re.compile(rf"(?<!def )\b(?:httpx\.(get)|({'|'.join(CALLERS.keys() - {'get'})}))\(")
    found: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        if not re.search(ASIDE, name):
            for plain, other in calls.findall(re.sub(r"(?m)^\s*(#|>>>|-).*$", "", file.read_text())):
                found.setdefault(plain or other, set()).add(name)
    assert {name: files - CALLERS[name][0] for name, files in found.items() if files - CALLERS[name][0]} == {}
    assert {"get_kernel", "hf_hub_download", "create_model", "load_and_register_attn_kernel"} <= found.keys()


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No connection is made, and no repository asked for."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    return asked


def planted(field: str) -> Any:
    return {"image_processor_type": "OneFormerImageProcessor"}.get(field, REPOSITORY)


@pytest.mark.parametrize("section", ["", "text_config", "vision_config", "image_processor", "a.b"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("backbone", ["handwritten", "transformers"])
def test_a_field_that_reaches_out_is_refused_in_every_file_and_section(
    backbone: str, file: str, section: str, tmp_path: Path, nothing_is_fetched: list[Any]
) -> None:
    base = Path(shutil.copytree(ASSETS / "base", tmp_path / "base"))
    sound = json.loads((base / file).read_text()) if (base / file).is_file() else {}
    for field in BOUNDS:
        settings = json.loads(json.dumps(sound))
        inner = settings
        for name in section.split(".") if section else ():
            inner = inner.setdefault(name, {})
        inner[field] = planted(field)
        (base / file).write_text(json.dumps(settings))
        name = f"{section}.{field}" if section else field
        with pytest.raises(InputError, match=rf"{re.escape(file)}, field '{re.escape(name)}'.*Fix: remove the field"):
            load_lvlm(base, backbone=backbone)
    assert not nothing_is_fetched


OTHER_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedModel", "Pix2StructImageProcessor")


@pytest.mark.parametrize("name", [*OTHER_CLASSES, "os.path", 3, ["A"]])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("preprocessor_config.json", "image_processor_type"),
        ("preprocessor_config.json", "feature_extractor_type"),
        ("processor_config.json", "processor_class"),
        ("tokenizer_config.json", "tokenizer_class"),
    ],
)
def test_no_other_class_is_loaded_in_place_of_a_processor_or_a_tokenizer(
    file: str, field: str, name: Any, tmp_path: Path, nothing_is_fetched: list[Any]
) -> None:
    """AutoModel, for one, would read the base that an adapter's config names beside it, from a hub."""
    base = Path(shutil.copytree(ASSETS / "base", tmp_path / "base"))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": REPOSITORY}
    (base / "adapter_config.json").write_text(json.dumps(adapter))
    sound = json.loads((base / file).read_text()) if (base / file).is_file() else {}
    (base / file).write_text(json.dumps(sound | {field: name}))
    with pytest.raises(InputError, match=rf"{re.escape(file)}, field '{field}': expected a"):
        load_lvlm(base)
    assert not nothing_is_fetched


@pytest.mark.parametrize("file", FOREIGN_FILES)
def test_a_file_that_reaches_out_is_refused(file: str, tmp_path: Path, nothing_is_fetched: list[Any]) -> None:
    for source, load in (("base", load_lvlm), ("scorer", load_scorer)):
        directory = Path(shutil.copytree(ASSETS / source, tmp_path / source))
        settings = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": REPOSITORY}
        (directory / file).write_text(json.dumps(settings))
        with pytest.raises(InputError, match=re.escape(file)):
            load(directory)  # type: ignore[operator]
    assert not nothing_is_fetched


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "internvl"])
def test_sound_checkpoints_are_read_without_a_network(name: str, tmp_path: Path, nothing_is_fetched: list[Any]) -> None:
    write_family(name, tmp_path)
    for other in ("_name_or_path", "name_or_path"):  # where a checkpoint says that it comes from
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), other: REPOSITORY}))
    load: Callable[..., Any] = load_lvlm
    load(tmp_path)
    load(tmp_path, backbone="transformers")
    assert not nothing_is_fetched
