"""Files of tensors: safetensors, torch files by a safe unpickler, finite numbers."""
