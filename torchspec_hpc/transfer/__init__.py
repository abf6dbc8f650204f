"""Messages, queues and the store that carry hidden states from engines to trainers."""
