"""Work shared out over processes, and the launcher that started them."""
