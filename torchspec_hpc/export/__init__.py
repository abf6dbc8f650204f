"""From a checkpoint to a draft directory that engines serve, and its measure."""
