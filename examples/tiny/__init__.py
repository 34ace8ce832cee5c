"""The world of the demo: a task, a tokenizer, debating teachers and a weak student."""
