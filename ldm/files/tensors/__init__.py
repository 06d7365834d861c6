"""Files of tensors: safetensors, torch files by a safe unpickler, checks for finite numbers."""
