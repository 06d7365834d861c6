"""Other people's checkpoints: the layouts that our folders share with theirs."""
