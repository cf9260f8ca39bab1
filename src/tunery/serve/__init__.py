"""The OpenAI fine-tuning API, served on this machine."""
