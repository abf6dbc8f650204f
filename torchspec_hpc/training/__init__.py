"""The training group: FSDP2 trainers started by torchrun."""
