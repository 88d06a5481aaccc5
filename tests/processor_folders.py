"A folder laid out as the published Qwen3-VL checkpoints are, with a small tokenizer."
import json
from pathlib import Path

from copd_nb.policy.processors import CHAT_TEMPLATE, character_tokenizer

SIZES = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[.5] * 3, image_std=[.5] * 3)


def real_folder(folder: Path, template: str | None = "chat_template.json") -> Path:
    "Configuration and tokenizer files; the template goes to a file of its own, or to the tokenizer with None."
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if template is None else None
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / template).write_text(json.dumps(dict(chat_template=CHAT_TEMPLATE)) if template.endswith("json")
                                       else CHAT_TEMPLATE)
    images = dict(size=dict(longest_edge=16777216, shortest_edge=65536), **SIZES, processor_class="Qwen3VLProcessor",
                  image_processor_type="Qwen2VLImageProcessorFast")
    videos = dict(size=dict(longest_edge=25165824, shortest_edge=4096), **SIZES, processor_class="Qwen3VLProcessor",
                  video_processor_type="Qwen3VLVideoProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder
