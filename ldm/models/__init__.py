"""Networks. A network knows no schedule, no guidance and no loss."""
