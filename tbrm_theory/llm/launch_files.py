"""Files for ``accelerate launch``: how many processes, and what is sharded; DeepSpeed's own JSON that such a file may name.

They are parsed by accelerate's own classes, so that a key it does not know is an error here, without the devices that they
are meant for. A path inside one is relative to where the command is given, as accelerate reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from tbrm_theory.errors import InvalidInputError

__all__ = ["Launch", "read_launch_file"]


class Launch(NamedTuple):
    """``stage`` as in ZeRO: 0 nothing is sharded, 2 gradients and optimiser, 3 weights too.

    ``fsdp``: the version of FSDP, 0 where it is not what shards.
    """

    processes: int
    stage: int
    mixed_precision: str
    fsdp: int = 0


def read_launch_file(path: str | Path) -> Launch:
    """What a file for ``accelerate launch --config_file`` sets up."""
    try:
        found: Any = load_config_from_file(str(path))
    except (ValueError, TypeError) as error:
        raise InvalidInputError(str(path), str(error)) from error
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    stage = _stage(str(path), kind, found)
    fsdp = int(found.fsdp_config.get("fsdp_version", 1)) if kind == "FSDP" else 0
    return Launch(int(found.num_processes), stage, str(found.mixed_precision), fsdp)


def _stage(path: str, kind: str, found: Any) -> int:
    if kind == "DEEPSPEED":
        options = dict(found.deepspeed_config)
        given = options.get("deepspeed_config_file")
        try:
            plugin = DeepSpeedPlugin(hf_ds_config=given) if given else DeepSpeedPlugin(zero_stage=options["zero_stage"])
        except (KeyError, ValueError) as error:
            raise InvalidInputError(path, f"accelerate refuses deepspeed_config: {error}") from error
        return int(plugin.zero_stage)
    if kind == "FSDP":
        return 3 if _fsdp(path, dict(found.fsdp_config)).reshard_after_forward else 2
    return 0


def _fsdp(path: str, options: dict[str, Any]) -> FullyShardedDataParallelPlugin:
    """accelerate's plugin from the keys of a file, which carry the prefix ``fsdp_``."""
    named = {key.removeprefix("fsdp_"): value for key, value in options.items()}
    renamed = {"offload_params": "cpu_offload", "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap"}
    made = {renamed.get(key, key): value for key, value in named.items() if key != "version"}
    wrapped = made.get("transformer_cls_names_to_wrap")
    if isinstance(wrapped, str):
        made["transformer_cls_names_to_wrap"] = wrapped.split(",")
    if isinstance(made.get("auto_wrap_policy"), str):
        made["auto_wrap_policy"] = made["auto_wrap_policy"].lower()
    version = named.get("version", 1)
    if version not in (1, 2):
        raise InvalidInputError(path, f"fsdp_version: expected 1 or 2, found {version}")
    try:
        return FullyShardedDataParallelPlugin(fsdp_version=version, **made)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(path, f"accelerate refuses fsdp_config: {error}") from error
