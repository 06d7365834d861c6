"""Networks, which know no schedule, no guidance and no loss."""
