"""The inference group: engines that turn token ids into hidden states."""
