"""Files of tensors: opened without being read, refused where they ask for more than tensors, written whole."""
